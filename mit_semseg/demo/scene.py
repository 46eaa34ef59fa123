"""One scene: its weather, street and camera, and drawing functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mit_semseg.demo.canvas import NEAR, Canvas, Colour, Points, View, disc, mix


@dataclass(frozen=True)
class Weather:
    """Weather and time of day: sky, light and haze."""

    zenith: Colour
    horizon: Colour
    light: Colour
    haze: float  # fraction of the horizon's colour per metre
    contrast: float  # of sunlit against shaded faces, in [0, 1]
    clouds: int
    cloud: Colour
    lit: float = 0.0  # fraction of lit windows
    rain: bool = False


WEATHERS: tuple[Weather, ...] = (
    Weather((58, 122, 206), (186, 216, 240), (1.03, 1.02, 1.0), 0.003, 1.0, 5, (250, 252, 255)),
    Weather((88, 150, 220), (206, 228, 242), (1.0, 1.0, 1.0), 0.004, 0.7, 9, (248, 249, 250)),
    Weather((98, 124, 178), (252, 204, 142), (1.08, 0.94, 0.78), 0.006, 1.0, 5, (255, 226, 186)),
    Weather((158, 168, 180), (206, 211, 215), (0.9, 0.92, 0.95), 0.009, 0.2, 9, (186, 192, 199)),
    Weather((196, 203, 209), (224, 227, 228), (0.94, 0.95, 0.96), 0.016, 0.1, 0, (224, 226, 228)),
    Weather((112, 124, 138), (166, 174, 181), (0.74, 0.78, 0.84), 0.013, 0.1, 9, (134, 143, 154),
          0.25, True),
    Weather((34, 40, 88), (226, 138, 116), (0.62, 0.56, 0.68), 0.005, 0.4, 5, (148, 92, 118), 0.55),
)  # fmt: skip


@dataclass
class Scene:
    """One scene, with methods that draw its parts on a canvas."""

    rng: np.random.Generator
    height: int
    width: int
    canvas: Canvas = field(init=False)
    # Objects on the ground: (distance, drawing function), drawn from far to near.
    things: list[tuple[float, Callable[[], None]]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.canvas = Canvas(self.height, self.width)
        self.weather = WEATHERS[
            rng.choice(len(WEATHERS), p=[0.25, 0.23, 0.16, 0.12, 0.07, 0.07, 0.1])
        ]
        self.sun = 1.0 if rng.random() < 0.5 else -1.0  # on the right or on the left
        self.road = rng.uniform(3.4, 5.0)  # half the road's width
        self.paving = rng.uniform(2.8, 4.2)
        self.verge = rng.uniform(1.0, 2.2) if rng.random() < 0.35 else 0.0
        self.view = View(
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
        """A random variation of one of the colours."""
        r, g, b = np.clip(
            np.array(colours[int(self.rng.integers(len(colours)))]) + self.rng.normal(0, spread, 3),
            0,
            255,
        )
        return (float(r), float(g), float(b))

    def tone(self, colour: Colour, z: float, light: float = 1.0) -> Colour:
        """A colour at distance `z` with the scene's light and haze."""
        weather = self.weather
        factor = 1.0 + (light - 1.0) * (0.4 + 0.6 * weather.contrast)
        lit = (
            colour[0] * factor * weather.light[0],
            colour[1] * factor * weather.light[1],
            colour[2] * factor * weather.light[2],
        )
        return mix(lit, weather.horizon, 1.0 - float(np.exp(-weather.haze * z)))

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
        z = np.geomspace(max(z0, NEAR), z1, 2 + int(6 * np.log(z1 / max(z0, NEAR)) + 1))
        out = np.stack([np.full_like(z, x0), np.zeros_like(z), z], axis=1)
        back = np.stack([np.full_like(z, x1), np.zeros_like(z), z], axis=1)[::-1]
        return np.concatenate([out, back])

    def shadow(self, x: float, z: float, radius: float) -> None:
        """A soft dark patch on the ground."""
        depth = 0.5 * radius
        ring = disc(x - 0.4 * radius * self.sun, z, radius, depth / radius)
        world = np.stack([ring[:, 0], np.zeros(len(ring)), ring[:, 1]], axis=1)
        if z - depth > NEAR:
            blur = 0.1 * radius * self.view.focal / z
            strength = 0.25 + 0.3 * self.weather.contrast
            self.canvas.glaze(self.view(world), (18, 20, 34), strength, min(blur, 4.0))

    def in_crossing(self, z: float) -> bool:
        return (
            self.crossing is not None
            and self.crossing - 6.5 < z < self.crossing + self.crossing_width + 2.5
        )
