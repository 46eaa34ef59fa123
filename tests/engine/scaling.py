"""One process beside two ranks of torchrun, on one machine's CPU: the table of docs/scaling.md.

`python tests/engine/scaling.py [ROUNDS]` measures it, on an otherwise idle machine; the forms take
turns, round by round.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mit_semseg.demo import streets
from mit_semseg.engine.cpu import cpu_count

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8  # of an epoch, of which there are two; the first has the start in it
IMAGES = 4  # a step, in every form


@dataclass(frozen=True)
class Form:
    """One way to run the same training.

    Attributes:
        ranks: processes of torchrun; 1 is a plain process with all the cores.
        fix_bn: TRAIN.fix_bn, without which ranks exchange statistics in every layer.
    """

    ranks: int
    fix_bn: bool

    @property
    def name(self) -> str:
        what = (
            f"one process, {cpu_count()} threads, batch {IMAGES}"
            if self.ranks == 1
            else f"{self.ranks} ranks of torchrun, batch {IMAGES // self.ranks} each"
        )
        return what + ", `TRAIN.fix_bn True`" * self.fix_bn

    def command(self, recipe: Sequence[str]) -> list[str]:
        launch = (
            [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            + ["--nproc-per-node", str(self.ranks)]
            if self.ranks > 1
            else [sys.executable]
        )
        settings = ["TRAIN.batch_size_per_gpu", str(IMAGES // self.ranks)]
        settings += ["TRAIN.fix_bn", str(self.fix_bn)]
        return [*launch, str(ROOT / "train.py"), "--gpus", "cpu", *recipe, *settings]


FORMS = [Form(ranks, fix_bn) for fix_bn in (False, True) for ranks in (1, 2)]


@dataclass(frozen=True)
class Measured:
    """Images a second in the second epoch, and CPU seconds of the whole command."""

    images: float
    cpu: float


def measure(form: Form, scenes: Path, steps: int = STEPS) -> Measured:
    """Run one form once."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = ["--cfg", str(ROOT / "config" / "demo.yaml"), "DIR", folder]
        recipe += ["DATASET.root_dataset", str(scenes), "DATASET.classes", f"{scenes}/classes.csv"]
        recipe += ["DATASET.list_train", f"{scenes}/training.odgt", "TRAIN.precision", "bf16"]
        recipe += ["TRAIN.num_epoch", "2", "TRAIN.epoch_iters", str(steps), "TRAIN.ema", "0.0"]
        recipe += ["TRAIN.disp_iter", str(steps), "TRAIN.eval_epochs", "0"]
        recipe += ["TRAIN.class_weights", "none"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(
            form.command(recipe), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{form.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [record for line in lines if (record := json.loads(line))["kind"] == "train"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(records[-1]["images_per_second"], cpu)


def table(found: Mapping[Form, Sequence[Measured]]) -> list[str]:
    """The rows of the page, and what follows from them."""
    rows = ["| | images/s | CPU seconds of the whole command |", "|---|---|---|"]
    for form, runs in found.items():
        images = ", ".join(f"{run.images:.1f}" for run in runs)
        rows.append(f"| {form.name} | {images} | {', '.join(f'{run.cpu:.0f}' for run in runs)} |")
    seconds = {}
    for fix_bn in (False, True):
        one, two = (found[Form(ranks, fix_bn)] for ranks in (1, 2))
        ratios = [b.images / a.images for a, b in zip(one, two, strict=True)]
        rows.append(
            f"TRAIN.fix_bn {fix_bn}: two ranks are {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
        seconds[fix_bn] = statistics.median(IMAGES / run.images for run in two)
    rows.append(
        f"a step of two ranks takes {seconds[False]:.2f} s, with TRAIN.fix_bn {seconds[True]:.2f} s"
    )
    return rows


def main(rounds: int) -> None:
    """Measure all forms in turn, and print the table."""
    found: dict[Form, list[Measured]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        scenes = streets.write(folder, 40, 1, size=(240, 320))
        for number in range(rounds):
            for form, runs in found.items():
                began = time.monotonic()
                runs.append(measure(form, scenes))
                took = time.monotonic() - began
                print(f"{number + 1}/{rounds} {form.name}: {took:.0f} s", file=sys.stderr)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
