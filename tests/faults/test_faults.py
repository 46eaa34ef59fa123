"""A training that is killed, stopped, starved or damaged ends with the bits of an unbroken one."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import ROOT
from trainings import (
    BIT_FLIPPED,
    CUT_SHORT,
    FULL_DISK,
    KILL,
    LOADER_KILLED,
    LOADER_STOPPED,
    SIGINT,
    SIGTERM,
    train_through,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")

# Few steps, and a network with dropout that is quick to save, after every step.
SMALL = {
    "MODEL__arch_encoder": "enet",
    "MODEL__arch_decoder": "enet",
    "MODEL__fc_dim": 128,
    "DATASET__segm_downsampling_rate": 1,
    "TRAIN__epoch_iters": 4,
    "TRAIN__checkpoint_minutes": 0.001,
}


def after_steps(training, command, fault):
    """Until two steps were taken since the start."""
    step = training.steps()
    command.until(lambda: not command.is_running() or training.steps() >= step + 2, 120)


def after_a_state(training, command, fault):
    """Until a state was written since the start."""
    states = training.folder.states()[:1]
    command.until(lambda: not command.is_running() or training.folder.states()[:1] != states, 120)


def after_two_states(training, command, fault):
    """Until two states were written since the start: of two, one may be damaged."""
    after_a_state(training, command, fault)
    after_a_state(training, command, fault)


def in_validation(training, command, fault):
    """Until the weights of an epoch were written, which its validation follows."""
    names = training.folder.names()
    command.until(lambda: not command.is_running() or training.folder.names() != names, 120)


def test_a_killed_training_loses_nothing(training, unbroken):
    broken = training("broken", **SMALL)
    found = train_through(broken, iter((KILL,)), after_a_state, random.Random(0))
    assert found[KILL.name] == found["starts that resumed"] == 1
    assert not broken.differences(unbroken(**SMALL))


def test_a_difference_is_found(training, unbroken):
    one, other = unbroken(**SMALL), training("other", **SMALL)
    other.folder.path.mkdir()
    for file in one.folder.path.iterdir():
        if file.is_file():
            (other.folder.path / file.name).write_bytes(file.read_bytes())
    assert other.differences(one) == []
    decoder = other.folder.path / "decoder_best.pth"
    weights = torch.load(decoder, weights_only=True)
    name, weight = next((k, v) for k, v in weights.items() if v.is_floating_point())
    weight[(0,) * weight.ndim] += 1e-6
    torch.save(weights, decoder)
    metrics = other.folder.path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    lines = len(one.figures())
    assert other.differences(one) == [
        f"decoder_best.pth: {name}",
        f"{lines - 1} lines of figures, not {lines}",
    ]


def test_a_collection_copies_no_page_shared_with_loading_processes(training):
    """What the growth of memory would show after some thousand steps, at once."""
    code = (
        "import gc, sys, psutil, torch; from processes import filled_mib\n"
        "from mit_semseg.config import load_config\n"
        "from mit_semseg.engine.training.build import build\n"
        "parts = build(load_config(sys.argv[1]), [torch.device('cpu')], progress=False)\n"
        "loader = parts.loader(first=0, micro_steps=100)\n"
        "next(iter(loader))\n"
        "before = filled_mib(psutil.Process()); gc.collect()\n"
        "print(filled_mib(psutil.Process()) - before); loader.close()"
    )
    words = [sys.executable, "-c", code, str(training("collection", **SMALL).file)]
    tests = f"{ROOT}:{Path(__file__).parents[1]}"
    environment = {**os.environ, "PYTHONPATH": tests}
    grown = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert float(grown.stdout) < 10


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_lose_nothing(training, unbroken):
    """With and without loading processes, mostly while it works, now and then while it starts."""
    rng, kills, starts, resumed, unfinished = random.Random(304), 0, 0, 0, 0

    def at_random(training, command, fault):
        if rng.random() < 0.8:
            after_a_state(training, command, fault)
        time.sleep(rng.random() * 3)

    while kills < 20:
        killed = training("killed")
        loaders = [("TRAIN.workers", str(rng.choice((0, 1, 2)))) for _ in range(10)]
        faults = iter([replace(KILL, options=options) for options in loaders])
        found = train_through(killed, faults, at_random, rng)
        kills, starts = kills + found["SIGKILL"], starts + found["starts"]
        resumed += found["starts that resumed"]
        unfinished += found["files left unfinished"]
        assert not killed.differences(unbroken())
    assert resumed
    print(f"{kills} kills, {unfinished} during a write; {resumed} of {starts} starts resumed")


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("faults", "pause"),
    [
        ((SIGTERM, SIGINT), after_steps),
        ((SIGTERM,), in_validation),
        ((CUT_SHORT, BIT_FLIPPED), after_two_states),
        ((LOADER_KILLED, LOADER_STOPPED), after_steps),
        ((FULL_DISK,), after_a_state),
    ],
    ids=lambda x: ", ".join(y.name for y in x) if isinstance(x, tuple) else x.__name__,
)
def test_nothing_is_lost_by(training, unbroken, faults, pause):
    # States by time, but for those that a signal asks for, where these are looked at.
    minutes = 0 if faults[0].saves else 0.01
    settings = {"TRAIN__num_epoch": 4, "TRAIN__checkpoint_minutes": minutes}
    broken = training("broken", **settings)
    found = train_through(broken, iter(faults), pause, random.Random(305))
    assert all(found[fault.name] for fault in faults), found
    assert not broken.differences(unbroken(TRAIN__num_epoch=4))
