"""Procedurally drawn street scenes with exact labels: a small data set that needs no download.

A scene is a street in one-point perspective. Everything in it is a polygon in metres, projected by
one camera and painted from far to near, on a picture and on a label map of `SAMPLES` x `SAMPLES`
samples a pixel. The picture is the average of a pixel's samples, hence antialiased; the label is
the sample in its middle, hence exact and never a mixture. What shows of the car that carries the
camera is stored as 0, the ignored value, as road-scene data sets do.

World coordinates, metres: x to the right of the road's middle, y up, z away from the camera.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Points = NDArray[np.float64]

# Name and display colour of every class; its place here is its id, the stored value is id + 1.
CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (126, 182, 232)),
    ("building", (132, 112, 142)),
    ("road", (74, 78, 92)),
    ("marking", (240, 236, 214)),
    ("pavement", (214, 166, 128)),
    ("vegetation", (104, 158, 78)),
    ("car", (44, 84, 196)),
    ("pedestrian", (222, 54, 82)),
    ("pole", (150, 226, 216)),
    ("sign", (246, 196, 48)),
)
SKY, BUILDING, ROAD, MARKING, PAVEMENT, VEGETATION, CAR, PEDESTRIAN, POLE, SIGN = range(
    len(CLASSES)
)
IGNORED = -1

SAMPLES = 3  # a side of a pixel; odd, so that one sample lies in the middle
_NEAR, _FAR = 1.3, 90.0  # metres: nothing is drawn nearer, the ground ends there
_SHIFT = 4  # fractional bits of OpenCV's polygon coordinates

# Every class has colours of its own, more or less: a model has minutes to learn them.
_WALLS: tuple[Colour, ...] = (
    (176, 96, 74), (208, 176, 132), (226, 206, 172), (170, 140, 120), (196, 126, 88),
    (212, 160, 142), (140, 100, 92), (222, 190, 120),
)  # fmt: skip
_ROOFS: tuple[Colour, ...] = ((110, 62, 50), (88, 70, 72), (142, 84, 60), (104, 78, 72))
_AWNINGS: tuple[Colour, ...] = ((136, 58, 48), (92, 66, 52), (120, 92, 60), (236, 222, 190))
_PAINTS: tuple[Colour, ...] = (
    (204, 24, 32), (22, 64, 176), (240, 240, 244), (20, 96, 150), (150, 20, 40), (90, 150, 214),
    (24, 34, 92),
)  # fmt: skip
_CLOTHES: tuple[Colour, ...] = (
    (255, 128, 24), (252, 214, 50), (240, 60, 160), (176, 56, 196), (255, 96, 96),
)  # fmt: skip
_SKINS: tuple[Colour, ...] = ((240, 200, 170), (206, 152, 112), (150, 100, 70), (96, 64, 48))
_LEAVES: tuple[Colour, ...] = (
    (72, 128, 48), (58, 112, 54), (98, 146, 50), (84, 130, 60), (70, 120, 40), (176, 158, 40),
)  # fmt: skip
_STEEL: tuple[Colour, ...] = ((30, 92, 98), (36, 80, 92))


@dataclass(frozen=True)
class _Mood:
    """Weather and time of day: how sky, light and air look."""

    zenith: Colour
    horizon: Colour
    light: Colour
    haze: float  # share of the horizon's colour gained per metre
    contrast: float  # of sunlit against shaded faces, in [0, 1]
    clouds: int
    cloud: Colour
    lit: float = 0.0  # share of windows with a lamp behind them
    rain: bool = False


_MOODS: tuple[_Mood, ...] = (
    _Mood((58, 122, 206), (186, 216, 240), (1.03, 1.02, 1.0), 0.003, 1.0, 5, (250, 252, 255)),
    _Mood((88, 150, 220), (206, 228, 242), (1.0, 1.0, 1.0), 0.004, 0.7, 9, (248, 249, 250)),
    _Mood((98, 124, 178), (252, 204, 142), (1.08, 0.94, 0.78), 0.006, 1.0, 5, (255, 226, 186)),
    _Mood((158, 168, 180), (206, 211, 215), (0.9, 0.92, 0.95), 0.009, 0.2, 9, (186, 192, 199)),
    _Mood((196, 203, 209), (224, 227, 228), (0.94, 0.95, 0.96), 0.016, 0.1, 0, (224, 226, 228)),
    _Mood((112, 124, 138), (166, 174, 181), (0.74, 0.78, 0.84), 0.013, 0.1, 9, (134, 143, 154),
          0.25, True),
    _Mood((34, 40, 88), (226, 138, 116), (0.62, 0.56, 0.68), 0.005, 0.4, 5, (148, 92, 118), 0.55),
)  # fmt: skip


class _Canvas:
    """A picture and its label map under the same brush."""

    def __init__(self, height: int, width: int) -> None:
        self.image = np.zeros((height * SAMPLES, width * SAMPLES, 3), np.uint8)
        self.label = np.zeros((height * SAMPLES, width * SAMPLES), np.uint8)

    def fill(self, points: Points, colour: Colour, cls: int) -> None:
        """Paint a polygon, points (N, 2) as x, y in pixels, on picture and labels."""
        outline = _fixed(points)
        tint = [min(max(c, 0.0), 255.0) for c in colour]
        cv2.fillPoly(self.image, [outline], tint, shift=_SHIFT)
        cv2.fillPoly(self.label, [outline], [cls + 1], shift=_SHIFT)

    def glaze(self, points: Points, colour: Colour, alpha: float, blur: float = 0.0) -> None:
        """Tint the picture inside a polygon (shadow, glow, reflection); labels stay."""
        pad = 3.0 * blur + 1.0
        size = np.array(self.image.shape[1::-1]) // SAMPLES
        low = np.floor(points.min(axis=0) - pad).clip(0, size).astype(int)
        high = np.ceil(points.max(axis=0) + pad).clip(0, size).astype(int)
        (x0, y0), (x1, y1) = low * SAMPLES, high * SAMPLES
        part: NDArray[Any] = self.image[y0:y1, x0:x1]
        if part.size == 0:
            return
        scale = SAMPLES if blur < 1 else 1  # what is soft needs no fine samples
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
    """Pixel coordinates to OpenCV's fixed point on a grid of `scale` samples, kept in its range."""
    samples = np.clip(points * scale - 0.5, -16000, 16000)
    return np.rint(samples * (1 << _SHIFT)).astype(np.int32)


@dataclass(frozen=True)
class _View:
    """The camera, and the bend of the street it looks along."""

    focal: float  # pixels
    centre: float  # pixels, x of the vanishing point
    horizon: float  # pixels
    height: float  # metres above the road
    x: float  # metres right of the road's middle
    bend: float  # 1 / metres: the street is displaced by bend * z^2

    def __call__(self, world: Sequence[Sequence[float]] | Points) -> Points:
        """Points (N, 3) in metres to (N, 2) in pixels; z is kept from passing the camera."""
        x, y, z = np.asarray(world, np.float64).T
        z = np.maximum(z, _NEAR)
        right = x - self.x + self.bend * z**2
        return np.stack(
            [
                self.centre + self.focal * right / z,
                self.horizon + self.focal * (self.height - y) / z,
            ],
            axis=1,
        )


def _disc(x: float, y: float, radius: float, flat: float = 1.0, n: int = 20) -> Points:
    """A circle, or an ellipse `flat` times as high as wide, as a polygon in the plane."""
    return _circle(n) * (radius, radius * flat) + (x, y)


@cache
def _circle(n: int) -> Points:
    turn = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _limb(a: Sequence[float], b: Sequence[float], ra: float, rb: float) -> Points:
    """The hull of two circles around `a` and `b`: an arm, a leg, a pole's arm."""
    both = np.concatenate([_disc(a[0], a[1], ra, n=12), _disc(b[0], b[1], rb, n=12)])
    return cv2.convexHull(both.astype(np.float32))[:, 0].astype(np.float64)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return (
        a[0] + (b[0] - a[0]) * share,
        a[1] + (b[1] - a[1]) * share,
        a[2] + (b[2] - a[2]) * share,
    )


def _times(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


@dataclass
class _Street:
    """One scene: draws its parts, each a method, onto a canvas."""

    rng: np.random.Generator
    height: int
    width: int
    canvas: _Canvas = field(init=False)
    # What stands on the ground: (distance, painter), to be painted from far to near.
    things: list[tuple[float, Callable[[], None]]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.canvas = _Canvas(self.height, self.width)
        self.mood = _MOODS[rng.choice(len(_MOODS), p=[0.25, 0.23, 0.16, 0.12, 0.07, 0.07, 0.1])]
        self.sun = 1.0 if rng.random() < 0.5 else -1.0  # on the right or on the left
        self.road = rng.uniform(3.4, 5.0)  # half the road's width
        self.paving = rng.uniform(2.8, 4.2)
        self.verge = rng.uniform(1.0, 2.2) if rng.random() < 0.35 else 0.0
        self.view = _View(
            focal=rng.uniform(0.8, 1.0) * (self.height + self.width) / 2,
            centre=self.width * rng.uniform(0.32, 0.68),
            horizon=self.height * rng.uniform(0.4, 0.52),
            height=rng.uniform(1.5, 2.6),
            x=rng.uniform(-0.75, 0.75) * self.road,
            bend=rng.uniform(-0.0022, 0.0022),
        )
        self.crossing = rng.uniform(15, 32) if rng.random() < 0.4 else None
        self.crossing_width = rng.uniform(6, 9)

    # ----------------------------------------------------------------- brushes

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, colours: Sequence[Colour], spread: float = 10.0) -> Colour:
        """One of the colours, a little off it."""
        r, g, b = np.clip(
            np.array(colours[int(self.rng.integers(len(colours)))]) + self.rng.normal(0, spread, 3),
            0,
            255,
        )
        return (float(r), float(g), float(b))

    def tone(self, colour: Colour, z: float, light: float = 1.0) -> Colour:
        """A colour as it looks at distance `z` under the scene's light and air."""
        mood = self.mood
        factor = 1.0 + (light - 1.0) * (0.4 + 0.6 * mood.contrast)
        lit = (
            colour[0] * factor * mood.light[0],
            colour[1] * factor * mood.light[1],
            colour[2] * factor * mood.light[2],
        )
        return _mix(lit, mood.horizon, 1.0 - float(np.exp(-mood.haze * z)))

    def paint(
        self,
        world: Sequence[Sequence[float]] | Points,
        colour: Colour,
        cls: int,
        light: float = 1.0,
    ) -> None:
        """Fill a polygon given in metres."""
        z = float(np.asarray(world, np.float64)[:, 2].mean())
        self.canvas.fill(self.view(world), self.tone(colour, z, light), cls)

    def strip(self, x0: float, x1: float, z0: float, z1: float) -> Points:
        """Outline in metres of the ground between two lines along the street."""
        z = np.geomspace(max(z0, _NEAR), z1, 2 + int(6 * np.log(z1 / max(z0, _NEAR)) + 1))
        out = np.stack([np.full_like(z, x0), np.zeros_like(z), z], axis=1)
        back = np.stack([np.full_like(z, x1), np.zeros_like(z), z], axis=1)[::-1]
        return np.concatenate([out, back])

    def shadow(self, x: float, z: float, radius: float) -> None:
        """A soft dark patch on the ground."""
        depth = 0.5 * radius
        ring = _disc(x - 0.4 * radius * self.sun, z, radius, depth / radius)
        world = np.stack([ring[:, 0], np.zeros(len(ring)), ring[:, 1]], axis=1)
        if z - depth > _NEAR:
            blur = 0.1 * radius * self.view.focal / z
            strength = 0.25 + 0.3 * self.mood.contrast
            self.canvas.glaze(self.view(world), (18, 20, 34), strength, min(blur, 4.0))

    # ----------------------------------------------------------------- sky and ground

    def paint_sky(self) -> None:
        mood, view, canvas = self.mood, self.view, self.canvas
        rows = (np.arange(canvas.image.shape[0]) + 0.5) / SAMPLES
        share = np.clip(rows / max(view.horizon, 1.0), 0, 1)[:, None] ** 1.3
        column = np.array(mood.zenith) * (1 - share) + np.array(mood.horizon) * share
        canvas.image[:] = np.rint(column)[:, None].clip(0, 255)
        canvas.label[:] = SKY + 1
        if mood.contrast > 0.6 or mood.lit > 0.5:  # the sun, or the moon
            x, y = self.width * self.uniform(0.1, 0.9), view.horizon * self.uniform(0.1, 0.6)
            radius = 0.035 * self.width
            canvas.glaze(_disc(x, y, 2.6 * radius), (255, 244, 214), 0.45, 1.2 * radius)
            canvas.glaze(_disc(x, y, radius, n=40), (255, 250, 232), 0.95, 0.4)
        for _ in range(int(self.rng.integers(0, mood.clouds + 1))):
            x, y = self.width * self.uniform(-0.1, 1.1), view.horizon * self.uniform(-0.05, 0.75)
            size = self.width * self.uniform(0.05, 0.13)
            for puff in range(int(self.rng.integers(4, 8))):
                dx = size * (puff - 3) * self.uniform(0.35, 0.6)
                dy = size * self.uniform(-0.22, 0.06)
                radius = size * self.uniform(0.35, 0.7)
                canvas.glaze(_disc(x + dx, y + dy, radius, 0.5), mood.cloud, 0.5, 0.16 * radius)

    def paint_skyline(self) -> None:
        """What closes the view at the end of the street: far blocks and a line of trees."""
        z = _FAR
        x = -160.0
        while x < 160:
            w, h = self.uniform(8, 22), self.uniform(5, 24)
            box = [(x, 0, z), (x + w, 0, z), (x + w, h, z), (x, h, z)]
            self.paint(box, self.pick(_WALLS), BUILDING, self.uniform(0.7, 1.0))
            x += w * self.uniform(0.9, 1.6)
        leaf = self.pick(_LEAVES)
        for x in np.arange(-165, 165, 5.0):
            crown = _disc(float(x), self.uniform(1.5, 3), self.uniform(3.5, 5.5))
            world = np.column_stack([crown, np.full(len(crown), z)])
            self.paint(world, leaf, VEGETATION, self.uniform(0.7, 1.0))

    def paint_ground(self) -> None:
        edge, kerb = self.road + self.verge + self.paving, self.road
        lawn = self.pick(((96, 140, 60), (112, 146, 66), (128, 140, 70)), 6)
        slab = self.pick(((206, 182, 164), (198, 168, 156), (208, 176, 150)), 6)
        tar = self.pick(((84, 86, 92), (70, 72, 78), (96, 94, 94)), 4)
        # Bands of one tone each, so that haze deepens with distance.
        bands = np.geomspace(_NEAR, _FAR, 9)
        for z0, z1 in reversed(list(zip(bands[:-1], bands[1:], strict=True))):
            grow = float(z1) * 1.02
            self.paint(self.strip(-220, 220, z0, grow), lawn, VEGETATION)
            self.paint(self.strip(-edge - 0.4, edge + 0.4, z0, grow), slab, PAVEMENT)
            if self.verge:
                for side in (-1, 1):
                    band = self.strip(side * kerb, side * (kerb + self.verge), z0, grow)
                    self.paint(band, lawn, VEGETATION)
            self.paint(
                self.strip(-kerb - 0.25, kerb + 0.25, z0, grow), _times(slab, 1.12), PAVEMENT
            )
            self.paint(self.strip(-kerb, kerb, z0, grow), tar, ROAD)
        for z in np.arange(_NEAR, 22, 1.2):  # joints between the slabs
            for side in (-1, 1):
                x0, x1 = side * (kerb + self.verge + 0.25), side * edge
                joint = [(x0, 0, z), (x1, 0, z), (x1, 0, z + 0.05), (x0, 0, z + 0.05)]
                self.canvas.glaze(self.view(joint), (40, 38, 38), 0.35)
        for _ in range(int(self.rng.integers(0, 5))):  # mended places
            x, z = self.uniform(-kerb, 0.7 * kerb), self.uniform(3, 24)
            w, d = self.uniform(0.6, 2), self.uniform(1, 5)
            patch = self.strip(x, min(x + w, kerb), z, z + d)
            self.canvas.glaze(self.view(patch), (30, 30, 36), self.uniform(0.1, 0.35))
        if self.crossing is not None:
            z0, z1 = self.crossing, self.crossing + self.crossing_width
            for z, colour, cls in ((z0, slab, PAVEMENT), (z0 + 1.5, tar, ROAD)):
                end = z1 - (z - z0)
                box = [(-220, 0, z), (220, 0, z), (220, 0, end), (-220, 0, end)]
                flat = self.view(box) - [[self.view.focal * self.view.bend * p[2], 0] for p in box]
                self.canvas.fill(flat, self.tone(colour, z), cls)
            middle = self.strip(-kerb, kerb, z0 - 0.2, z1 + 0.2)
            self.paint(middle, tar, ROAD)
        if self.mood.contrast > 0.6:  # the shade of the houses on the sunny side
            reach = edge * self.sun
            shade = self.strip(reach, reach - self.sun * self.uniform(0.3, 1.1) * edge, _NEAR, 70)
            self.canvas.glaze(self.view(shade), (22, 26, 52), 0.34)

    def paint_markings(self) -> None:
        white = self.pick(((236, 234, 226), (226, 224, 220)), 4)
        tint = self.pick(((240, 196, 60),), 6) if self.chance(0.25) else white
        half = self.uniform(0.19, 0.25)
        reach = 20.0 if self.crossing is None else self.crossing - 4.5
        dash = self.uniform(2.2, 3.2)
        z = _NEAR - self.uniform(0, dash)
        solid = self.chance(0.25)
        while z < reach:
            end = z + (2 * dash if solid else dash)
            if end > _NEAR + 0.2:
                self.paint(self.strip(-half, half, z, min(end, reach)), tint, MARKING)
            z = end if solid else end + 1.2 * dash
        if self.chance(0.5):  # lines along the kerbs
            for side in (-1, 1):
                x = side * (self.road - 0.55)
                self.paint(self.strip(x - 0.19, x + 0.19, _NEAR, min(reach, 18.0)), white, MARKING)
        if self.crossing is not None or self.chance(0.25):
            z = self.crossing - 3.8 if self.crossing else self.uniform(7, 14)
            self.paint(self.strip(-self.road, self.road, z - 0.3, z + 3.1), (84, 86, 92), ROAD)
            for x in np.arange(-self.road + 0.35, self.road - 0.7, 1.5):
                self.paint(self.strip(float(x), float(x) + 0.8, z, z + 2.8), white, MARKING)

    # ----------------------------------------------------------------- houses

    def wall(
        self,
        a: tuple[float, float],
        b: tuple[float, float],
        top: float,
        style: _House,
        light: float,
    ) -> None:
        """An upright wall from ground point (x, z) `a` to `b`, with its windows."""
        start, end = np.array(a), np.array(b)
        length = float(np.linalg.norm(end - start))

        def quad(s0: float, s1: float, y0: float, y1: float) -> list[tuple[float, float, float]]:
            p, q = start + (end - start) * s0, start + (end - start) * s1
            return [(p[0], y0, p[1]), (q[0], y0, q[1]), (q[0], y1, q[1]), (p[0], y1, p[1])]

        if max(a[1], b[1]) <= _NEAR:
            return
        self.paint(quad(0, 1, 0, top), style.colour, BUILDING, light)
        self.paint(quad(0, 1, 0, 0.5), _times(style.colour, 0.72), BUILDING, light)
        self.paint(quad(0, 1, top - 0.35, top), _times(style.colour, 1.16), BUILDING, light)
        columns = max(1, int((length - 0.6) / style.bay))
        bay = 1.0 / columns
        z = float((start[1] + end[1]) / 2)
        y = style.ground_floor if style.shop else 0.9
        if style.shop:
            for column in range(columns):
                s0, s1 = (column + 0.1) * bay, (column + 0.9) * bay
                pane = quad(s0, s1, 0.5, style.ground_floor - 0.9)
                lit = self.mood.lit > 0.2
                self.paint(pane, (255, 214, 140) if lit else (70, 84, 96), BUILDING, light)
            self.paint(
                quad(0.02, 0.98, style.ground_floor - 0.85, style.ground_floor - 0.25),
                style.awning, BUILDING, light,
            )  # fmt: skip
            y = style.ground_floor + 0.3
        while y + style.window_height < top - 0.5:
            for column in range(columns):
                s0, s1 = (column + 0.24) * bay, (column + 0.76) * bay
                if z < 40:
                    frame = quad(
                        s0 - 0.03 * bay, s1 + 0.03 * bay, y - 0.12, y + style.window_height + 0.1
                    )
                    self.paint(frame, style.frame, BUILDING, light)
                pane = quad(s0, s1, y, y + style.window_height)
                if self.chance(self.mood.lit):
                    self.canvas.fill(self.view(pane), self.pick(((255, 216, 140),), 12), BUILDING)
                    continue
                glass = _mix((52, 66, 84), self.mood.zenith, self.uniform(0.05, 0.35))
                self.paint(pane, glass, BUILDING)
                if z < 25:  # the sky on the upper half of the glass
                    upper = quad(s0, s1, y + 0.55 * style.window_height, y + style.window_height)
                    self.paint(upper, _mix(glass, self.mood.horizon, 0.3), BUILDING)
            y += style.storey

    def house(self, side: int, x: float, z0: float, z1: float) -> None:
        """A house whose front stands on the line `x`; side -1 is left of the road, 1 right."""
        style = _House(
            colour=self.pick(_WALLS),
            frame=self.pick(((236, 234, 228), (90, 80, 74), (210, 206, 196)), 5),
            awning=self.pick(_AWNINGS),
            roof=self.pick(_ROOFS, 6),
            storey=self.uniform(2.8, 3.5),
            bay=self.uniform(1.9, 3.0),
            window_height=self.uniform(1.3, 1.9),
            ground_floor=self.uniform(3.2, 3.8),
            shop=self.chance(0.45),
        )
        storeys = int(self.rng.integers(2, 7))
        top = 1.0 + storeys * style.storey
        far = x + side * self.uniform(8, 12)
        towards = 1.1 if side != self.sun else 0.78
        facing = self.uniform(0.8, 0.98)
        pitched = storeys <= 4 and self.chance(0.55)
        rise = self.uniform(1.6, 3.2)

        def draw() -> None:
            z = max(z0, _NEAR)
            if pitched:
                ridge, eave = (x + far) / 2, x - side * 0.3
                slope = [(eave, top - 0.1, z), (eave, top - 0.1, z1),
                         (ridge, top + rise, z1), (ridge, top + rise, z)]  # fmt: skip
                self.paint(slope, style.roof, BUILDING, towards)
                if z0 > _NEAR:
                    gable = [(x, top, z), (far, top, z), (ridge, top + rise, z)]
                    self.paint(gable, style.colour, BUILDING, facing)
            if z0 > _NEAR:
                self.wall((far, z), (x, z), top, style, facing)
            self.wall((x, z), (x, z1), top, style, towards)

        self.things.append((z1, draw))

    def add_houses(self) -> None:
        for side in (-1, 1):
            edge = self.road + self.verge + self.paving
            park = self.chance(0.16)
            z = _NEAR - self.uniform(0, 8)
            beyond = (self.crossing or 0.0) + self.crossing_width + 0.5
            while z < 68:
                length = self.uniform(7, 15)
                if self.crossing is not None and z < beyond and z + length > self.crossing - 0.5:
                    length = self.crossing - 0.5 - z  # up to the corner
                    if length < 4:
                        z = beyond
                        continue
                if park or self.chance(0.1):
                    for _ in range(int(self.rng.integers(1, 4))):
                        self.tree(
                            side * (edge + self.uniform(2.5, 12)), z + self.uniform(1, length)
                        )
                    if z > 2.5:
                        self.hedge(side * (edge + 0.6), z, z + length)
                else:
                    self.house(side, side * (edge + self.uniform(0, 0.8)), z, z + length)
                z += length + (self.uniform(2, 5) if self.chance(0.2) else 0.0)

    # ----------------------------------------------------------------- green

    def crown(self, x: float, y: float, radius: float, tall: float, z: float, leaf: Colour) -> None:
        """A ball of leaves, in pixels: many small discs, lit from the sun's side."""
        self.canvas.fill(_disc(x, y, radius * 0.86, tall), self.tone(leaf, z, 0.68), VEGETATION)
        for _ in range(46):
            turn, reach = self.uniform(0, 2 * np.pi), float(np.sqrt(self.rng.random())) * 0.86
            dx, dy = reach * np.cos(turn), reach * np.sin(turn)
            light = 0.98 + 0.26 * (0.7 * dx * self.sun - dy) + self.uniform(-0.14, 0.14)
            blob = _disc(
                x + dx * radius, y + dy * radius * tall, radius * self.uniform(0.13, 0.26), n=9
            )
            self.canvas.fill(blob, self.tone(leaf, z, light), VEGETATION)

    def tree(self, x: float, z: float) -> None:
        if z < 4.5:
            return
        leaf = self.pick(_LEAVES, 8)
        kind = self.rng.choice(3, p=[0.62, 0.18, 0.2])
        size, trunk = self.uniform(1.5, 2.4), self.uniform(1.8, 2.8)
        bark = self.pick(((98, 74, 56), (84, 68, 58)), 6)

        def draw() -> None:
            self.shadow(x, z, size)
            foot, neck = self.view([(x, 0, z), (x, trunk + 0.6, z)])
            scale = self.view.focal / z
            r = 0.17 * scale
            stem = np.array(
                [
                    (foot[0] - r * 1.3, foot[1]),
                    (foot[0] + r * 1.3, foot[1]),
                    (neck[0] + r * 0.8, neck[1]),
                    (neck[0] - r * 0.8, neck[1]),
                ]
            )
            self.canvas.fill(stem, self.tone(bark, z), VEGETATION)
            cx, radius = foot[0], size * scale
            if kind == 0:
                self.crown(cx, neck[1] - 0.8 * radius, radius, 0.95, z, leaf)
            elif kind == 1:
                self.crown(cx, neck[1] - 1.1 * radius, 0.62 * radius, 2.1, z, leaf)
            else:
                green = _mix(leaf, (40, 84, 58), 0.75)
                for step in range(4):
                    low = neck[1] - 0.62 * step * radius + 0.35 * radius
                    half = radius * (0.9 - 0.19 * step)
                    tip = low - 1.05 * radius
                    fir = np.array([(cx - half, low), (cx + half, low), (cx, tip)])
                    self.canvas.fill(fir, self.tone(green, z, 0.82 + 0.1 * step), VEGETATION)
                    lit = np.array([(cx, low), (cx + self.sun * half, low), (cx, tip)])
                    self.canvas.fill(lit, self.tone(green, z, 1.0 + 0.1 * step), VEGETATION)

        self.things.append((z, draw))

    def hedge(self, x: float, z0: float, z1: float) -> None:
        leaf = self.pick(_LEAVES[:4], 6)
        high = self.uniform(0.8, 1.3)

        def draw() -> None:
            self.paint(
                [(x, 0, z0), (x, 0, z1), (x, high, z1), (x, high, z0)], leaf, VEGETATION, 0.8
            )
            for z in np.arange(z1, z0, -0.45):
                for y in (0.35, 0.65, 0.95):
                    px, py = self.view([(x, y * high, z)])[0]
                    radius = 0.26 * self.view.focal / float(z)
                    tint = self.tone(leaf, float(z), 0.7 + 0.4 * y + self.uniform(-0.1, 0.1))
                    self.canvas.fill(_disc(px, py, radius, n=9), tint, VEGETATION)

        self.things.append((z1, draw))

    # ----------------------------------------------------------------- traffic

    def car(self, x: float, z: float, heading: float) -> None:
        """A car standing at (x, z); heading in radians, 0 drives away from the camera."""
        paint = self.pick(_PAINTS, 6)
        van = self.chance(0.22)
        length, half = (4.9, 0.95) if van else (self.uniform(3.9, 4.5), 0.9)
        belt, roof = (1.05, 2.05) if van else (self.uniform(0.84, 0.92), self.uniform(1.42, 1.52))
        forward, across = (np.sin(heading), np.cos(heading)), (np.cos(heading), -np.sin(heading))
        sunlit = 1.12

        def place(u: float, v: float, y: float) -> tuple[float, float, float]:
            right, ahead = (u * forward[i] + v * across[i] for i in range(2))
            return float(x + right), y, float(z + ahead)

        def box(low: Sequence[float], high: Sequence[float]) -> list[Points]:
            """Faces back, right, front, left, top of the frustum between two levels.

            A level is (rear, front, half width, y).
            """
            floor, lid = (
                [place(r, -w, y), place(r, w, y), place(f, w, y), place(f, -w, y)]
                for r, f, w, y in (low, high)
            )
            sides = [[floor[i], floor[(i + 1) % 4], lid[(i + 1) % 4], lid[i]] for i in range(4)]
            return [np.array(face) for face in [*sides, lid]]

        def seen(face: Points) -> bool:
            flat = self.view(face)
            ahead = flat - np.roll(flat, 1, axis=0)
            turn = np.sum(np.roll(flat, 1, axis=0)[:, 0] * ahead[:, 1]
                          - np.roll(flat, 1, axis=0)[:, 1] * ahead[:, 0])  # fmt: skip
            return bool(turn < 0)

        def spot(face: Points, s0: float, s1: float, t0: float, t1: float) -> Points:
            """A part of a face in its own coordinates, each in [0, 1]."""
            a, b, c, d = face
            return np.array([
                (a + (b - a) * s) * (1 - t) + (d + (c - d) * s) * t
                for s, t in ((s0, t0), (s1, t0), (s1, t1), (s0, t1))
            ])  # fmt: skip

        def draw() -> None:
            e = length / 2
            self.shadow(x, z, 1.25 * (e if abs(np.sin(heading)) > 0.5 else half + 0.5))
            for face in box(
                (-e + 0.25, e - 0.25, half - 0.06, 0.06), (-e + 0.2, e - 0.2, half - 0.06, 0.4)
            ):
                if seen(face):
                    self.paint(face, (26, 26, 30), CAR)
            body = box((-e, e, half, 0.3), (-e + 0.06, e - 0.1, half - 0.03, belt))
            if van:
                cabin = box(
                    (-e + 0.06, e - 0.75, half - 0.03, belt), (-e + 0.1, e - 1.3, half - 0.12, roof)
                )
            else:
                cabin = box(
                    (-e + 0.25, e - 1.05, half - 0.05, belt),
                    (-e + 0.75, e - 1.95, half - 0.2, roof),
                )
            shades = [0.9, 1.0, 0.95, 1.0, sunlit]
            shades[1 if self.sun * across[0] > 0 else 3] = sunlit
            for i, face in enumerate(body):
                if not seen(face):
                    continue
                self.paint(face, paint, CAR, shades[i])
                if i in (0, 2):
                    lamp = (206, 26, 26) if i == 0 else (252, 246, 214)
                    for s0, s1 in ((0.04, 0.22), (0.78, 0.96)):
                        self.paint(spot(face, s0, s1, 0.5, 0.85), lamp, CAR)
                        if self.mood.lit and z < 20:
                            centre = self.view(spot(face, s0, s1, 0.5, 0.85)).mean(axis=0)
                            size = 0.3 * self.view.focal / z
                            glow = _disc(float(centre[0]), float(centre[1]), size)
                            self.canvas.glaze(glow, lamp, 0.4, size * 0.4)
                    self.paint(spot(face, 0.34, 0.66, 0.3, 0.55), (232, 230, 214), CAR)
                    self.paint(spot(face, 0.0, 1.0, 0.0, 0.18), (40, 40, 44), CAR)
                elif i in (1, 3):
                    self.paint(spot(face, 0.0, 1.0, 0.0, 0.14), _times(paint, 0.6), CAR)
                    v = (half + 0.02) * (1 if i == 1 else -1)
                    for u in (-e + 0.85, e - 0.85):
                        for radius, tint in ((0.37, (22, 22, 25)), (0.21, (168, 170, 176))):
                            ring = _disc(u, 0.36, radius)
                            self.paint(np.array([place(p, v, q) for p, q in ring]), tint, CAR)
            glass = _mix((38, 48, 62), self.mood.zenith, 0.2)
            for i, face in enumerate(cabin):
                if not seen(face):
                    continue
                self.paint(face, paint, CAR, shades[i])
                if i in (0, 2):
                    self.paint(spot(face, 0.1, 0.9, 0.12, 0.86), glass, CAR)
                    self.paint(
                        spot(face, 0.1, 0.9, 0.62, 0.86), _mix(glass, self.mood.horizon, 0.35), CAR
                    )
                elif i in (1, 3):
                    for s0, s1 in ((0.09, 0.48), (0.54, 0.93)):
                        self.paint(spot(face, s0, s1, 0.12, 0.84), glass, CAR)

        self.things.append((z + (0 if abs(np.sin(heading)) > 0.5 else length / 2), draw))

    def add_traffic(self) -> None:
        parking = [self.road > 4.1 and self.chance(0.5) for _ in range(2)]  # left, right
        near = max(7.0, 7.8 * self.view.focal / self.width)
        # Moving cars: away on the right, towards the camera on the left.
        for side, heading, narrow in ((-1, np.pi, parking[0]), (1, 0.0, parking[1])):
            x = side * (self.road - 2.0 if narrow else self.road) / 2
            z = near + self.uniform(0, 12)
            while z < 34:
                if self.chance(0.6) and not self._in_crossing(z):
                    self.car(x + self.uniform(-0.15, 0.15), z, heading + self.uniform(-0.04, 0.04))
                z += self.uniform(7, 14)
        # Parked cars along the kerbs, where the road is wide enough to leave a lane.
        for side, heading, some in ((-1, np.pi, parking[0]), (1, 0.0, parking[1])):
            z = near + self.uniform(-1, 6)
            while some and z < 32:
                if self.chance(0.65) and not self._in_crossing(z):
                    self.car(side * (self.road - 1.0), z, heading)
                z += self.uniform(5.4, 7)
        if self.crossing is not None and self.chance(0.7):
            z = self.crossing + self.crossing_width / 2
            self.car(self.uniform(-6, 6), z, np.pi / 2 * (1 if self.chance(0.5) else -1))

    def _in_crossing(self, z: float) -> bool:
        return (
            self.crossing is not None
            and self.crossing - 6.5 < z < self.crossing + self.crossing_width + 2.5
        )

    # ----------------------------------------------------------------- people and posts

    def pedestrian(self, x: float, z: float) -> None:
        tall = self.uniform(1.58, 1.86)
        coat, trousers = (
            self.pick(_CLOTHES),
            self.pick(((40, 48, 84), (60, 52, 48), (30, 32, 38)), 8),
        )
        skin, hair = (
            self.pick(_SKINS, 6),
            self.pick(((38, 28, 24), (120, 78, 40), (190, 150, 90)), 8),
        )
        stride, skirt, bag = self.uniform(0.04, 0.2), self.chance(0.2), self.chance(0.3)
        swing = 1 if self.chance(0.5) else -1

        def draw() -> None:
            self.shadow(x, z, 0.5)
            k = self.view.focal / z * tall / 1.75
            ox, oy = self.view([(x, 0, z)])[0]

            def at(u: float, v: float) -> tuple[float, float]:
                return (ox + u * k, oy - v * k)

            def limb(a: tuple[float, float], b: tuple[float, float], ra: float, rb: float,
                     tint: Colour, light: float = 1.0) -> None:  # fmt: skip
                hull = _limb(at(*a), at(*b), ra * k, rb * k)
                self.canvas.fill(hull, self.tone(tint, z, light), PEDESTRIAN)

            for sign, light in ((-1, 0.85), (1, 1.0)):
                foot = sign * swing * stride
                limb((0.06 * sign, 0.85), (foot + 0.03 * sign, 0.1), 0.12, 0.085, trousers, light)
                limb((foot, 0.06), (foot + 0.1 * swing, 0.05), 0.06, 0.05, (34, 30, 30))
            limb((-0.17, 1.34), (-0.22 - 0.5 * stride, 0.9), 0.08, 0.06, coat, 0.8)
            if skirt:
                limb((0, 1.0), (0, 0.66), 0.15, 0.24, coat, 0.9)
            limb((0, 1.3), (0, 0.92), 0.21, 0.17, coat)
            limb((0.1 * self.sun, 1.3), (0.08 * self.sun, 0.95), 0.1, 0.07, coat, 1.12)
            limb((0.17, 1.34), (0.22 + 0.5 * stride, 0.9), 0.08, 0.06, coat, 0.9)
            if bag:
                limb((0.26, 0.84), (0.27, 0.74), 0.1, 0.12, (110, 62, 36))
            limb((0, 1.46), (0, 1.52), 0.06, 0.06, skin, 0.9)
            limb((0, 1.6), (0, 1.66), 0.125, 0.125, skin)
            limb((-0.02 * swing, 1.7), (-0.03 * swing, 1.67), 0.125, 0.115, hair)

        self.things.append((z, draw))

    def post(self, x: float, z: float, top: float, radius: float, colour: Colour) -> None:
        """An upright post, lit on one side."""
        (fx, fy), (tx, ty) = self.view([(x, 0, z), (x, top, z)])
        r = radius * self.view.focal / z
        self.canvas.fill(
            np.array([(fx - r, fy), (fx + r, fy), (tx + 0.8 * r, ty), (tx - 0.8 * r, ty)]),
            self.tone(colour, z, 0.9), POLE,
        )  # fmt: skip
        s = self.sun
        lit = np.array([(fx + s * 0.2 * r, fy), (fx + s * 0.8 * r, fy),
                        (tx + s * 0.6 * r, ty), (tx + s * 0.2 * r, ty)])  # fmt: skip
        self.canvas.fill(lit, self.tone(colour, z, 1.4), POLE)
        base = np.array([(fx - 1.6 * r, fy), (fx + 1.6 * r, fy),
                         (fx + 1.3 * r, fy - 3 * r), (fx - 1.3 * r, fy - 3 * r)])  # fmt: skip
        self.canvas.fill(base, self.tone(colour, z, 0.75), POLE)

    def lamp(self, x: float, z: float) -> None:
        top, arm = self.uniform(4.2, 5.6), self.uniform(1.0, 1.7) * -np.sign(x)
        steel = self.pick(_STEEL, 4)

        def draw() -> None:
            self.post(x, z, top, 0.19, steel)
            k = self.view.focal / z
            a, b = self.view([(x, top, z), (x + arm, top + 0.35, z)])
            self.canvas.fill(_limb(a, b, 0.16 * k, 0.14 * k), self.tone(steel, z), POLE)
            tip = b + [0.3 * np.sign(arm) * k, 0.02 * k]
            self.canvas.fill(_limb(b, tip, 0.19 * k, 0.21 * k), self.tone(steel, z, 1.2), POLE)
            if self.mood.lit:
                self.canvas.glaze(
                    _disc(tip[0], tip[1] + 0.1 * k, 0.9 * k), (255, 226, 150), 0.5, 0.4 * k
                )
                bulb = _limb(b + [0, 0.08 * k], tip + [0, 0.1 * k], 0.07 * k, 0.09 * k)
                self.canvas.fill(bulb, (255, 244, 206), POLE)

        self.things.append((z, draw))

    def sign(self, x: float, z: float) -> None:
        kind = int(self.rng.integers(6))
        y, r = self.uniform(2.5, 2.9), self.uniform(0.5, 0.62)
        steel = self.pick(_STEEL, 4)

        def draw() -> None:
            self.post(x, z, y + (0.3 if kind < 5 else 0.0), 0.16, steel)
            k = self.view.focal / z
            cx, cy = self.view([(x, y, z)])[0]

            def plate(points: Points, colour: Colour) -> None:
                self.canvas.fill(points * (r * k) + [cx, cy], self.tone(colour, z, 1.1), SIGN)

            turn = np.pi / 8 + np.arange(8) * np.pi / 4
            octagon = np.stack([np.cos(turn), np.sin(turn)], axis=1)
            square = np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)])
            diamond = np.array([(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)])
            triangle = np.array([(0, -1.15), (1.15, 0.85), (-1.15, 0.85)])
            red, white, blue = (210, 28, 36), (244, 244, 240), (22, 84, 190)
            if kind == 0:
                plate(octagon, red)
                plate(square * [0.66, 0.17], white)
            elif kind == 1:
                plate(triangle, red)
                plate(triangle * 0.6 + [0, 0.08], white)
            elif kind == 2:
                plate(_disc(0, 0, 1), red)
                plate(_disc(0, 0, 0.72), white)
                plate(square * [0.12, 0.4], (30, 30, 34))
            elif kind == 3:
                plate(_disc(0, 0, 1), blue)
                plate(np.array([(0, -0.7), (0.5, -0.1), (-0.5, -0.1)]), white)
                plate(square * [0.17, 0.4] + [0, 0.25], white)
            elif kind == 4:
                plate(diamond, white)
                plate(diamond * 0.82, (248, 196, 24))
            else:  # a traffic light
                case = square * [0.72, 1.5] + [0, -0.2]
                plate(case * 1.1, (236, 196, 40))
                plate(case, (26, 28, 30))
                on = int(self.rng.integers(3))
                lamps = ((226, 40, 36), (246, 186, 36), (48, 206, 110))
                for i, lamp in enumerate(lamps):
                    plate(_disc(0, -1.1 + 0.9 * i, 0.4), lamp if i == on else _times(lamp, 0.3))

        self.things.append((z, draw))

    def add_people_and_posts(self) -> None:
        kerb = self.road + self.verge
        scale = 2 * self.view.focal / (self.height + self.width)  # the same share of any picture
        for side in (-1, 1):
            z = self.uniform(5.5, 8.5) * scale
            while z < 12.5 * scale:
                what = self.rng.choice(4, p=[0.3, 0.42, 0.16, 0.12])
                x = side * (self.road + 0.5)
                if what == 0:
                    self.lamp(x, z)
                elif what == 1:
                    self.sign(x, z)
                elif what == 2:
                    self.tree(side * (kerb + 0.5), z + 1)
                z += self.uniform(2.8, 5.5)
            for _ in range(int(self.rng.integers(2, 6))):
                x = side * (kerb + self.uniform(0.7, self.paving - 0.3))
                self.pedestrian(x, self.uniform(4.2, 10) * scale)
            for z in np.arange(15, 46, self.uniform(8, 12)):
                if self.verge or self.chance(0.4):
                    self.tree(side * (kerb + self.uniform(-0.2, 0.6)), float(z))
        if self.crossing is not None and self.chance(0.6):
            self.pedestrian(self.uniform(-0.8, 0.8) * self.road, self.crossing - 2.4)

    # ----------------------------------------------------------------- the whole

    def paint_bonnet(self) -> None:
        """The carrier of the camera, at the bottom of the picture; its pixels are ignored."""
        w, h = self.width, self.height
        x = np.linspace(0.02, 0.98, 40)
        y = 1.0 - self.uniform(0.05, 0.1) * np.sqrt(np.maximum(0.0, 1 - (2 * x - 1) ** 2)) - 0.004
        arc = np.stack([x * w, y * h], axis=1)
        outline = np.concatenate([arc, [(0.98 * w, 1.1 * h), (0.02 * w, 1.1 * h)]])
        paint = self.pick(_PAINTS, 6)
        self.canvas.fill(outline, self.tone(paint, 1.0, 0.8), IGNORED)
        shine = np.concatenate([arc[8:32], arc[31:7:-1] + [0, 0.02 * h]])
        self.canvas.glaze(shine, self.mood.horizon, 0.55, 1.0)

    def finish(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Samples to pixels; then grain by class, rain, lens and sensor, on the picture only."""
        rng, h, w = self.rng, self.height, self.width
        middle = SAMPLES // 2
        label = np.ascontiguousarray(self.canvas.label[middle::SAMPLES, middle::SAMPLES])
        if self.mood.rain:
            for _ in range(int(self.rng.integers(60, 120))):
                x, y = self.uniform(0, w), self.uniform(0, h)
                d = self.uniform(0.03, 0.08) * h
                drop = np.array(
                    [(x, y), (x + 0.5, y), (x + 0.5 - 0.12 * d, y + d), (x - 0.12 * d, y + d)]
                )
                self.canvas.glaze(drop, (214, 222, 232), 0.32)
        image = cv2.resize(self.canvas.image, (w, h), interpolation=cv2.INTER_AREA).astype(
            np.float32
        )
        grain = np.zeros(256, np.float32)
        grain[[c + 1 for c in (BUILDING, ROAD, PAVEMENT, VEGETATION)]] = (3.0, 5.0, 4.0, 9.0)
        noise = rng.standard_normal((h, w)).astype(np.float32)
        noise = 0.6 * noise + 1.2 * cv2.GaussianBlur(noise, (0, 0), 1.0)
        image += (noise * grain[label])[..., None]
        blur = rng.uniform(0.0, 0.7)
        if blur > 0.25:
            image[:] = cv2.GaussianBlur(image, (0, 0), blur)
        rows, columns = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j].astype(np.float32)
        vignette = 1.0 - rng.uniform(0.0, 0.16) * (rows**2 + columns**2) / 2
        image *= (vignette * rng.uniform(0.92, 1.08))[..., None]
        image += rng.normal(0, rng.uniform(1.0, 3.5), image.shape)
        return np.rint(image).clip(0, 255).astype(np.uint8), label

    def draw(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        self.paint_sky()
        self.paint_skyline()
        self.paint_ground()
        self.paint_markings()
        self.add_houses()
        self.add_traffic()
        self.add_people_and_posts()
        for _, paint in sorted(self.things, key=lambda thing: -thing[0]):
            paint()
        if self.chance(0.3):
            self.paint_bonnet()
        return self.finish()


@dataclass(frozen=True)
class _House:
    """How the walls of one house look; lengths in metres."""

    colour: Colour
    frame: Colour
    awning: Colour
    roof: Colour
    storey: float
    bay: float
    window_height: float
    ground_floor: float
    shop: bool


def render(
    seed: int | Sequence[int], size: tuple[int, int] = (240, 320)
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one street scene.

    Args:
        seed: anything `numpy.random.default_rng` takes; the same seed draws the same scene.
        size: height and width in pixels, each at least 64.

    Returns:
        The picture, (H, W, 3) uint8 RGB, and its labels, (H, W) uint8: place in `CLASSES` plus
        one, 0 where ignored.

    Raises:
        ValueError: a side is below 64 pixels.

    Example:
        >>> image, label = render(7, size=(96, 128))
        >>> image.shape, label.shape
        ((96, 128, 3), (96, 128))
    """
    height, width = size
    if min(height, width) < 64:
        raise ValueError(f"size {height}x{width} is too small for a street; give at least 64x64")
    return _Street(np.random.default_rng(seed), height, width).draw()


def write(
    root: str | Path,
    n_train: int = 160,
    n_val: int = 32,
    seed: int = 304,
    size: tuple[int, int] = (240, 320),
) -> Path:
    """Render a data set as a user would keep one: pictures, masks, lists and a class table.

    Writes `images/` and `annotations/`, each with a folder `training` and `validation`, the lists
    `training.odgt` and `validation.odgt` (paths relative to `root`) and `classes.csv`. Sizes vary:
    of every four scenes one is upright and one is wider.

    Args:
        root: folder to write to; made when absent, files of the same names are replaced.
        n_train: scenes to train on.
        n_val: scenes held out; no seed is shared with the former.
        seed: of the whole set.
        size: height and width in pixels of a plain scene.

    Returns:
        `root` as a path.

    Raises:
        ValueError: a count below one, or a size below 64 pixels.
    """
    if min(n_train, n_val) < 1:
        raise ValueError(f"n_train={n_train}, n_val={n_val}: both must be at least 1")
    root = Path(root)
    height, width = size
    shapes = ((height, width), (height, width), (width, height), (height, width + width // 10))
    for split, (name, count) in enumerate((("training", n_train), ("validation", n_val))):
        for folder in ("images", "annotations"):
            (root / folder / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            image, label = render((seed, split, index), shapes[index % len(shapes)])
            file = f"{name}/{index:04d}.png"
            cv2.imwrite(str(root / "images" / file), image[..., ::-1])
            cv2.imwrite(str(root / "annotations" / file), label)
            record = {
                "fpath_img": f"images/{file}",
                "fpath_segm": f"annotations/{file}",
                "width": image.shape[1],
                "height": image.shape[0],
            }
            lines.append(json.dumps(record))
        (root / f"{name}.odgt").write_text("\n".join(lines) + "\n")
    with (root / "classes.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["Idx", "Name", "R", "G", "B"])
        writer.writerows([i + 1, name, *colour] for i, (name, colour) in enumerate(CLASSES))
    return root
