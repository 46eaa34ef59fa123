"""Rasterisation of COCO's object shapes: polygons, and plain or compressed run-length encodings.

The masks are bit-identical to those of COCO's API (pycocotools); tests compare them if it is
installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# Corners are clamped to this many image sizes outside of the image, which limits the work for
# damaged files and hardly changes the mask.
_BEYOND = 3
# Maximum characters of a compressed run length, of 5 bits each.
_MAX_CHARACTERS = 12
# Outlines are rasterised on a grid that is finer than the pixels by this factor.
_FINER = 5


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Rasterises `segmentation` of an annotation.

    Args:
        segmentation: a list of polygons, each `[x0, y0, x1, y1, ...]` in pixels; or a dict with
            `size` [height, width] and `counts`, run lengths as numbers or as COCO's string.
        height, width: size of the image.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: it has another type or size, or a corner is not a number.
    """
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), dtype=bool)
        for polygon in segmentation:
            mask |= fill_polygon(corners_of(polygon), height, width)
        return mask
    if not isinstance(segmentation, dict) or not {"counts", "size"} <= set(segmentation):
        raise ValueError(f"a segmentation is polygons or run lengths, not {segmentation!r:.60}")
    size = segmentation["size"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"run lengths of size {size!r:.60} for an image of {[height, width]}")
    counts = segmentation["counts"]
    runs = _numbers(counts) if isinstance(counts, (str, bytes)) else counts
    if not isinstance(runs, list) or not all(type(run) is int for run in runs):
        raise ValueError(f"run lengths are whole numbers or COCO's text, not {counts!r:.60}")
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"run lengths of {sum(runs)} pixels for an image of {height * width}")
    return _of_runs(runs, height, width)


def _of_runs(runs: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool from run lengths, alternately outside and inside, in column order."""
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _numbers(text: str | bytes) -> list[int]:
    """Run lengths from COCO's string: 5 bits per character; from the fourth on, differences to the
    last but one."""
    codes = text.encode("ascii", "replace") if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > 5 * _MAX_CHARACTERS:
            raise ValueError("a run length is larger than any image; the string is damaged")
        if bits & 32:  # the number continues
            continue
        if bits & 16:  # it is negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def corners_of(polygon: Any) -> np.ndarray:
    """(n, 2) float64, x and y of each corner."""
    if not isinstance(polygon, list):
        raise ValueError(f"a polygon is a list [x0, y0, x1, y1, ...], not {polygon!r:.60}")
    if len(polygon) % 2:
        raise ValueError(f"a polygon has an x and a y for each corner, not {len(polygon)} numbers")
    for number in polygon:
        if type(number) not in (int, float) or not abs(number) <= sys.float_info.max:
            raise ValueError(f"a corner of a polygon is at {number!r:.60}, which is not a number")
    return np.array(polygon, dtype=np.float64).reshape(-1, 2)


def fill_polygon(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool of one filled polygon, from the x and y of its corners, (n, 2) float64.

    A run starts or ends where the outline, on the finer grid, crosses the middle of a column of
    pixels.
    """
    if len(corners) < 3:  # no area
        return np.zeros((height, width), dtype=bool)
    size = np.array([width, height])
    x, y = _outline(np.clip(corners, -_BEYOND * size, (1 + _BEYOND) * size))
    steps = np.flatnonzero(np.diff(x))
    column, row = ((np.minimum(z[steps], z[steps + 1]) + 0.5) / _FINER - 0.5 for z in (x, y))
    middle = (column == np.floor(column)) & (column >= 0) & (column < width)
    crossings = (column * height + np.ceil(np.clip(row, 0, height)))[middle].astype(np.int64)
    bounds = np.concatenate([[0], np.sort(crossings), [height * width]])
    return _of_runs(np.diff(bounds), height, width)


def _outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the points of the closed outline on the finer grid, in order."""
    grid = np.trunc(_FINER * corners + 0.5).astype(np.int64)
    sides = zip(grid.tolist(), np.roll(grid, -1, axis=0).tolist(), strict=True)
    x, y = np.concatenate([_line(*start, *end) for start, end in sides], axis=1)
    return x, y


def _line(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """(2, n) points from start to end inclusive, at unit steps along the longer side."""
    across = abs(x1 - x0) >= abs(y1 - y0)
    # Always computed from the lower end, so that rounding does not depend on the direction.
    (a0, b0), (a1, b1) = ((x0, y0), (x1, y1)) if across else ((y0, x0), (y1, x1))
    back = a0 > a1
    if back:
        (a0, b0), (a1, b1) = (a1, b1), (a0, b0)
    steps = np.arange(a1 - a0 + 1)
    slope = (b1 - b0) / (a1 - a0) if a1 > a0 else 0.0
    along = a0 + steps
    aside = np.trunc(b0 + slope * steps + 0.5).astype(np.int64)
    points = np.stack([along, aside] if across else [aside, along])
    return points[:, ::-1] if back else points
