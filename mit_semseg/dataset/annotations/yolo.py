"""YOLO segmentation: a text file of polygons per image."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mit_semseg.dataset.annotations.base import (
    Annotations,
    Choices,
    Item,
    Numbers,
    Tree,
    draw_shapes,
    polygon,
    split_of,
)
from mit_semseg.dataset.records import list_images
from mit_semseg.errors import one_line

_KEYS = {"train": "training", "val": "validation", "valid": "validation", "test": "test"}


class YoloReader:
    """`data.yaml` with `names` and folders of images; `labels/x.txt` for `images/x.jpg`.

    A line is a class number and the corners of a polygon, as fractions of width and height.
    """

    title = "YOLO segmentation"
    recognised_by = "a .yaml file with 'names' and 'train' or 'val', and folders images and labels"

    def finds(self, tree: Tree) -> bool:
        return any(_is_yolo(_yaml(file)) for file in _yamls(tree))

    def read(self, tree: Tree, choices: Choices) -> Annotations:
        file, content = next((f, c) for f in _yamls(tree) if _is_yolo(c := _yaml(f)))
        names = _names(content["names"], file)
        found = Annotations(
            self.title,
            names,
            [],
            rules=[
                "of overlapping polygons the smaller one is on top",
                "images without a label file are background",
            ],
        )
        base = file.parent / str(content.get("path") or "")
        folders = [file.parent, base if base.is_dir() else file.parent, tree.root]
        seen: set[Path] = set()
        for key, split in _KEYS.items():
            entries = content.get(key) or []
            for entry in entries if isinstance(entries, list) else [entries]:
                try:
                    images = _images(str(entry), folders)
                except FileNotFoundError as error:
                    found.problems.append(f"{file}: {key}: {error}")
                    continue
                for image in images:
                    if image not in seen:
                        seen.add(image)
                        found.items.append(_item(image, names, split))
        if not found.items:  # the paths are of another machine
            for image in tree.images:
                found.items.append(_item(image, names, split_of(tree.inside(image))))
        return found


def _yamls(tree: Tree) -> list[Path]:
    return [*tree.of_type(".yaml"), *tree.of_type(".yml")]


def _yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None


def _is_yolo(content: Any) -> bool:
    return isinstance(content, dict) and "names" in content and bool({*_KEYS} & set(content))


def _names(names: Any, file: Path) -> list[str]:
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{file}: 'names' is {names!r:.60}; a list, or numbers from 0 and names")
    found = [str(name).strip() for name in names]
    twice = [name for n, name in enumerate(found) if name in found[:n]]
    if twice:
        raise ValueError(f"{file}: two of its names are {twice[0]!r}")
    return found


def _images(entry: str, folders: list[Path]) -> list[Path]:
    """Images of an entry: a folder, or a list of files.

    Roboflow writes `../train/images` for a folder beside the file.
    """
    for text in (entry, entry.removeprefix("../")):
        for folder in folders:
            path = Path(os.path.abspath(folder / text))
            if path.is_dir():
                return [path / name for name in list_images(path)]
            if path.is_file() and path.suffix == ".txt":
                lines = path.read_text(encoding="utf-8-sig").splitlines()
                names = [line.strip() for line in lines if line.strip()]
                return [Path(os.path.abspath(path.parent / name)) for name in names]
    raise FileNotFoundError(f"no folder or list {entry!r} in {folders[0]}")


def _item(image: Path, names: list[str], split: str) -> Item:
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = Path(*parts).with_suffix(".txt")
    if not labels.is_file() and image.with_suffix(".txt").is_file():
        labels = image.with_suffix(".txt")
    return Item(image, str(labels), partial(_draw, labels, names), split)


def _draw(
    file: Path, names: list[str], size: tuple[int, int], numbers: Numbers, remarks: list[str]
) -> np.ndarray:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file ({one_line(error)})") from error
    shapes = []
    for number, line in enumerate(lines, 1):
        cells, where = line.split(), f"{file}:{number}"
        if not cells:
            continue
        try:
            values = [float(cell) for cell in cells]
        except ValueError as error:
            raise ValueError(f"{where}: {line!r:.60} is not a row of numbers") from error
        if len(values) == 5:
            raise ValueError(f"{where}: a bounding box, not a polygon; export polygons")
        if values[0] != int(values[0]) or not 0 <= values[0] < len(names):
            raise ValueError(
                f"{where}: class {cells[0]} is not one of the {len(names)} of 'names', 0.."
                f"{len(names) - 1}"
            )
        if len(values) % 2 == 0:
            raise ValueError(f"{where}: {len(values) - 1} coordinates; x and y need an even number")
        corners = np.array(values[1:]).reshape(-1, 2)
        if not (np.abs(corners) <= 2).all():
            raise ValueError(f"{where}: {corners.max():g} is not a fraction of the image's size")
        name = names[int(values[0])]
        shapes.append(polygon(name, corners * size, where, remarks))
    kept = [shape for shape in shapes if shape is not None]
    return draw_shapes(kept, None, True, str(file), size, numbers, remarks)
