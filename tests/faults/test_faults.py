"""A broken training ends with the bits of an unbroken one, and long jobs hold no more memory."""

import math
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

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
    Training,
    train_through,
)

from mit_semseg.dataset.images import image_size
from mit_semseg.dataset.records import read_odgt
from mit_semseg.demo import streets
from mit_semseg.engine import cpu
from mit_semseg.engine.train import train

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


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """`training(name, SECTION__key=value)`: one that has not begun, on 12 small scenes."""
    root = tmp_path_factory.mktemp("faults")
    scenes = streets.write(root / "scenes", 12, 4, size=(96, 128))
    return lambda name, **settings: Training(root / name, scenes, **settings)


@pytest.fixture(scope="module")
def unbroken(training):
    """`unbroken(SECTION__key=value)`: the training to compare with, made at the first call."""
    known = {}

    def unbroken(**settings):
        key = repr(sorted(settings.items()))
        if key not in known:
            known[key] = training(f"unbroken_{len(known)}", **settings)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the commands have it that are compared with it
            with mock.patch.object(cpu, "_fixed_threads", 1):
                train(known[key].cfg, [torch.device("cpu")], progress=False)
            torch.set_num_threads(threads)
        return known[key]

    return unbroken


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


def test_a_killed_training_ends_bit_identical(training, unbroken):
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
        f"{lines - 1} lines of metrics, not {lines}",
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


# ------------------------------------------------------------------------------ memory
# Growth between the second and the last quarter of a job that may be noise.
NOISE_MIB = 32.0


def assert_flat(command, done):
    """Follow the memory of a job to its end; `done` tells the share of it that is done."""
    samples = []
    try:
        while command.is_running():
            samples.append((done(), command.memory_mib()))
            time.sleep(0.3)
        ended = command.wait()
    finally:
        command.destroy()
    assert ended.code == 0, ended.output[-2000:]

    def median(start, end):
        chosen = [mib for share, mib in samples if start <= share <= end]
        return statistics.median(chosen) if chosen else math.nan

    early, late, peak = median(0.25, 0.5), median(0.75, 0.98), max(mib for _, mib in samples)
    print(f"{early:.1f} MiB in the second quarter, {late:.1f} in the last, at most {peak:.1f}")
    assert late - early < NOISE_MIB


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_memory_of_a_training_stays_flat(training):
    steps = 2000
    job = training(
        "growing",
        TRAIN__epoch_iters=steps,
        TRAIN__num_epoch=1,
        TRAIN__eval_epochs=0,
        TRAIN__disp_iter=10,
        TRAIN__checkpoint_minutes=0.5,
    )
    assert_flat(job.start("train"), lambda: job.steps() / steps)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_memory_of_an_evaluation_stays_flat(training, unbroken, tmp_path):
    images, reference = 2000, unbroken()
    file = Path(reference.cfg.DATASET.list_val)
    lines = file.read_text().splitlines()
    many = tmp_path / "many.odgt"
    many.write_text("\n".join((lines * images)[:images]) + "\n")
    scenes = Path(reference.cfg.DATASET.root_dataset)
    sizes = {image_size(scenes / str(x["fpath_img"])) for x in read_odgt(many)}
    assert len(sizes) >= 2, "an allocator has it easy with images of one size"
    command = reference.start(
        "eval",
        *("--single-process", "--out", str(tmp_path), "--keep", str(images)),
        *("DATASET.list_val", str(many)),
    )
    # The class ids of every image that is done are kept.
    assert_flat(command, lambda: len(list((tmp_path / "labels").glob("*.npy"))) / images)
