"""Cars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mit_semseg.demo.canvas import Points, disc, mix, times
from mit_semseg.demo.classes import CAR, PAINTS
from mit_semseg.demo.scene import Scene


def car(scene: Scene, x: float, z: float, heading: float) -> None:
    """A car standing at (x, z); heading in radians, 0 drives away from the camera."""
    paint = scene.pick(PAINTS, 6)
    van = scene.chance(0.22)
    length, half = (4.9, 0.95) if van else (scene.uniform(3.9, 4.5), 0.9)
    belt, roof = (1.05, 2.05) if van else (scene.uniform(0.84, 0.92), scene.uniform(1.42, 1.52))
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
        flat = scene.view(face)
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
        scene.shadow(x, z, 1.25 * (e if abs(np.sin(heading)) > 0.5 else half + 0.5))
        for face in box(
            (-e + 0.25, e - 0.25, half - 0.06, 0.06), (-e + 0.2, e - 0.2, half - 0.06, 0.4)
        ):
            if seen(face):
                scene.paint(face, (26, 26, 30), CAR)
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
        shades[1 if scene.sun * across[0] > 0 else 3] = sunlit
        for i, face in enumerate(body):
            if not seen(face):
                continue
            scene.paint(face, paint, CAR, shades[i])
            if i in (0, 2):
                lamp = (206, 26, 26) if i == 0 else (252, 246, 214)
                for s0, s1 in ((0.04, 0.22), (0.78, 0.96)):
                    scene.paint(spot(face, s0, s1, 0.5, 0.85), lamp, CAR)
                    if scene.weather.lit and z < 20:
                        centre = scene.view(spot(face, s0, s1, 0.5, 0.85)).mean(axis=0)
                        size = 0.3 * scene.view.focal / z
                        glow = disc(float(centre[0]), float(centre[1]), size)
                        scene.canvas.glaze(glow, lamp, 0.4, size * 0.4)
                scene.paint(spot(face, 0.34, 0.66, 0.3, 0.55), (232, 230, 214), CAR)
                scene.paint(spot(face, 0.0, 1.0, 0.0, 0.18), (40, 40, 44), CAR)
            elif i in (1, 3):
                scene.paint(spot(face, 0.0, 1.0, 0.0, 0.14), times(paint, 0.6), CAR)
                v = (half + 0.02) * (1 if i == 1 else -1)
                for u in (-e + 0.85, e - 0.85):
                    for radius, tint in ((0.37, (22, 22, 25)), (0.21, (168, 170, 176))):
                        ring = disc(u, 0.36, radius)
                        scene.paint(np.array([place(p, v, q) for p, q in ring]), tint, CAR)
        glass = mix((38, 48, 62), scene.weather.zenith, 0.2)
        for i, face in enumerate(cabin):
            if not seen(face):
                continue
            scene.paint(face, paint, CAR, shades[i])
            if i in (0, 2):
                scene.paint(spot(face, 0.1, 0.9, 0.12, 0.86), glass, CAR)
                scene.paint(
                    spot(face, 0.1, 0.9, 0.62, 0.86), mix(glass, scene.weather.horizon, 0.35), CAR
                )
            elif i in (1, 3):
                for s0, s1 in ((0.09, 0.48), (0.54, 0.93)):
                    scene.paint(spot(face, s0, s1, 0.12, 0.84), glass, CAR)

    scene.things.append((z + (0 if abs(np.sin(heading)) > 0.5 else length / 2), draw))


def add_traffic(scene: Scene) -> None:
    parking = [scene.road > 4.1 and scene.chance(0.5) for _ in range(2)]  # left, right
    near = max(7.0, 7.8 * scene.view.focal / scene.width)
    # Moving cars: away on the right, towards the camera on the left.
    for side, heading, narrow in ((-1, np.pi, parking[0]), (1, 0.0, parking[1])):
        x = side * (scene.road - 2.0 if narrow else scene.road) / 2
        z = near + scene.uniform(0, 12)
        while z < 34:
            if scene.chance(0.6) and not scene.in_crossing(z):
                car(scene, x + scene.uniform(-0.15, 0.15), z, heading + scene.uniform(-0.04, 0.04))
            z += scene.uniform(7, 14)
    # Parked cars along the kerbs, where the road is wide enough to leave a lane.
    for side, heading, some in ((-1, np.pi, parking[0]), (1, 0.0, parking[1])):
        z = near + scene.uniform(-1, 6)
        while some and z < 32:
            if scene.chance(0.65) and not scene.in_crossing(z):
                car(scene, side * (scene.road - 1.0), z, heading)
            z += scene.uniform(5.4, 7)
    if scene.crossing is not None and scene.chance(0.7):
        z = scene.crossing + scene.crossing_width / 2
        car(scene, scene.uniform(-6, 6), z, np.pi / 2 * (1 if scene.chance(0.5) else -1))
