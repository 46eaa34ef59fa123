"""Prediction of rasters that do not fit into memory, window by window (`DATASET.bands`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from mit_semseg import scores
from mit_semseg.config import DataOptions
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.rasters import Block, RasterFile, missing_pixels, write_labels
from mit_semseg.engine.predict_report import Result
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.transfer import Stopwatch
from mit_semseg.models.tiles import spans
from mit_semseg.visualize.results import class_counts

# Rasters with more pixels are computed by windows of this side, of which neighbours overlap. Of the
# overlap each keeps its half.
PIXELS, SIDE, OVERLAP = 1 << 24, 2048, 256


def needs_windows(size: tuple[int, int], options: DataOptions) -> bool:
    """Whether an image of (width, height) pixels is computed by windows.

    Only at its own size or factors of it: others are resized to what fits into memory.
    """
    own = bool(options.scales) or options.imgSizes == (0,)
    return bool(options.bands) and own and math.prod(size) > PIXELS


def predict_by_windows(
    predictor: Predictor,
    path: Path,
    outputs: dict[str, Path],
    classes: ClassTable,
    options: DataOptions,
) -> Result:
    """Write the class ids of a raster, of which one window at a time is in memory.

    Each window is an image of its own: it has its own pools and attention, and is computed in tiles
    if it is large.

    Args:
        predictor: of a model with `bands`.
        path: the raster.
        outputs: kind -> file.
        classes: names and colours.
        options: `DATASET` with `imgSizes` 0 or `scales`.

    Returns:
        What `predict` does for an image.

    Raises:
        ValueError: the raster is damaged, or another kind than index is wanted.
        OSError: the file cannot be written.
    """
    watch = Stopwatch(predictor.device)
    counts = np.zeros(len(classes), dtype=np.int64)
    with RasterFile(path, options) as file:
        if others := [kind for kind in outputs if kind != "index"]:
            raise ValueError(
                f"{path}: {file.size[0]}x{file.size[1]} pixels are predicted by windows, without "
                f"{', '.join(others)}: set TEST.save index"
            )

        def parts() -> Iterator[tuple[Block, np.ndarray]]:
            for seen, kept in _windows(file.size, options.padding_constant):
                labels = _labels(predictor, file.pixels(seen), len(classes))
                left, top = kept[0] - seen[0], kept[1] - seen[1]
                labels = labels[top : top + kept[3], left : left + kept[2]]
                counts[:] += class_counts(labels, len(classes))
                yield kept, labels

        outputs["index"].parent.mkdir(parents=True, exist_ok=True)
        write_labels(outputs["index"], path, classes.colors, options.label_offset, parts())
    shares = sorted(zip(counts / math.prod(file.size), classes.names), reverse=True)
    seconds = watch.stop().seconds()
    return {
        "image": str(path),
        "size": file.size,
        "areas": {name: float(share) for share, name in shares if share},
        "seconds": seconds,
        "scales": [(*file.size, seconds)],
        "outputs": {kind: str(output) for kind, output in outputs.items()},
    }


def _windows(size: tuple[int, int], multiple: int) -> Iterator[tuple[Block, Block]]:
    """What is computed and what is kept of it, row by row; the kept blocks are the raster."""
    grid = math.lcm(32, multiple)
    side, overlap = (max(n // grid, least) * grid for n, least in ((SIDE, 2), (OVERLAP, 1)))
    axes = [spans(length, side, overlap, grid) for length in size]
    kept = []
    for length, axis in zip(size, axes):
        cuts = [0, *((a[1] + b[0]) // 2 for a, b in zip(axis, axis[1:])), length]
        kept.append(list(zip(cuts, cuts[1:])))
    for i, j in product(range(len(axes[1])), range(len(axes[0]))):
        seen, inner = (
            (x[0], y[0], x[1] - x[0], y[1] - y[0])
            for x, y in ((axes[0][j], axes[1][i]), (kept[0][j], kept[1][i]))
        )
        yield seen, inner


def _labels(predictor: Predictor, image: np.ndarray, num_class: int) -> np.ndarray:
    """(h, w) int32 class ids, -1 where the image has no value."""
    missing = missing_pixels(image)
    if missing.all():
        return np.full(missing.shape, -1, dtype=np.int32)
    logits = predictor.logits(predictor.scales(image))
    labels = predictor.labels(logits, missing.shape, scores.label_dtype(num_class))
    found = labels[0].cpu().numpy().astype(np.int32)
    found[missing] = -1
    return found
