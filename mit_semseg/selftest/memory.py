"""Memory over time: what a long job holds at its end beside what it held at its beginning."""

from __future__ import annotations

import math
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
    steps = 80 if quick else 2000
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
    outcome = Outcome(name, f"it grows by less than {NOISE_MIB:g} MiB after the first quarter")
    samples: list[tuple[float, float]] = []  # share of the job that is done, MiB
    while running.process.poll() is None:
        done = _done(running)
        if done:
            samples.append((done, sum(map(proportional_mib, running.members()))))
        time.sleep(0.1)
    finished = running.wait()
    outcome.check(not finished.code, finished.output[-500:])
    early = _median(samples, 0.25, 0.5)
    late = _median(samples, 0.75, 0.98)
    outcome.check(late - early < NOISE_MIB, f"it grew by {late - early:.1f} MiB")
    outcome.figures = {
        "second quarter in MiB": round(early, 1),
        "last quarter in MiB": round(late, 1),
        "growth in MiB": round(late - early, 1),
        "peak in MiB": round(max((mib for _, mib in samples), default=0.0), 1),
    }
    return outcome


def _median(samples: list[tuple[float, float]], start: float, end: float) -> float:
    chosen = [mib for done, mib in samples if start <= done <= end]
    return statistics.median(chosen) if chosen else math.nan


def _done(running: Running) -> float:
    """What the last bar says is done, from 0 to 1."""
    counts = re.findall(r"(\d+)/(\d+) \[", running.text()[-2000:])
    return int(counts[-1][0]) / int(counts[-1][1]) if counts else 0.0


def proportional_mib(pid: int) -> float:
    """Memory that a process has filled, shared pages divided among those who share them; 0 when
    it is gone. Pages of files, such as torch's libraries, are left out: their shares change
    whenever any other process that uses torch comes or goes."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    filled = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)
    # Kernels before 5.3 know the sum alone.
    return sum(map(int, filled or re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE))) / 1024
