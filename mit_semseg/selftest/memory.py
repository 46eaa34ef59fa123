"""Memory over time: what a long job holds at its end beside what it held at its beginning."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path

from mit_semseg.selftest.drills import Outcome
from mit_semseg.selftest.job import Ground, Running

# Growth between the second and the last quarter of a job that may be noise.
NOISE_MIB = 32.0


def training(ground: Ground, quick: bool) -> Outcome:
    """A training of many steps."""
    steps = 200 if quick else 2000
    job = ground.job(
        "training_memory",
        TRAIN__epoch_iters=steps,
        TRAIN__num_epoch=1,
        TRAIN__eval_epochs=0,
        TRAIN__checkpoint_minutes=0.5,
    )
    return _flat(job.start("train"), f"training memory over {steps} steps")


def evaluation(ground: Ground, quick: bool) -> Outcome:
    """An evaluation of many images, of different sizes."""
    images = 200 if quick else 2000
    reference = ground.unbroken()
    job = ground.job("evaluation_memory")
    lines = Path(job.cfg.DATASET.list_val).read_text().splitlines()
    many = job.file.with_suffix(".odgt")
    many.write_text("\n".join((lines * images)[:images]) + "\n")
    running = job.start(
        "eval",
        "--single-process",
        *("DATASET.list_val", str(many), "VAL.checkpoint", f"{reference.cfg.DIR}/best.pth"),
    )
    return _flat(running, f"evaluation memory over {images} images")


def _flat(running: Running, name: str) -> Outcome:
    outcome = Outcome(name, f"it grows by less than {NOISE_MIB:g} MiB from the second quarter on")
    samples: list[float] = []
    while running.process.poll() is None:
        samples.append(sum(map(proportional_mib, running.members())))
        time.sleep(0.1)
    finished = running.wait()
    outcome.check(not finished.code, finished.output[-500:])
    # The first quarter is the start; the last samples see processes end.
    working = samples[: int(0.97 * len(samples))]
    quarter = len(working) // 4
    early = statistics.median(working[quarter : 2 * quarter])
    late = statistics.median(working[-quarter:])
    outcome.check(late - early < NOISE_MIB, f"it grew by {late - early:.1f} MiB")
    outcome.figures = {
        "second quarter in MiB": round(early, 1),
        "last quarter in MiB": round(late, 1),
        "growth in MiB": round(late - early, 1),
        "peak in MiB": round(max(samples), 1),
    }
    return outcome


def proportional_mib(pid: int) -> float:
    """Memory of a process, shared pages divided among those who share them; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
