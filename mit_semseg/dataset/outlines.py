"""Outlines of the regions of a label map, as polygons along the edges of its pixels.

Corners are corners of pixels: (0, 0) is the upper left corner of the image and (W, H) the lower
right one. A polygon contains exactly the pixels of its region whose centres lie in it, so that
rasterising it, by COCO's API or GDAL, gives the region back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np


@dataclass(frozen=True, eq=False)
class Region:
    """Pixels of one class that are connected by their sides.

    Attributes:
        label: class id.
        area: number of pixels.
        box: left, top, width and height in pixels.
        mask: (height, width) uint8 of the box, 1 in the region.
    """

    label: int
    area: int
    box: tuple[int, int, int, int]
    mask: np.ndarray

    def rings(self) -> list[np.ndarray]:
        """The outline and then those of holes, each (n, 2) int64 corners (x, y), not closed.

        Rings do not cross; those of two holes, or of a hole and the outline, may touch at a corner.
        """
        return [ring + self.box[:2] for ring in _rings(self.mask)]

    def pieces(self) -> list[np.ndarray]:
        """Outlines without holes, as in `rings`, that make up the region.

        A region with holes is cut along rows through them.
        """
        return [ring + self.box[:2] for ring in _pieces(self.mask)]


def regions(labels: np.ndarray, min_area: int = 1) -> Iterator[Region]:
    """The regions of a label map, by class and then from top to bottom.

    Args:
        labels: (H, W) class ids; negative ones are no class.
        min_area: smaller regions, in pixels, are left out.
    """
    small = labels.astype(np.int16)
    counts = np.bincount(small[small >= 0])
    for label in np.flatnonzero(counts).tolist():
        yield from _components((small == label).view(np.uint8), label, min_area)


def _components(mask: np.ndarray, label: int, min_area: int = 1) -> Iterator[Region]:
    left, top, width, height = cv2.boundingRect(mask)
    mask = mask[top : top + height, left : left + width]
    count, numbers, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    for number in range(1, count):
        x, y, w, h, area = stats[number].tolist()
        if area >= min_area:
            inside = numbers[y : y + h, x : x + w] == number
            yield Region(label, area, (left + x, top + y, w, h), inside.view(np.uint8))


def _rings(mask: np.ndarray) -> list[np.ndarray]:
    """The outline of a mask with one region, and those of its holes.

    OpenCV's contours run through the centres of pixels. Of a mask that is twice as large they run
    through one of the four quarters of each pixel, which tells the corner of the pixel.
    """
    doubled = mask.repeat(2, 0).repeat(2, 1)
    contours, family = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer = np.flatnonzero(family[0, :, 3] < 0)
    holes = np.flatnonzero(family[0, :, 3] >= 0)
    return [_corners(contours[n][:, 0]) for n in (*outer, *holes)]


def _corners(contour: np.ndarray) -> np.ndarray:
    """The corners of an outline from a contour of the doubled mask."""
    points = (contour.astype(np.int64) + 1) // 2
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns: np.ndarray = points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return turns


def _pieces(mask: np.ndarray) -> Iterator[np.ndarray]:
    for part in _components(mask, 0):
        outline, *holes = _rings(part.mask)
        if not holes:
            yield outline + part.box[:2]
            continue
        middles = sorted((hole[:, 1].min() + hole[:, 1].max() + 1) // 2 for hole in holes)
        row = int(middles[len(middles) // 2])
        for first, rows in ((0, part.mask[:row]), (row, part.mask[row:])):
            for ring in _pieces(np.ascontiguousarray(rows)):
                yield ring + (part.box[0], part.box[1] + first)


def coco_annotations(labels: np.ndarray, min_area: int = 1) -> list[dict[str, Any]]:
    """The regions as annotations of COCO, with polygons.

    Args:
        labels, min_area: as of `regions`.

    Returns:
        For each region `id`, `image_id` (1), `category_id` (class id + 1), `segmentation` (a list
        of `[x0, y0, x1, y1, ...]`; of a region with holes the pieces it is cut into), `area`,
        `bbox` ([x, y, width, height]) and `iscrowd` (0).
    """
    return [
        {
            "id": number,
            "image_id": 1,
            "category_id": region.label + 1,
            "segmentation": [ring.reshape(-1).tolist() for ring in region.pieces()],
            "area": region.area,
            "bbox": list(region.box),
            "iscrowd": 0,
        }
        for number, region in enumerate(regions(labels, min_area), 1)
    ]
