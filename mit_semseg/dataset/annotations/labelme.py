"""labelme: a JSON file per image."""

from __future__ import annotations

import base64
import binascii
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mit_semseg.dataset.annotations.base import (
    Annotations,
    Choices,
    Item,
    Shape,
    Tree,
    draw_shapes,
    placed,
    points_of,
    polygon,
    problem_of,
    split_of,
    stated_size,
)
from mit_semseg.dataset.class_files import IGNORED_NAME

# Shapes of labelme without an area.
_WITHOUT_AREA = ("point", "points", "line", "linestrip")


class LabelmeReader:
    """Files with `shapes` and `imagePath`: polygons, rectangles, circles and masks."""

    title = "labelme"
    recognised_by = ".json files with 'shapes' and 'imagePath'"

    def finds(self, tree: Tree) -> bool:
        return any(_is_labelme(content) for _, content in tree.json_sample())

    def read(self, tree: Tree, choices: Choices) -> Annotations:
        found = Annotations(
            self.title,
            [],
            [],
            rules=[
                "of overlapping shapes the later one in its file is on top",
                f"the label {IGNORED_NAME} is ignored",
            ],
        )
        names: set[str] = set()
        used: dict[Path, Path] = {}
        for file in tree.of_type(".json"):
            try:
                content = tree.content(file)
                if not _is_labelme(content):
                    raise ValueError(f"{file}: not a file of labelme; left out")
                image = _image(content, tree, file)
                if image in used:
                    raise ValueError(f"{file}: its image {image} is that of {used[image]}, too")
                used[image] = file
                remarks: list[str] = []
                shapes = [_shape(one, str(file), remarks) for one in content["shapes"]]
            except (ValueError, FileNotFoundError) as error:
                found.problems.append(problem_of(file, error))
                continue
            found.problems += remarks
            kept = [shape for shape in shapes if shape is not None]
            names.update(shape.label for shape in kept)
            stated = stated_size(content.get("imageWidth"), content.get("imageHeight"))
            draw = partial(draw_shapes, kept, stated, False, str(file))
            found.items.append(Item(image, str(file), draw, split_of(tree.inside(file))))
        found.names = sorted(names - {IGNORED_NAME})
        found.problems += [
            f"{image}: has no annotation; left out" for image in tree.images if image not in used
        ]
        return found


def _image(content: dict[str, Any], tree: Tree, file: Path) -> Path:
    try:
        return tree.image(content["imagePath"], file.parent)
    except FileNotFoundError as error:
        hint = ", or write the one in the file with labelme_export_json"
        raise FileNotFoundError(f"{error}{hint if content.get('imageData') else ''}") from error


def _is_labelme(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("shapes"), list)
        and isinstance(content.get("imagePath"), str)
    )


def _shape(one: Any, where: str, remarks: list[str]) -> Shape | None:
    """A shape; None, with a remark, if it has no area.

    Raises:
        ValueError: it is damaged or of an unknown type.
    """
    if not isinstance(one, dict) or not isinstance(one.get("label"), str) or not one["label"]:
        raise ValueError(f"{where}: a shape without label: {one!r:.80}")
    label, kind = one["label"], one.get("shape_type") or "polygon"
    if kind in _WITHOUT_AREA:
        remarks.append(f"{where}: {label!r} is a {kind}, which has no area; left out")
        return None
    if kind not in _FILLS and kind != "mask":
        known = ", ".join(_FILLS)
        raise ValueError(f"{where}: {label!r} has the shape_type {kind!r}; known are {known}, mask")
    points = points_of(one.get("points"), where)
    if kind in ("polygon", "oriented_rectangle"):
        return polygon(label, points, where, remarks, _polygon)
    if len(points) != 2:
        raise ValueError(f"{where}: {label!r} is a {kind} of {len(points)} points, it has 2")
    if kind != "mask":
        return Shape(label, partial(_FILLS[kind], points))
    (x0, y0), _ = points.tolist()
    area = _bitmap(one.get("mask"), f"{where}: {label!r}")
    draw = partial(placed, area, int(x0), int(y0))
    return Shape(label, draw, np.array([[x0, y0], [x0 + area.shape[1], y0 + area.shape[0]]]))


def _polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.new("1", (width, height))
    ImageDraw.Draw(image).polygon([tuple(p) for p in points.tolist()], fill=1, outline=1)
    return np.array(image)


def _rectangle(points: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.new("1", (width, height))
    low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    ImageDraw.Draw(image).rectangle((*low, *high), fill=1, outline=1)
    return np.array(image)


def _circle(points: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.new("1", (width, height))
    x, y = points[0].tolist()
    radius = math.dist(*points.tolist())
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(image).ellipse(box, fill=1, outline=1)
    return np.array(image)


# Drawn by Pillow, outline included, as labelme's own exports are.
_FILLS = {
    "polygon": _polygon,
    "oriented_rectangle": _polygon,
    "rectangle": _rectangle,
    "circle": _circle,
}


def _bitmap(text: Any, where: str) -> np.ndarray:
    """(h, w) bool of a PNG in base64."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            return np.asarray(image.convert("L") if image.mode != "1" else image).astype(bool)
    except (OSError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{where} has a mask that is not a PNG in base64") from error
