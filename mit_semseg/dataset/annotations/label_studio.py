"""Label Studio: JSON exports with polygons, brushes, rectangles and ellipses."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from mit_semseg.dataset.annotations.base import (
    Annotations,
    Choices,
    Item,
    Numbers,
    Shape,
    Tree,
    draw_shapes,
    points_of,
    polygon,
    split_of,
    stated_size,
)

# What Label Studio puts before the name of an uploaded file.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")


class LabelStudioReader:
    """A list of tasks with `data` and `annotations`; coordinates are percentages."""

    title = "Label Studio"
    recognised_by = "a .json file with a list of tasks with 'data' and 'annotations'"

    def finds(self, tree: Tree) -> bool:
        return any(_is_tasks(content) for _, content in tree.json_sample())

    def read(self, tree: Tree, choices: Choices) -> Annotations:
        found = Annotations(
            self.title,
            [],
            [],
            rules=[
                "of overlapping regions the later one in its task is on top",
                "of several annotations of a task the one marked as ground truth is used, else "
                "the first that is not cancelled",
            ],
        )
        names: set[str] = set()
        for file in tree.of_type(".json"):
            try:
                content = tree.content(file)
            except ValueError as error:
                found.problems.append(str(error))
                continue
            if not _is_tasks(content):
                found.problems.append(f"{file}: not a list of Label Studio's tasks; left out")
                continue
            for number, task in enumerate(content):
                where = f"{file}: task {task.get('id', number)}"
                try:
                    image = _image(task, tree, file.parent)
                    chosen = _annotation(task)
                    labels = [label for one in chosen for label in _labels(one)]
                except (ValueError, FileNotFoundError) as error:
                    found.problems.append(f"{where}: {error}")
                    continue
                names.update(labels)
                split = split_of(tree.inside(image))
                found.items.append(Item(image, where, partial(_draw, chosen, where), split))
        found.names = sorted(names)
        return found


def _is_tasks(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(task, dict)
            and isinstance(task.get("data"), dict)
            and isinstance(task.get("annotations"), list)
            for task in content
        )
    )


def _image(task: dict[str, Any], tree: Tree, near: Path) -> Path:
    """The image of a task: of `data`, the value that names one."""
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    texts.append(str(task.get("file_upload") or ""))
    missing: OSError | None = None
    for text in texts:
        parts = urlsplit(text)
        path = unquote(parse_qs(parts.query).get("d", [parts.path])[0])
        plain = Path(path)
        for name in (path, str(plain.with_name(_UPLOAD.sub("", plain.name)))):
            if plain.name:
                try:
                    return tree.image(name, near)
                except FileNotFoundError as error:
                    missing = missing or error
    raise missing or ValueError(f"no image in its data {task['data']!r:.80}")


def _annotation(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The regions of the annotation that is used."""
    usable = [
        one
        for one in task["annotations"]
        if isinstance(one, dict)
        and isinstance(one.get("result"), list)
        and not one.get("was_cancelled")
    ]
    if not usable:
        raise ValueError("has no annotation, or only cancelled ones; left out")
    best = next((one for one in usable if one.get("ground_truth")), usable[0])
    return [one for one in best["result"] if isinstance(one, dict) and _labels(one)]


def _labels(region: dict[str, Any]) -> list[str]:
    """The labels of a region; none if it is not an area, but a choice or a text."""
    value = region.get("value")
    if not isinstance(value, dict) or region.get("type") not in _DRAW:
        return []
    found = value.get(region["type"]) or []
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise ValueError(f"a region has the labels {found!r:.60}")
    if len(found) != 1:
        what = f"{len(found)} labels ({', '.join(found)})" if found else "no label"
        raise ValueError(f"region {region.get('id')!r} has {what}; give it one")
    return found


def _draw(
    regions: list[dict[str, Any]],
    where: str,
    size: tuple[int, int],
    numbers: Numbers,
    remarks: list[str],
) -> np.ndarray:
    stated: tuple[int, int] | None = None
    shapes = []
    for region in regions:
        sides = region.get("original_width"), region.get("original_height")
        stated = stated_size(*sides) or stated
        if region.get("image_rotation"):
            raise ValueError(
                f"{where}: annotated on an image rotated by {region['image_rotation']} degrees; "
                "rotate the file, and annotate it upright"
            )
        name, kind = _labels(region)[0], region["type"]
        try:
            shape = _DRAW[kind](name, region["value"], stated or size, where, remarks)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: a damaged region of type {kind}: {error!r}") from error
        shapes.append(shape)
    kept = [shape for shape in shapes if shape is not None]
    return draw_shapes(kept, stated, False, where, size, numbers, remarks)


Remarks = list[str]
Value = dict[str, Any]
Size = tuple[int, int]


def _polygon(name: str, value: Value, size: Size, where: str, remarks: Remarks) -> Shape | None:
    corners = points_of(value["points"], where) * size / 100
    return polygon(name, corners, where, remarks)


def _rectangle(name: str, value: Value, size: Size, where: str, remarks: Remarks) -> Shape | None:
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [value["width"], value["height"]]
    return polygon(name, _rotated(corners, value, size), where, remarks)


def _ellipse(name: str, value: Value, size: Size, where: str, remarks: Remarks) -> Shape | None:
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    corners = circle * [value["radiusX"], value["radiusY"]]
    return polygon(name, _rotated(corners, value, size), where, remarks)


def _rotated(corners: np.ndarray, value: Value, size: Size) -> np.ndarray:
    """Corners in per cent, relative to x and y, in pixels, rotated clockwise about that point."""
    angle = np.deg2rad(value.get("rotation") or 0)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    scale = np.array(size) / 100
    return (corners * scale) @ rotation + np.array([value["x"], value["y"]]) * scale


def _brush(name: str, value: Value, size: Size, where: str, remarks: Remarks) -> Shape | None:
    if value.get("format") != "rle":
        raise ValueError(f"{where}: a brush of format {value.get('format')!r}, known is 'rle'")
    codes = value["rle"]
    if not isinstance(codes, list) or not all(type(c) is int and 0 <= c < 256 for c in codes):
        raise ValueError(f"{where}: {name!r} has run lengths that are not a list of bytes")
    return Shape(name, partial(_painted, bytes(codes), f"{where}: {name!r}"))


def _painted(codes: bytes, where: str, height: int, width: int) -> np.ndarray:
    """The painted pixels of a brush: those whose alpha is not 0."""
    values = unpack(codes, where)
    if len(values) != 4 * height * width:
        raise ValueError(
            f"{where}: run lengths of {len(values) // 4} pixels, the image has {height * width}"
        )
    return values.reshape(height, width, 4)[:, :, 3] > 0


_DRAW = {
    "polygonlabels": _polygon,
    "rectanglelabels": _rectangle,
    "ellipselabels": _ellipse,
    "brushlabels": _brush,
}


def unpack(codes: bytes, where: str = "") -> np.ndarray:
    """The numbers of a packed run-length encoding (`rle-pack` of thi.ng), as brushes have it.

    Of the bits, most significant first, 32 give the count of numbers, 5 the bits of a number
    minus one, and four times 4 the bits of a length minus one. Then follow runs: one bit, set if
    all numbers of the run are equal; 2 bits that choose one of the four widths; the length minus
    one in that width; and one number, or as many as the length.

    Returns:
        (count,) uint8.

    Raises:
        ValueError: the encoding ends early, or has numbers of more than 8 bits.
    """
    at = 0

    def read(width: int) -> int:
        nonlocal at
        first, at = at, at + width
        if at > 8 * len(codes):
            raise ValueError(f"{where}: its run-length encoding ends early; damaged")
        last = -(-at // 8)
        number = int.from_bytes(codes[first // 8 : last], "big")
        return (number >> (8 * last - at)) & ((1 << width) - 1)

    count, word = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    if word > 8:
        raise ValueError(f"{where}: run lengths of numbers of {word} bits; they have 8")
    runs: list[bytes] = []
    done = 0
    while done < count:
        equal = read(1)
        length = read(widths[read(2)]) + 1
        numbers = (
            bytes([read(word)]) * length if equal else bytes(read(word) for _ in range(length))
        )
        runs.append(numbers)
        done += length
    return np.frombuffer(b"".join(runs)[:count], dtype=np.uint8)
