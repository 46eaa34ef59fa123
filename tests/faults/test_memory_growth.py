"""What a long job holds at its end beside what it held at its beginning."""

import math
import statistics
import sys
import time
from pathlib import Path

import pytest

from mit_semseg.dataset.images import image_size
from mit_semseg.dataset.records import read_odgt

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux"),
]

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


def test_training(training):
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


def test_evaluation(training, unbroken, tmp_path):
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
