"""Pedestrians, lamps and signs."""

from __future__ import annotations

import numpy as np

from mit_semseg.demo.canvas import Colour, Points, capsule, disc, times
from mit_semseg.demo.classes import CLOTHES, PEDESTRIAN, POLE, SIGN, SKINS, STEEL
from mit_semseg.demo.plants import tree
from mit_semseg.demo.scene import Scene


def pedestrian(scene: Scene, x: float, z: float) -> None:
    tall = scene.uniform(1.58, 1.86)
    coat, trousers = (
        scene.pick(CLOTHES),
        scene.pick(((40, 48, 84), (60, 52, 48), (30, 32, 38)), 8),
    )
    skin, hair = (
        scene.pick(SKINS, 6),
        scene.pick(((38, 28, 24), (120, 78, 40), (190, 150, 90)), 8),
    )
    stride, skirt, bag = scene.uniform(0.04, 0.2), scene.chance(0.2), scene.chance(0.3)
    swing = 1 if scene.chance(0.5) else -1

    def draw() -> None:
        scene.shadow(x, z, 0.5)
        k = scene.view.focal / z * tall / 1.75
        ox, oy = scene.view([(x, 0, z)])[0]

        def at(u: float, v: float) -> tuple[float, float]:
            return (ox + u * k, oy - v * k)

        def limb(a: tuple[float, float], b: tuple[float, float], ra: float, rb: float,
                 tint: Colour, light: float = 1.0) -> None:  # fmt: skip
            hull = capsule(at(*a), at(*b), ra * k, rb * k)
            scene.canvas.fill(hull, scene.tone(tint, z, light), PEDESTRIAN)

        for sign, light in ((-1, 0.85), (1, 1.0)):
            foot = sign * swing * stride
            limb((0.06 * sign, 0.85), (foot + 0.03 * sign, 0.1), 0.12, 0.085, trousers, light)
            limb((foot, 0.06), (foot + 0.1 * swing, 0.05), 0.06, 0.05, (34, 30, 30))
        limb((-0.17, 1.34), (-0.22 - 0.5 * stride, 0.9), 0.08, 0.06, coat, 0.8)
        if skirt:
            limb((0, 1.0), (0, 0.66), 0.15, 0.24, coat, 0.9)
        limb((0, 1.3), (0, 0.92), 0.21, 0.17, coat)
        limb((0.1 * scene.sun, 1.3), (0.08 * scene.sun, 0.95), 0.1, 0.07, coat, 1.12)
        limb((0.17, 1.34), (0.22 + 0.5 * stride, 0.9), 0.08, 0.06, coat, 0.9)
        if bag:
            limb((0.26, 0.84), (0.27, 0.74), 0.1, 0.12, (110, 62, 36))
        limb((0, 1.46), (0, 1.52), 0.06, 0.06, skin, 0.9)
        limb((0, 1.6), (0, 1.66), 0.125, 0.125, skin)
        limb((-0.02 * swing, 1.7), (-0.03 * swing, 1.67), 0.125, 0.115, hair)

    scene.things.append((z, draw))


def post(scene: Scene, x: float, z: float, top: float, radius: float, colour: Colour) -> None:
    """An upright post, lit on one side."""
    (fx, fy), (tx, ty) = scene.view([(x, 0, z), (x, top, z)])
    r = radius * scene.view.focal / z
    scene.canvas.fill(
        np.array([(fx - r, fy), (fx + r, fy), (tx + 0.8 * r, ty), (tx - 0.8 * r, ty)]),
        scene.tone(colour, z, 0.9), POLE,
    )  # fmt: skip
    s = scene.sun
    lit = np.array([(fx + s * 0.2 * r, fy), (fx + s * 0.8 * r, fy),
                    (tx + s * 0.6 * r, ty), (tx + s * 0.2 * r, ty)])  # fmt: skip
    scene.canvas.fill(lit, scene.tone(colour, z, 1.4), POLE)
    base = np.array([(fx - 1.6 * r, fy), (fx + 1.6 * r, fy),
                     (fx + 1.3 * r, fy - 3 * r), (fx - 1.3 * r, fy - 3 * r)])  # fmt: skip
    scene.canvas.fill(base, scene.tone(colour, z, 0.75), POLE)


def lamp(scene: Scene, x: float, z: float) -> None:
    top, arm = scene.uniform(4.2, 5.6), scene.uniform(1.0, 1.7) * -np.sign(x)
    steel = scene.pick(STEEL, 4)

    def draw() -> None:
        post(scene, x, z, top, 0.19, steel)
        k = scene.view.focal / z
        a, b = scene.view([(x, top, z), (x + arm, top + 0.35, z)])
        scene.canvas.fill(capsule(a, b, 0.16 * k, 0.14 * k), scene.tone(steel, z), POLE)
        tip = b + [0.3 * np.sign(arm) * k, 0.02 * k]
        scene.canvas.fill(capsule(b, tip, 0.19 * k, 0.21 * k), scene.tone(steel, z, 1.2), POLE)
        if scene.weather.lit:
            scene.canvas.glaze(
                disc(tip[0], tip[1] + 0.1 * k, 0.9 * k), (255, 226, 150), 0.5, 0.4 * k
            )
            bulb = capsule(b + [0, 0.08 * k], tip + [0, 0.1 * k], 0.07 * k, 0.09 * k)
            scene.canvas.fill(bulb, (255, 244, 206), POLE)

    scene.things.append((z, draw))


def sign(scene: Scene, x: float, z: float) -> None:
    kind = int(scene.rng.integers(6))
    y, r = scene.uniform(2.5, 2.9), scene.uniform(0.5, 0.62)
    steel = scene.pick(STEEL, 4)

    def draw() -> None:
        post(scene, x, z, y + (0.3 if kind < 5 else 0.0), 0.16, steel)
        k = scene.view.focal / z
        cx, cy = scene.view([(x, y, z)])[0]

        def plate(points: Points, colour: Colour) -> None:
            scene.canvas.fill(points * (r * k) + [cx, cy], scene.tone(colour, z, 1.1), SIGN)

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
            plate(disc(0, 0, 1), red)
            plate(disc(0, 0, 0.72), white)
            plate(square * [0.12, 0.4], (30, 30, 34))
        elif kind == 3:
            plate(disc(0, 0, 1), blue)
            plate(np.array([(0, -0.7), (0.5, -0.1), (-0.5, -0.1)]), white)
            plate(square * [0.17, 0.4] + [0, 0.25], white)
        elif kind == 4:
            plate(diamond, white)
            plate(diamond * 0.82, (248, 196, 24))
        else:  # a traffic light
            case = square * [0.72, 1.5] + [0, -0.2]
            plate(case * 1.1, (236, 196, 40))
            plate(case, (26, 28, 30))
            on = int(scene.rng.integers(3))
            lamps = ((226, 40, 36), (246, 186, 36), (48, 206, 110))
            for i, tint in enumerate(lamps):
                plate(disc(0, -1.1 + 0.9 * i, 0.4), tint if i == on else times(tint, 0.3))

    scene.things.append((z, draw))


def add_people_and_posts(scene: Scene) -> None:
    kerb = scene.road + scene.verge
    scale = 2 * scene.view.focal / (scene.height + scene.width)  # the same share of any picture
    for side in (-1, 1):
        z = scene.uniform(5.5, 8.5) * scale
        while z < 12.5 * scale:
            what = scene.rng.choice(4, p=[0.3, 0.42, 0.16, 0.12])
            x = side * (scene.road + 0.5)
            if what == 0:
                lamp(scene, x, z)
            elif what == 1:
                sign(scene, x, z)
            elif what == 2:
                tree(scene, side * (kerb + 0.5), z + 1)
            z += scene.uniform(2.8, 5.5)
        for _ in range(int(scene.rng.integers(2, 6))):
            x = side * (kerb + scene.uniform(0.7, scene.paving - 0.3))
            pedestrian(scene, x, scene.uniform(4.2, 10) * scale)
        for z in np.arange(15, 46, scene.uniform(8, 12)):
            if scene.verge or scene.chance(0.4):
                tree(scene, side * (kerb + scene.uniform(-0.2, 0.6)), float(z))
    if scene.crossing is not None and scene.chance(0.6):
        pedestrian(scene, scene.uniform(-0.8, 0.8) * scene.road, scene.crossing - 2.4)
