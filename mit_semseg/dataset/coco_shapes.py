"""Shapes of COCO's objects as masks: polygons, and run lengths, plain or compressed.

Written after the description of the formats in COCO's own API (pycocotools), whose masks these
equal bit for bit; the tests compare them where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# Corners farther outside of the image than this many times its size are moved there: what is in it
# hardly changes, and an outline is as long as the image is large, whatever a file says.
_BEYOND = 3
# Characters of one run length in COCO's text: 5 bits each, so more than any image has pixels.
_LONGEST = 12
# Outlines are drawn on a grid this much finer than pixels.
_FINER = 5


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask of `segmentation` in an annotation.

    Args:
        segmentation: a list of polygons, each `[x0, y0, x1, y1, ...]` in pixels; or a dict with
            `size` [height, width] and `counts`, run lengths as numbers or as COCO's text.
        height, width: of the image.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: it is none of them, of another size, or has a corner that is no number.
    """
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), dtype=bool)
        for polygon in segmentation:
            mask |= _polygon(_corners(polygon), height, width)
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
    """(height, width) bool of run lengths: in turn outside and inside, down the columns."""
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _numbers(text: str | bytes) -> list[int]:
    """Run lengths from text: 5 bits a character; from the fourth on, added to the last but one."""
    codes = text.encode("ascii", "replace") if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > 5 * _LONGEST:
            raise ValueError("a run length is longer than any image; the text is damaged")
        if bits & 32:  # there is more of this number
            continue
        if bits & 16:  # it is negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _corners(polygon: Any) -> np.ndarray:
    """(n, 2) float64, x and y of each corner."""
    if not isinstance(polygon, list):
        raise ValueError(f"a polygon is a list [x0, y0, x1, y1, ...], not {polygon!r:.60}")
    if len(polygon) % 2:
        raise ValueError(f"a polygon has an x and a y for each corner, not {len(polygon)} numbers")
    for number in polygon:
        if type(number) not in (int, float) or not abs(number) <= sys.float_info.max:
            raise ValueError(f"a corner of a polygon is at {number!r:.60}, which is no number")
    return np.array(polygon, dtype=np.float64).reshape(-1, 2)


def _polygon(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool of one outline, filled.

    Where the outline, on the finer grid, steps over the middle of a column of pixels, it begins or
    ends a run there: each crossing turns over all pixels after it, down the columns.
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
    """Points of the closed outline on the finer grid, one step apart, in order: x and y."""
    grid = np.trunc(_FINER * corners + 0.5).astype(np.int64)
    sides = zip(grid.tolist(), np.roll(grid, -1, axis=0).tolist(), strict=True)
    x, y = np.concatenate([_line(*start, *end) for start, end in sides], axis=1)
    return x, y


def _line(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """(2, n) points from start to end, both included, a step apart along the longer side."""
    across = abs(x1 - x0) >= abs(y1 - y0)
    # Computed from the lower end, whichever comes first, so that rounding is the same both ways.
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
