"""Procedurally rendered street scenes with exact labels: a small data set without a download.

A scene is a street in one-point perspective. It consists of polygons in metres, projected by one
camera and drawn from far to near, on an image and on a label map with `SAMPLES` x `SAMPLES` samples
per pixel. The image is antialiased: the mean of the samples of a pixel. The label is exact: its
central sample. The car with the camera is stored as 0, the ignored value, as in road-scene data
sets.

World coordinates in metres: x to the right of the road's centre, y up, z away from the camera.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.records import Record, write_odgt
from mit_semseg.demo.buildings import add_houses
from mit_semseg.demo.canvas import IGNORED, SAMPLES
from mit_semseg.demo.classes import BUILDING, CLASSES, PAINTS, PAVEMENT, ROAD, VEGETATION
from mit_semseg.demo.ground import paint_ground, paint_markings, paint_sky, paint_skyline
from mit_semseg.demo.roadside import add_people_and_posts
from mit_semseg.demo.scene import Scene
from mit_semseg.demo.traffic import add_traffic


def paint_bonnet(scene: Scene) -> None:
    """The car with the camera, at the bottom of the image; its pixels are ignored."""
    w, h = scene.width, scene.height
    x = np.linspace(0.02, 0.98, 40)
    y = 1.0 - scene.uniform(0.05, 0.1) * np.sqrt(np.maximum(0.0, 1 - (2 * x - 1) ** 2)) - 0.004
    arc = np.stack([x * w, y * h], axis=1)
    outline = np.concatenate([arc, [(0.98 * w, 1.1 * h), (0.02 * w, 1.1 * h)]])
    paint = scene.pick(PAINTS, 6)
    scene.canvas.fill(outline, scene.tone(paint, 1.0, 0.8), IGNORED)
    shine = np.concatenate([arc[8:32], arc[31:7:-1] + [0, 0.02 * h]])
    scene.canvas.glaze(shine, scene.weather.horizon, 0.55, 1.0)


def finish(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Averages samples to pixels, and adds grain, rain, lens and sensor noise to the image."""
    rng, h, w = scene.rng, scene.height, scene.width
    middle = SAMPLES // 2
    label = np.ascontiguousarray(scene.canvas.label[middle::SAMPLES, middle::SAMPLES])
    if scene.weather.rain:
        for _ in range(int(scene.rng.integers(60, 120))):
            x, y = scene.uniform(0, w), scene.uniform(0, h)
            d = scene.uniform(0.03, 0.08) * h
            drop = np.array(
                [(x, y), (x + 0.5, y), (x + 0.5 - 0.12 * d, y + d), (x - 0.12 * d, y + d)]
            )
            scene.canvas.glaze(drop, (214, 222, 232), 0.32)
    image = cv2.resize(scene.canvas.image, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32)
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


def render(
    seed: int | Sequence[int], size: tuple[int, int] = (240, 320)
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Renders one street scene.

    Args:
        seed: seed for `numpy.random.default_rng`; the same seed gives the same scene.
        size: height and width in pixels, each at least 64.

    Returns:
        The image, (H, W, 3) uint8 RGB, and its labels, (H, W) uint8: index in `CLASSES` plus one,
        0 for ignored pixels.

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
    scene = Scene(np.random.default_rng(seed), height, width)
    paint_sky(scene)
    paint_skyline(scene)
    paint_ground(scene)
    paint_markings(scene)
    add_houses(scene)
    add_traffic(scene)
    add_people_and_posts(scene)
    for _, paint in sorted(scene.things, key=lambda thing: -thing[0]):
        paint()
    if scene.chance(0.3):
        paint_bonnet(scene)
    return finish(scene)


def write(
    root: str | Path,
    n_train: int = 160,
    n_val: int = 32,
    seed: int = 304,
    size: tuple[int, int] = (240, 320),
) -> Path:
    """Renders a data set: images, masks, lists and a class table.

    Writes `images/` and `annotations/`, each with a folder `training` and `validation`, the lists
    `training.odgt` and `validation.odgt` (paths relative to `root`) and `classes.csv`. Sizes vary:
    of four scenes, one is in portrait format and one is wider.

    Args:
        root: output folder; existing files of the same names are replaced.
        n_train: scenes to train on.
        n_val: validation scenes, with other seeds.
        seed: seed of the data set.
        size: height and width in pixels of half of the scenes.

    Returns:
        `root` as a path.

    Raises:
        ValueError: a count is below 1, or a side below 64 pixels.
    """
    if min(n_train, n_val) < 1:
        raise ValueError(f"n_train={n_train}, n_val={n_val}: both must be at least 1")
    root = Path(root)
    height, width = size
    shapes = ((height, width), (height, width), (width, height), (height, width + width // 10))
    for split, (name, count) in enumerate((("training", n_train), ("validation", n_val))):
        for folder in ("images", "annotations"):
            (root / folder / name).mkdir(parents=True, exist_ok=True)
        records = []
        for index in range(count):
            image, label = render((seed, split, index), shapes[index % len(shapes)])
            file = f"{name}/{index:04d}.png"
            cv2.imwrite(str(root / "images" / file), image[..., ::-1])
            cv2.imwrite(str(root / "annotations" / file), label)
            h, w = label.shape
            record = Record(fpath_img=f"images/{file}", fpath_segm=f"annotations/{file}")
            records.append(Record(**record, width=w, height=h))
        write_odgt(root / f"{name}.odgt", records)
    names, colours = zip(*CLASSES)
    ClassTable(names, np.array(colours, np.uint8)).save(root / "classes.csv")
    return root
