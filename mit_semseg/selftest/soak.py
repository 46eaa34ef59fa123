"""The soak: the same training again and again for hours, while everything happens to it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from mit_semseg.selftest.drills import Outcome, cut_short, flip_bit, no_room
from mit_semseg.selftest.job import Ground, Job, Running

# What may happen to a run, and how often beside the others.
FAULTS = {
    "SIGKILL of the run": 4,
    "SIGKILL of a loading process": 2,
    "SIGTERM": 2,
    "full disk": 2,
    "newest state cut short": 1,
    "bit of the newest state flipped": 1,
}

# What a run has to say when it ends of it; those that are killed have no last words.
EXPECTED = {
    "SIGKILL of the run": "",
    "SIGKILL of a loading process": "ended with signal SIGKILL",
    "SIGTERM": "Stopped by SIGTERM",
    "full disk": "cannot write",
    "newest state cut short": "",
    "bit of the newest state flipped": "",
}
# The demo's training, see config/demo.yaml.
DEMO: dict[str, Any] = {
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
SCENES: dict[str, Any] = {"train": 160, "val": 32, "size": (240, 320)}


def soak(
    ground: Ground,
    hours: float,
    settings: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train, break, resume, until the time is over; every completed run must be the unbroken one.

    Args:
        ground: where to work.
        hours: how long.
        settings: of the job, as `Ground.job` takes them; otherwise the demo's training.
        say: told about every completed run.
    """
    outcome = Outcome("soak", "nothing is lost: every run ends bit-identical to the unbroken one")
    if settings is None:
        settings = {"data": ground.data(**SCENES), **DEMO}
    started = time.monotonic()
    reference = ground.unbroken(**settings)
    pace = time.monotonic() - started
    rng = random.Random(306)
    faults: Counter[str] = Counter()
    runs = starts = different = 0
    end = started + 3600 * hours
    while time.monotonic() < end or not runs:
        job = ground.job("soak", **settings)
        done = False
        while not done:
            starts += 1
            running = job.resume("TRAIN.workers", str(rng.choice((0, 1, 2))))
            what = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
            happened = time.monotonic() < end and _wait(running, rng, pace)
            happened = happened and _break(running, job, what, rng)
            finished = running.wait(3600)
            done = finished.code == 0 and "Training done" in finished.output
            faults[what] += happened
            # Until it trains, a signal ends it like any other command.
            early = "INFO] training " not in finished.output
            expected = done or (happened and (early or EXPECTED[what] in finished.output))
            outcome.check(expected, f"{what}: {finished.output[-800:]}")
            outcome.check(not finished.has_traceback, f"{what}: {finished.output[-800:]}")
            outcome.check(running.resumed(), f"it did not go on: {finished.output[:1000]}")
            outcome.check(not finished.left, f"processes left after {what}: {finished.left}")
            if not outcome.held:
                return outcome
        outcome.check(not job.was_set_aside, "a run was taken for an earlier one")
        runs += 1
        here = job.differences(reference)
        different += here
        say(
            f"{(time.monotonic() - started) / 3600:.2f} h: {runs} runs completed, {starts} starts, "
            f"{sum(faults.values())} faults, {different} differences"
        )
        outcome.check(not here, f"run {runs}: {here} tensors or figures differ")
    outcome.figures = {
        "hours": round((time.monotonic() - started) / 3600, 2),
        "runs completed": runs,
        "starts": starts,
        "tensors or figures that differ": different,
        **faults,
    }
    return outcome


def _wait(running: Running, rng: random.Random, pace: float) -> bool:
    """Some part of the time that a whole run takes; False when it is done before."""
    end = time.monotonic() + rng.random() * pace
    while time.monotonic() < end and running.process.poll() is None:
        time.sleep(0.05)
    return running.process.poll() is None


def _break(running: Running, job: Job, what: str, rng: random.Random) -> bool:
    """Do it; False when the run does not offer the occasion."""
    if running.process.poll() is not None:
        return False
    if what == "SIGKILL of a loading process":
        workers = running.children()
        if not workers:
            return False
        os.kill(rng.choice(workers), signal.SIGKILL)
    elif what == "SIGTERM":
        os.killpg(running.process.pid, signal.SIGTERM)
    elif what == "full disk":
        no_room(running)
    else:
        running.kill()
        if running.wait().code == 0:  # it was faster
            return False
        # Of two states one may be damaged: what nobody could repair is not what is tested.
        states = job.folder.states()
        if "state" in what and len(states) > 1:
            (cut_short if "cut" in what else flip_bit)(states[0], rng)
    return True
