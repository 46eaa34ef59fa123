"""Houses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mit_semseg.demo.canvas import NEAR, Colour, mix, times
from mit_semseg.demo.classes import AWNINGS, BUILDING, ROOFS, WALLS
from mit_semseg.demo.plants import hedge, tree
from mit_semseg.demo.scene import Scene


@dataclass(frozen=True)
class House:
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


def wall(
    scene: Scene,
    a: tuple[float, float],
    b: tuple[float, float],
    top: float,
    style: House,
    light: float,
) -> None:
    """An upright wall from ground point (x, z) `a` to `b`, with its windows."""
    start, end = np.array(a), np.array(b)
    length = float(np.linalg.norm(end - start))

    def quad(s0: float, s1: float, y0: float, y1: float) -> list[tuple[float, float, float]]:
        p, q = start + (end - start) * s0, start + (end - start) * s1
        return [(p[0], y0, p[1]), (q[0], y0, q[1]), (q[0], y1, q[1]), (p[0], y1, p[1])]

    if max(a[1], b[1]) <= NEAR:
        return
    scene.paint(quad(0, 1, 0, top), style.colour, BUILDING, light)
    scene.paint(quad(0, 1, 0, 0.5), times(style.colour, 0.72), BUILDING, light)
    scene.paint(quad(0, 1, top - 0.35, top), times(style.colour, 1.16), BUILDING, light)
    columns = max(1, int((length - 0.6) / style.bay))
    bay = 1.0 / columns
    z = float((start[1] + end[1]) / 2)
    y = style.ground_floor if style.shop else 0.9
    if style.shop:
        for column in range(columns):
            s0, s1 = (column + 0.1) * bay, (column + 0.9) * bay
            pane = quad(s0, s1, 0.5, style.ground_floor - 0.9)
            lit = scene.weather.lit > 0.2
            scene.paint(pane, (255, 214, 140) if lit else (70, 84, 96), BUILDING, light)
        scene.paint(
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
                scene.paint(frame, style.frame, BUILDING, light)
            pane = quad(s0, s1, y, y + style.window_height)
            if scene.chance(scene.weather.lit):
                scene.canvas.fill(scene.view(pane), scene.pick(((255, 216, 140),), 12), BUILDING)
                continue
            glass = mix((52, 66, 84), scene.weather.zenith, scene.uniform(0.05, 0.35))
            scene.paint(pane, glass, BUILDING)
            if z < 25:  # the sky on the upper half of the glass
                upper = quad(s0, s1, y + 0.55 * style.window_height, y + style.window_height)
                scene.paint(upper, mix(glass, scene.weather.horizon, 0.3), BUILDING)
        y += style.storey


def house(scene: Scene, side: int, x: float, z0: float, z1: float) -> None:
    """A house whose front stands on the line `x`; side -1 is left of the road, 1 right."""
    style = House(
        colour=scene.pick(WALLS),
        frame=scene.pick(((236, 234, 228), (90, 80, 74), (210, 206, 196)), 5),
        awning=scene.pick(AWNINGS),
        roof=scene.pick(ROOFS, 6),
        storey=scene.uniform(2.8, 3.5),
        bay=scene.uniform(1.9, 3.0),
        window_height=scene.uniform(1.3, 1.9),
        ground_floor=scene.uniform(3.2, 3.8),
        shop=scene.chance(0.45),
    )
    storeys = int(scene.rng.integers(2, 7))
    top = 1.0 + storeys * style.storey
    far = x + side * scene.uniform(8, 12)
    towards = 1.1 if side != scene.sun else 0.78
    facing = scene.uniform(0.8, 0.98)
    pitched = storeys <= 4 and scene.chance(0.55)
    rise = scene.uniform(1.6, 3.2)

    def draw() -> None:
        z = max(z0, NEAR)
        if pitched:
            ridge, eave = (x + far) / 2, x - side * 0.3
            slope = [(eave, top - 0.1, z), (eave, top - 0.1, z1),
                     (ridge, top + rise, z1), (ridge, top + rise, z)]  # fmt: skip
            scene.paint(slope, style.roof, BUILDING, towards)
            if z0 > NEAR:
                gable = [(x, top, z), (far, top, z), (ridge, top + rise, z)]
                scene.paint(gable, style.colour, BUILDING, facing)
        if z0 > NEAR:
            wall(scene, (far, z), (x, z), top, style, facing)
        wall(scene, (x, z), (x, z1), top, style, towards)

    scene.things.append((z1, draw))


def add_houses(scene: Scene) -> None:
    for side in (-1, 1):
        edge = scene.road + scene.verge + scene.paving
        park = scene.chance(0.16)
        z = NEAR - scene.uniform(0, 8)
        beyond = (scene.crossing or 0.0) + scene.crossing_width + 0.5
        while z < 68:
            length = scene.uniform(7, 15)
            if scene.crossing is not None and z < beyond and z + length > scene.crossing - 0.5:
                length = scene.crossing - 0.5 - z  # up to the corner
                if length < 4:
                    z = beyond
                    continue
            if park or scene.chance(0.1):
                for _ in range(int(scene.rng.integers(1, 4))):
                    tree(
                        scene, side * (edge + scene.uniform(2.5, 12)), z + scene.uniform(1, length)
                    )
                if z > 2.5:
                    hedge(scene, side * (edge + 0.6), z, z + length)
            else:
                house(scene, side, side * (edge + scene.uniform(0, 0.8)), z, z + length)
            z += length + (scene.uniform(2, 5) if scene.chance(0.2) else 0.0)
