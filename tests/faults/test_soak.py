"""The demo's training again and again, while everything happens to it: `make soak`, for hours."""

import os
import random
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from trainings import (
    BIT_FLIPPED,
    CUT_SHORT,
    FULL_DISK,
    KILL,
    LOADER_KILLED,
    SIGTERM,
    Training,
    train_through,
)

from mit_semseg.demo import streets

HOURS = float(os.environ.get("SOAK_HOURS", "0.03"))
# What may happen, and how often beside the others.
WEIGHTS = {KILL: 4, LOADER_KILLED: 2, SIGTERM: 2, FULL_DISK: 2, CUT_SHORT: 1, BIT_FLIPPED: 1}
# As in config/demo.yaml, shorter where the time is.
DEMO = {
    "DATASET__imgSizes": [240],
    "DATASET__imgMaxSize": 480,
    "MODEL__arch_decoder": "c1_deepsup",
    "TRAIN__num_epoch": 11,
    "TRAIN__epoch_iters": "auto",
    "TRAIN__lr_encoder": 0.005,
    "TRAIN__lr_decoder": 0.005,
    "TRAIN__warmup_iters": 20,
    "TRAIN__weight_decay": 0.01,
    "TRAIN__class_weights": "sqrt",
    "TRAIN__ema": 0.99,
    "TRAIN__precision": "auto",
    "TRAIN__eval_epochs": 4,
    "TRAIN__checkpoint_minutes": 0.25,
    "VAL__imgSizes": [288],
}


@pytest.mark.faults
@pytest.mark.timeout(3600 * (HOURS + 2))
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")
def test_nothing_is_lost_whatever_happens(tmp_path):
    long = HOURS > 0.5
    counts = (160, 32) if long else (12, 4)
    scenes = streets.write(tmp_path / "scenes", *counts, size=(240, 320) if long else (96, 128))
    settings = DEMO if long else {}
    rng, began = random.Random(306), time.monotonic()
    reference = Training(tmp_path / "unbroken", scenes, **settings)
    train_through(reference, iter(()), lambda *_: None, rng)
    pace, end = time.monotonic() - began, began + 3600 * HOURS

    def faults():
        while time.monotonic() < end:
            (fault,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            workers = ("TRAIN.workers", str(rng.choice((0, 1, 2))))
            yield fault if fault.options else replace(fault, options=workers)

    def pause(training, command, fault):
        """Some part of the time that a whole training takes; most faults need it to be training."""
        if fault.name != KILL.name:
            step = training.steps()
            command.until(lambda: not command.is_running() or training.steps() > step, 600)
        deadline = time.monotonic() + rng.random() * pace
        while command.is_running() and time.monotonic() < deadline:
            time.sleep(0.05)

    found = Counter()
    while time.monotonic() < end or not found:
        training = Training(tmp_path / "soak", scenes, **settings)
        found += train_through(training, faults(), pause, rng)
        found["trainings completed"] += 1
        print(f"{(time.monotonic() - began) / 3600:.2f} h: {dict(found)}", flush=True)
        assert not training.differences(reference)
