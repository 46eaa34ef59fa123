"""Sky, skyline, ground and markings."""

from __future__ import annotations

import numpy as np

from mit_semseg.demo.canvas import FAR, NEAR, SAMPLES, disc, times
from mit_semseg.demo.classes import (
    BUILDING,
    LEAVES,
    MARKING,
    PAVEMENT,
    ROAD,
    SKY,
    VEGETATION,
    WALLS,
)
from mit_semseg.demo.scene import Scene


def paint_sky(scene: Scene) -> None:
    weather, view, canvas = scene.weather, scene.view, scene.canvas
    rows = (np.arange(canvas.image.shape[0]) + 0.5) / SAMPLES
    share = np.clip(rows / max(view.horizon, 1.0), 0, 1)[:, None] ** 1.3
    column = np.array(weather.zenith) * (1 - share) + np.array(weather.horizon) * share
    canvas.image[:] = np.rint(column)[:, None].clip(0, 255)
    canvas.label[:] = SKY + 1
    if weather.contrast > 0.6 or weather.lit > 0.5:  # the sun, or the moon
        x, y = scene.width * scene.uniform(0.1, 0.9), view.horizon * scene.uniform(0.1, 0.6)
        radius = 0.035 * scene.width
        canvas.glaze(disc(x, y, 2.6 * radius), (255, 244, 214), 0.45, 1.2 * radius)
        canvas.glaze(disc(x, y, radius, n=40), (255, 250, 232), 0.95, 0.4)
    for _ in range(int(scene.rng.integers(0, weather.clouds + 1))):
        x, y = scene.width * scene.uniform(-0.1, 1.1), view.horizon * scene.uniform(-0.05, 0.75)
        size = scene.width * scene.uniform(0.05, 0.13)
        for puff in range(int(scene.rng.integers(4, 8))):
            dx = size * (puff - 3) * scene.uniform(0.35, 0.6)
            dy = size * scene.uniform(-0.22, 0.06)
            radius = size * scene.uniform(0.35, 0.7)
            canvas.glaze(disc(x + dx, y + dy, radius, 0.5), weather.cloud, 0.5, 0.16 * radius)


def paint_skyline(scene: Scene) -> None:
    """The end of the street: distant buildings and a row of trees."""
    z = FAR
    x = -160.0
    while x < 160:
        w, h = scene.uniform(8, 22), scene.uniform(5, 24)
        box = [(x, 0, z), (x + w, 0, z), (x + w, h, z), (x, h, z)]
        scene.paint(box, scene.pick(WALLS), BUILDING, scene.uniform(0.7, 1.0))
        x += w * scene.uniform(0.9, 1.6)
    leaf = scene.pick(LEAVES)
    for x in np.arange(-165, 165, 5.0):
        crown = disc(float(x), scene.uniform(1.5, 3), scene.uniform(3.5, 5.5))
        world = np.column_stack([crown, np.full(len(crown), z)])
        scene.paint(world, leaf, VEGETATION, scene.uniform(0.7, 1.0))


def paint_ground(scene: Scene) -> None:
    edge, kerb = scene.road + scene.verge + scene.paving, scene.road
    lawn = scene.pick(((96, 140, 60), (112, 146, 66), (128, 140, 70)), 6)
    slab = scene.pick(((206, 182, 164), (198, 168, 156), (208, 176, 150)), 6)
    tar = scene.pick(((84, 86, 92), (70, 72, 78), (96, 94, 94)), 4)
    # Bands of one tone each, so that haze deepens with distance.
    bands = np.geomspace(NEAR, FAR, 9)
    for z0, z1 in reversed(list(zip(bands[:-1], bands[1:], strict=True))):
        grow = float(z1) * 1.02
        scene.paint(scene.strip(-220, 220, z0, grow), lawn, VEGETATION)
        scene.paint(scene.strip(-edge - 0.4, edge + 0.4, z0, grow), slab, PAVEMENT)
        if scene.verge:
            for side in (-1, 1):
                band = scene.strip(side * kerb, side * (kerb + scene.verge), z0, grow)
                scene.paint(band, lawn, VEGETATION)
        scene.paint(scene.strip(-kerb - 0.25, kerb + 0.25, z0, grow), times(slab, 1.12), PAVEMENT)
        scene.paint(scene.strip(-kerb, kerb, z0, grow), tar, ROAD)
    for z in np.arange(NEAR, 22, 1.2):  # joints between the slabs
        for side in (-1, 1):
            x0, x1 = side * (kerb + scene.verge + 0.25), side * edge
            joint = [(x0, 0, z), (x1, 0, z), (x1, 0, z + 0.05), (x0, 0, z + 0.05)]
            scene.canvas.glaze(scene.view(joint), (40, 38, 38), 0.35)
    for _ in range(int(scene.rng.integers(0, 5))):  # repaired patches
        x, z = scene.uniform(-kerb, 0.7 * kerb), scene.uniform(3, 24)
        w, d = scene.uniform(0.6, 2), scene.uniform(1, 5)
        patch = scene.strip(x, min(x + w, kerb), z, z + d)
        scene.canvas.glaze(scene.view(patch), (30, 30, 36), scene.uniform(0.1, 0.35))
    if scene.crossing is not None:
        z0, z1 = scene.crossing, scene.crossing + scene.crossing_width
        for z, colour, cls in ((z0, slab, PAVEMENT), (z0 + 1.5, tar, ROAD)):
            end = z1 - (z - z0)
            box = [(-220, 0, z), (220, 0, z), (220, 0, end), (-220, 0, end)]
            flat = scene.view(box) - [[scene.view.focal * scene.view.bend * p[2], 0] for p in box]
            scene.canvas.fill(flat, scene.tone(colour, z), cls)
        middle = scene.strip(-kerb, kerb, z0 - 0.2, z1 + 0.2)
        scene.paint(middle, tar, ROAD)
    if scene.weather.contrast > 0.6:  # the shade of the houses on the sunny side
        reach = edge * scene.sun
        shade = scene.strip(reach, reach - scene.sun * scene.uniform(0.3, 1.1) * edge, NEAR, 70)
        scene.canvas.glaze(scene.view(shade), (22, 26, 52), 0.34)


def paint_markings(scene: Scene) -> None:
    white = scene.pick(((236, 234, 226), (226, 224, 220)), 4)
    tint = scene.pick(((240, 196, 60),), 6) if scene.chance(0.25) else white
    half = scene.uniform(0.19, 0.25)
    reach = 20.0 if scene.crossing is None else scene.crossing - 4.5
    dash = scene.uniform(2.2, 3.2)
    z = NEAR - scene.uniform(0, dash)
    solid = scene.chance(0.25)
    while z < reach:
        end = z + (2 * dash if solid else dash)
        if end > NEAR + 0.2:
            scene.paint(scene.strip(-half, half, z, min(end, reach)), tint, MARKING)
        z = end if solid else end + 1.2 * dash
    if scene.chance(0.5):  # lines along the kerbs
        for side in (-1, 1):
            x = side * (scene.road - 0.55)
            scene.paint(scene.strip(x - 0.19, x + 0.19, NEAR, min(reach, 18.0)), white, MARKING)
    if scene.crossing is not None or scene.chance(0.25):
        z = scene.crossing - 3.8 if scene.crossing else scene.uniform(7, 14)
        scene.paint(scene.strip(-scene.road, scene.road, z - 0.3, z + 3.1), (84, 86, 92), ROAD)
        for x in np.arange(-scene.road + 0.35, scene.road - 0.7, 1.5):
            scene.paint(scene.strip(float(x), float(x) + 0.8, z, z + 2.8), white, MARKING)
