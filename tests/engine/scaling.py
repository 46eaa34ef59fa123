"""One process beside two ranks of torchrun, on one machine's CPU: the table of docs/scaling.md.

`python tests/engine/scaling.py [ROUNDS]` measures it, on an otherwise idle machine; the forms take
turns, round by round.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mit_semseg.demo import streets
from mit_semseg.engine.cpu import cpu_count

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 4  # a step, in every form
# Ranks, and TRAIN.fix_bn, without which ranks exchange statistics in every layer.
FORMS = [(ranks, fix_bn) for fix_bn in (False, True) for ranks in (1, 2)]


def measure(ranks, fix_bn, scenes, steps=8):
    """Images a second in the second epoch, and CPU seconds of the whole command."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "DIR": folder,
            "DATASET.root_dataset": scenes,
            "DATASET.classes": f"{scenes}/classes.csv",
            "DATASET.list_train": f"{scenes}/training.odgt",
            "TRAIN.precision": "bf16",
            "TRAIN.num_epoch": 2,  # the first has the start in it
            "TRAIN.epoch_iters": steps,
            "TRAIN.disp_iter": steps,
            "TRAIN.eval_epochs": 0,
            "TRAIN.ema": 0.0,
            "TRAIN.class_weights": "none",
            "TRAIN.batch_size_per_gpu": IMAGES // ranks,
            "TRAIN.fix_bn": fix_bn,
        }
        words = [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "train.py")]
        words += ["--gpus", "cpu", "--cfg", str(ROOT / "config" / "demo.yaml")]
        words += [str(word) for pair in settings.items() for word in pair]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("OMP_NUM_THREADS", None)
        subprocess.run(words, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
    images = [json.loads(line)["images_per_second"] for line in lines][-1]
    return images, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(found):
    """The rows of the page, and what follows from them."""
    rows = ["| | images/s | CPU seconds of the whole command |", "|---|---|---|"]
    for (ranks, fix_bn), runs in found.items():
        name = f"one process, {cpu_count()} threads" if ranks == 1 else f"{ranks} ranks of torchrun"
        name += f", batch {IMAGES // ranks}" + " each" * (ranks > 1)
        name += ", `TRAIN.fix_bn True`" * fix_bn
        images = ", ".join(f"{images:.1f}" for images, _ in runs)
        rows.append(f"| {name} | {images} | {', '.join(f'{cpu:.0f}' for _, cpu in runs)} |")
    for fix_bn in (False, True):
        one, two = ([images for images, _ in found[ranks, fix_bn]] for ranks in (1, 2))
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        rows.append(
            f"TRAIN.fix_bn {fix_bn}: two ranks are {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f}), with {IMAGES / statistics.median(two):.2f} "
            "s a step"
        )
    return rows


def main(rounds):
    """Measure all forms in turn, and print the table."""
    found = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        scenes = streets.write(folder, 40, 1, size=(240, 320))
        for _ in range(rounds):
            for form, runs in found.items():
                runs.append(measure(*form, scenes))
    print("\n".join(table(found)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
