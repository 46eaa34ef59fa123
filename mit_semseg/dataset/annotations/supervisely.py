"""Supervisely: `meta.json` with the classes, and `ann/x.jpg.json` for `img/x.jpg`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

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
    read_json,
    split_of,
    stated_size,
)

_WITHOUT_AREA = ("point", "line", "polyline", "graph", "keypoint")


class SuperviselyReader:
    """Objects with `classTitle` and `geometryType`: bitmaps, polygons with holes, rectangles."""

    title = "Supervisely"
    recognised_by = "meta.json with 'classes', and folders ann and img"

    def finds(self, tree: Tree) -> bool:
        return any(_meta(file) is not None for file in tree.named("meta.json"))

    def read(self, tree: Tree, choices: Choices) -> Annotations:
        meta = next(file for file in tree.named("meta.json") if _meta(file) is not None)
        classes = _meta(meta) or []
        found = Annotations(
            self.title,
            [one["title"] for one in classes],
            [],
            {one["title"]: _rgb(one.get("color")) for one in classes if _rgb(one.get("color"))},
            rules=["of overlapping objects the later one in its file is on top"],
        )
        annotated: set[Path] = set()
        for file in tree.of_type(".json"):
            if file.parent.name != "ann":
                continue
            try:
                image = tree.image(f"img/{file.stem}", file.parent.parent)
                annotated.add(image)
                remarks: list[str] = []
                content = tree.content(file)
                shapes, stated = _objects(content, str(file), remarks)
            except (ValueError, FileNotFoundError) as error:
                found.problems.append(problem_of(file, error))
                continue
            found.problems += remarks
            draw = partial(draw_shapes, shapes, stated, False, str(file))
            found.items.append(Item(image, str(file), draw, split_of(tree.inside(file))))
        found.problems += [
            f"{image}: has no annotation; left out"
            for image in tree.images
            if image not in annotated and image.parent.name == "img"
        ]
        return found


def _meta(file: Path) -> list[dict[str, Any]] | None:
    """The classes of a `meta.json`; None if it is of another tool."""
    try:
        content = read_json(file)
    except ValueError:
        return None
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, list) or not all(
        isinstance(one, dict) and isinstance(one.get("title"), str) for one in classes
    ):
        return None
    return classes


def _rgb(text: Any) -> tuple[int, ...]:
    """`#RRGGBB` as numbers; () if it is not a colour."""
    try:
        return tuple(bytes.fromhex(text.removeprefix("#")))[:3]
    except (AttributeError, ValueError):
        return ()


def _objects(
    content: Any, where: str, remarks: list[str]
) -> tuple[list[Shape], tuple[int, int] | None]:
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        raise ValueError(f"{where}: has no list 'objects'; damaged")
    size = content.get("size")
    stated = None
    if isinstance(size, dict):
        stated = stated_size(size.get("width"), size.get("height"))
    shapes = [_shape(one, where, remarks) for one in content["objects"]]
    return [shape for shape in shapes if shape is not None], stated  # type: ignore[return-value]


def _shape(one: Any, where: str, remarks: list[str]) -> Shape | None:
    """An object; None, with a remark, if it has no area; ValueError if it is damaged."""
    if not isinstance(one, dict) or not isinstance(one.get("classTitle"), str):
        raise ValueError(f"{where}: an object without classTitle: {one!r:.80}")
    name, kind = one["classTitle"], one.get("geometryType") or one.get("shape")
    if kind in _WITHOUT_AREA:
        remarks.append(f"{where}: {name!r} is a {kind}, which has no area; left out")
        return None
    if kind == "bitmap":
        bitmap = one.get("bitmap")
        if not isinstance(bitmap, dict):
            raise ValueError(f"{where}: {name!r} has no bitmap; damaged")
        area = _bitmap(bitmap.get("data"), f"{where}: {name!r}")
        x, y = points_of([bitmap.get("origin")], where)[0].astype(int).tolist()
        corners = np.array([[x, y], [x + area.shape[1], y + area.shape[0]]], dtype=np.float64)
        return Shape(name, partial(placed, area, x, y), corners)
    if kind not in ("polygon", "rectangle"):
        raise ValueError(
            f"{where}: {name!r} has the geometryType {kind!r}; known are bitmap, polygon, rectangle"
        )
    points = one.get("points")
    if not isinstance(points, dict):
        raise ValueError(f"{where}: {name!r} has no points; damaged")
    exterior = points_of(points.get("exterior"), where)
    holes = [points_of(ring, where) for ring in points.get("interior") or []]
    if kind == "rectangle":
        if len(exterior) != 2:
            raise ValueError(
                f"{where}: {name!r} is a rectangle of {len(exterior)} points, it has 2"
            )
        (x0, y0), (x1, y1) = exterior.tolist()
        exterior = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return polygon(name, exterior, where, remarks, _fill, holes)


def _fill(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Drawn by OpenCV, outline included, as Supervisely does: corners are centres of pixels."""
    mask = np.zeros((height, width), dtype=np.uint8)
    cv2.fillPoly(mask, [np.rint(corners).astype(np.int32)], 1)
    return mask.astype(bool)


def _bitmap(text: Any, where: str) -> np.ndarray:
    """(h, w) bool of a PNG in base64, usually compressed by zlib; where its alpha is not 0."""
    try:
        data = base64.b64decode(text, validate=True)
        with contextlib.suppress(zlib.error):  # a plain PNG
            data = zlib.decompress(data)
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("1", "L"):
                return np.asarray(image).astype(bool)
            if "A" in image.mode or "transparency" in image.info:
                return np.asarray(image.convert("RGBA"))[:, :, 3] > 0
            return np.asarray(image.convert("RGB")).max(axis=2) > 0
    except (OSError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{where} has a bitmap that is not a PNG in base64") from error
