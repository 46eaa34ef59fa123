"""A canvas that draws an image and its label map together, and the camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Points = NDArray[np.float64]

IGNORED = -1
SAMPLES = 3  # per side of a pixel; odd, so that one is in the centre
NEAR, FAR = 1.3, 90.0  # metres: clipping distances
_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates


class Canvas:
    """An image and its label map, drawn together."""

    def __init__(self, height: int, width: int) -> None:
        self.image = np.zeros((height * SAMPLES, width * SAMPLES, 3), np.uint8)
        self.label = np.zeros((height * SAMPLES, width * SAMPLES), np.uint8)

    def fill(self, points: Points, colour: Colour, cls: int) -> None:
        """Draws a polygon, points (N, 2) as x, y in pixels, on image and labels."""
        outline = _fixed(points)
        tint = [min(max(c, 0.0), 255.0) for c in colour]
        cv2.fillPoly(self.image, [outline], tint, shift=_SHIFT)
        cv2.fillPoly(self.label, [outline], [cls + 1], shift=_SHIFT)

    def glaze(self, points: Points, colour: Colour, alpha: float, blur: float = 0.0) -> None:
        """Tints the image inside a polygon (shadow, glow, reflection); labels do not change."""
        pad = 3.0 * blur + 1.0
        size = np.array(self.image.shape[1::-1]) // SAMPLES
        low = np.floor(points.min(axis=0) - pad).clip(0, size).astype(int)
        high = np.ceil(points.max(axis=0) + pad).clip(0, size).astype(int)
        (x0, y0), (x1, y1) = low * SAMPLES, high * SAMPLES
        part: NDArray[Any] = self.image[y0:y1, x0:x1]
        if part.size == 0:
            return
        scale = SAMPLES if blur < 1 else 1  # blurred polygons need no supersampling
        width, height = (high - low) * scale
        mask: NDArray[Any] = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [_fixed(points - low, scale)], [255], shift=_SHIFT)
        if blur > 0:
            mask = cv2.GaussianBlur(mask, (0, 0), blur * scale)
        if scale != SAMPLES:
            mask = cv2.resize(mask, part.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        weight = mask[..., None].astype(np.float32) * (alpha / 255.0)
        part[:] = np.rint(part + (np.array(colour, np.float32) - part) * weight).clip(0, 255)


def _fixed(points: Points, scale: int = SAMPLES) -> NDArray[np.int32]:
    """Pixel coordinates -> OpenCV's fixed point on a grid of `scale` samples, clipped."""
    samples = np.clip(points * scale - 0.5, -16000, 16000)
    return np.rint(samples * (1 << _SHIFT)).astype(np.int32)


@dataclass(frozen=True)
class View:
    """The camera, and the curvature of the street."""

    focal: float  # pixels
    centre: float  # pixels, x of the vanishing point
    horizon: float  # pixels
    height: float  # metres above the road
    x: float  # metres right of the road's middle
    bend: float  # 1 / metres: the street is displaced by bend * z^2

    def __call__(self, world: Sequence[Sequence[float]] | Points) -> Points:
        """Points (N, 3) in metres -> (N, 2) in pixels; z is clipped in front of the camera."""
        x, y, z = np.asarray(world, np.float64).T
        z = np.maximum(z, NEAR)
        right = x - self.x + self.bend * z**2
        return np.stack(
            [
                self.centre + self.focal * right / z,
                self.horizon + self.focal * (self.height - y) / z,
            ],
            axis=1,
        )


def disc(x: float, y: float, radius: float, flat: float = 1.0, n: int = 20) -> Points:
    """A circle, or an ellipse `flat` times as high as wide, as a polygon in the plane."""
    return _circle(n) * (radius, radius * flat) + (x, y)


@cache
def _circle(n: int) -> Points:
    turn = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def capsule(a: Sequence[float], b: Sequence[float], ra: float, rb: float) -> Points:
    """The convex hull of two circles around `a` and `b`."""
    both = np.concatenate([disc(a[0], a[1], ra, n=12), disc(b[0], b[1], rb, n=12)])
    return cv2.convexHull(both.astype(np.float32))[:, 0].astype(np.float64)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    return (
        a[0] + (b[0] - a[0]) * share,
        a[1] + (b[1] - a[1]) * share,
        a[2] + (b[2] - a[2]) * share,
    )


def times(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)
