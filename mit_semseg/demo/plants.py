"""Trees and hedges."""

from __future__ import annotations

import numpy as np

from mit_semseg.demo.canvas import Colour, disc, mix
from mit_semseg.demo.classes import LEAVES, VEGETATION
from mit_semseg.demo.scene import Scene


def crown(
    scene: Scene, x: float, y: float, radius: float, tall: float, z: float, leaf: Colour
) -> None:
    """The crown of a tree, in pixels: many small discs, brighter on the side of the sun."""
    scene.canvas.fill(disc(x, y, radius * 0.86, tall), scene.tone(leaf, z, 0.68), VEGETATION)
    for _ in range(46):
        turn, reach = scene.uniform(0, 2 * np.pi), float(np.sqrt(scene.rng.random())) * 0.86
        dx, dy = reach * np.cos(turn), reach * np.sin(turn)
        light = 0.98 + 0.26 * (0.7 * dx * scene.sun - dy) + scene.uniform(-0.14, 0.14)
        blob = disc(
            x + dx * radius, y + dy * radius * tall, radius * scene.uniform(0.13, 0.26), n=9
        )
        scene.canvas.fill(blob, scene.tone(leaf, z, light), VEGETATION)


def tree(scene: Scene, x: float, z: float) -> None:
    if z < 4.5:
        return
    leaf = scene.pick(LEAVES, 8)
    kind = scene.rng.choice(3, p=[0.62, 0.18, 0.2])
    size, trunk = scene.uniform(1.5, 2.4), scene.uniform(1.8, 2.8)
    bark = scene.pick(((98, 74, 56), (84, 68, 58)), 6)

    def draw() -> None:
        scene.shadow(x, z, size)
        foot, neck = scene.view([(x, 0, z), (x, trunk + 0.6, z)])
        scale = scene.view.focal / z
        r = 0.17 * scale
        stem = np.array(
            [
                (foot[0] - r * 1.3, foot[1]),
                (foot[0] + r * 1.3, foot[1]),
                (neck[0] + r * 0.8, neck[1]),
                (neck[0] - r * 0.8, neck[1]),
            ]
        )
        scene.canvas.fill(stem, scene.tone(bark, z), VEGETATION)
        cx, radius = foot[0], size * scale
        if kind == 0:
            crown(scene, cx, neck[1] - 0.8 * radius, radius, 0.95, z, leaf)
        elif kind == 1:
            crown(scene, cx, neck[1] - 1.1 * radius, 0.62 * radius, 2.1, z, leaf)
        else:
            green = mix(leaf, (40, 84, 58), 0.75)
            for step in range(4):
                low = neck[1] - 0.62 * step * radius + 0.35 * radius
                half = radius * (0.9 - 0.19 * step)
                tip = low - 1.05 * radius
                fir = np.array([(cx - half, low), (cx + half, low), (cx, tip)])
                scene.canvas.fill(fir, scene.tone(green, z, 0.82 + 0.1 * step), VEGETATION)
                lit = np.array([(cx, low), (cx + scene.sun * half, low), (cx, tip)])
                scene.canvas.fill(lit, scene.tone(green, z, 1.0 + 0.1 * step), VEGETATION)

    scene.things.append((z, draw))


def hedge(scene: Scene, x: float, z0: float, z1: float) -> None:
    leaf = scene.pick(LEAVES[:4], 6)
    high = scene.uniform(0.8, 1.3)

    def draw() -> None:
        scene.paint([(x, 0, z0), (x, 0, z1), (x, high, z1), (x, high, z0)], leaf, VEGETATION, 0.8)
        for z in np.arange(z1, z0, -0.45):
            for y in (0.35, 0.65, 0.95):
                px, py = scene.view([(x, y * high, z)])[0]
                radius = 0.26 * scene.view.focal / float(z)
                tint = scene.tone(leaf, float(z), 0.7 + 0.4 * y + scene.uniform(-0.1, 0.1))
                scene.canvas.fill(disc(px, py, radius, n=9), tint, VEGETATION)

    scene.things.append((z1, draw))
