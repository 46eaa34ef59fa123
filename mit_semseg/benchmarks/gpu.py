"""Rows of `mit-semseg bench --device cuda`, with a time limit of four minutes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mit_semseg.benchmarks.files import Evaluating, FolderPrediction
from mit_semseg.benchmarks.peers import SIZE, peers
from mit_semseg.benchmarks.rows import (
    HEIGHT,
    SCALES,
    WIDTH,
    ClassMap,
    Counting,
    FasterPrecision,
    LargeClassMap,
    Prediction,
    Row,
    SyncBatchNorm,
)
from mit_semseg.benchmarks.training import NewShapes, Replicas, TrainStep

PUBLISHED = "published: fp32, TF32 convolutions"
MOBILENET: dict[str, Any] = {"encoder": "mobilenetv2dilated", "decoder": "c1_deepsup"}
RESNET: dict[str, Any] = {"encoder": "resnet50dilated", "decoder": "ppm_deepsup"}
UPERNET: dict[str, Any] = {"encoder": "resnet50", "decoder": "upernet"}
HRNET: dict[str, Any] = {"encoder": "hrnetv2", "decoder": "c1"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the workloads, which tests reduce.

    Attributes:
        image: height and width of predicted images.
        large: height and width of the largest class map.
        scales: short sides.
        batch: images, height and width of a training step.
        shapes: number of new shapes to train on.
        folder: height and width of image files.
        files: number of files of the shorter run, and maximum of the longer one.
        scale: short side of these at the network's input; 0: as configured.
        peer: height and width for the comparison with other toolkits.
        burst: seconds of consecutive calls that are timed together.
        shorten: divisor of time budgets.
    """

    image: tuple[int, int] = (HEIGHT, WIDTH)
    large: tuple[int, int] = (4000, 6000)
    scales: tuple[int, ...] = SCALES
    batch: tuple[int, int, int] = (8, 448, 608)
    shapes: int = 60
    folder: tuple[int, int] = (360, 480)
    files: tuple[int, int] = (16, 480)
    scale: int = 0
    peer: tuple[int, int] = SIZE
    burst: float = 0.25
    shorten: float = 1.0


FULL = Sizes()


def gpu_rows(sizes: Sizes = FULL) -> list[Row]:
    """The rows in order of importance: the last are skipped if time is short."""
    count = sizes.batch[0]
    one = (min(sizes.image),)
    scores = partial(ClassMap, size=sizes.image, limit_mib=64, budget=5)
    prediction = partial(Prediction, size=sizes.image, precision="bf16", budget=6)
    less = partial(FasterPrecision, target=1.5, size=sizes.image, scales=one, budget=6)
    training: dict[str, Any] = {
        "precision": "bf16",
        "batch": sizes.batch,
        "images": count,
        "repeats": 6,
        "budget": 10,
    }
    new = partial(
        NewShapes,
        precision="bf16",
        count=count,
        images=count,
        shapes=sizes.shapes,
        scales=sizes.scales,
        budget=26,
    )
    files: dict[str, Any] = {
        "size": sizes.folder,
        "few": sizes.files[0],
        "most": sizes.files[1],
        "scale": sizes.scale,
        "budget": 14,
    }
    rows = [
        scores(target=6, scales=sizes.scales),
        scores(target=5, scales=one),
        prediction(target=6, scales=sizes.scales, **RESNET),
        prediction(target=8, scales=sizes.scales, **MOBILENET),
        prediction(scales=sizes.scales, **UPERNET),
        prediction(scales=sizes.scales, **HRNET),
        less(precision="bf16", **RESNET),
        less(precision="bf16", **MOBILENET),
        TrainStep(**training, **RESNET),
        TrainStep(**training, **MOBILENET),
        new(rate=260, **RESNET),
        new(**MOBILENET),
        Replicas(**{**training, "images": 2 * count}, **RESNET),
        FolderPrediction(rate=90, **files),
        Evaluating(**files),
        prediction(scales=one, **RESNET),
        prediction(scales=one, **MOBILENET),
        prediction(scales=one, **UPERNET),
        prediction(scales=one, **HRNET),
        LargeClassMap(size=sizes.large, scales=(min(sizes.large),), repeats=1, budget=3),
        Counting(target=10, budget=3),
        SyncBatchNorm(budget=5),
    ]
    return [_on_gpu(row, sizes) for row in rows]


def gpu_peers(sizes: Sizes = FULL) -> list[Row]:
    """Comparisons with other toolkits, in the precisions used on a GPU."""
    rows = [replace(row, size=sizes.peer, budget=6) for row in peers(("bf16", "tf32"))]
    return [_on_gpu(row, sizes) for row in rows]


def _on_gpu(row: Row, sizes: Sizes) -> Row:
    baseline = PUBLISHED if row.baseline == "published" else row.baseline
    return replace(row, baseline=baseline, budget=row.budget / sizes.shorten, burst=sizes.burst)
