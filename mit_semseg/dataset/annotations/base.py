"""Annotations of other tools in one form, and their class ids as arrays."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mit_semseg.dataset import coco_shapes
from mit_semseg.dataset.class_files import IGNORED_NAME, ClassFile
from mit_semseg.dataset.mask_cache import FOLDER as CACHED_MASKS
from mit_semseg.dataset.records import image_extensions
from mit_semseg.errors import one_line

# Splits, in the order of their lists.
SPLITS = ("training", "validation", "test")
_SPLIT = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])", re.IGNORECASE)
_SPLIT_OF = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Choices:
    """What the user has chosen for an import.

    Attributes:
        images: folder of the images; None: below the imported folder.
        table: class table; None: that of the annotations.
        binary: name of the second class of black and white masks; "": not stated.
    """

    images: Path | None = None
    table: ClassFile | None = None
    binary: str = ""


class Numbers:
    """The class id of each name.

    Args:
        ids: name -> class id, or -1 for ignored.
        unlabelled: class id of pixels without annotation, or -1.
    """

    def __init__(self, ids: Mapping[str, int], unlabelled: int) -> None:
        self.ids, self.unlabelled = dict(ids), unlabelled

    def __getitem__(self, name: str) -> int:
        if name not in self.ids:
            known = ", ".join(list(self.ids)[:8]) + (", ..." if len(self.ids) > 8 else "")
            raise ValueError(
                f"class {name!r} is not in the class table ({known}); add it, or --ignore it"
            )
        return self.ids[name]


@dataclass(frozen=True)
class Shape:
    """An annotated area.

    Attributes:
        label: name of its class.
        draw: returns its pixels in an image of (height, width), as bool of that shape.
        corners: (n, 2) x and y in pixels; None if it has none.
        ignored: its pixels are ignored, except where other shapes are.
    """

    label: str
    draw: Callable[[int, int], np.ndarray]
    corners: np.ndarray | None = None
    ignored: bool = False


@dataclass(frozen=True)
class Item:
    """One annotated image.

    Attributes:
        image: the image file.
        source: the annotation's file, for messages.
        draw: called with the (width, height) of the upright image, the class ids and a list to
            which it appends remarks; returns (H, W) class ids, -1 for ignored.
        split: training, validation, test; "" if it is in none.
    """

    image: Path
    source: str
    draw: Callable[[tuple[int, int], Numbers, list[str]], np.ndarray]
    split: str = ""


@dataclass
class Annotations:
    """What a reader has found.

    Attributes:
        title: name of the format.
        names: class names in their order.
        items: the images that can be used.
        colors: colours of some names, RGB.
        gaps: whether pixels can be without annotation, even if no class is the background.
        rules: what was decided, a sentence each.
        problems: what is left out, a line each.
    """

    title: str
    names: list[str]
    items: list[Item]
    colors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    gaps: bool = True
    rules: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Reader(Protocol):
    """A format.

    Attributes:
        title: its name in messages.
        recognised_by: the files that tell it, for messages.
    """

    title: str
    recognised_by: str

    def finds(self, tree: Tree) -> bool:
        """Whether a folder is of this format."""
        ...

    def read(self, tree: Tree, choices: Choices) -> Annotations:
        """Its annotations.

        Raises:
            FileNotFoundError, ValueError: none of it can be used.
        """
        ...


class Tree:
    """The files of a folder, and of that of the images.

    Args:
        root: the folder.
        images: folder of the images, if it is another one.

    Attributes:
        files: absolute paths of all files below `root`, sorted; hidden ones and cached masks
            left out.
        images: all image files below `images`, or else `root`.
    """

    def __init__(self, root: Path, images: Path | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        self.image_root = Path(os.path.abspath(images or root))
        self.files = _files(self.root)
        known = image_extensions()
        found = self.files if images is None else _files(self.image_root)
        self.images = [file for file in found if file.suffix.lower() in known]
        self._named: dict[str, list[Path]] = {}
        for file in self.images:
            for key in {file.name, file.stem}:
                self._named.setdefault(key, []).append(file)
        self._parsed: dict[Path, Any] = {}

    def leave_out(self, folder: Path) -> None:
        """Leaves out the files of a folder, such as those of an earlier import."""
        for files in (self.files, self.images, *self._named.values()):
            files[:] = [file for file in files if folder not in file.parents]

    def named(self, *names: str) -> list[Path]:
        """Files with one of these names, in the order of the names."""
        return [file for name in names for file in self.files if file.name == name]

    def of_type(self, suffix: str) -> list[Path]:
        """Files with this suffix."""
        return [file for file in self.files if file.suffix.lower() == suffix]

    def json_sample(self, most: int = 12) -> Iterator[tuple[Path, Any]]:
        """Some JSON files that can be parsed, with their content."""
        for file in self.of_type(".json")[:most]:
            if file not in self._parsed:
                try:
                    self._parsed[file] = read_json(file)
                except ValueError:
                    continue
            yield file, self._parsed[file]

    def content(self, file: Path) -> Any:
        """The content of a JSON file; ValueError if it is damaged."""
        return self._parsed.pop(file) if file in self._parsed else read_json(file)

    def image(self, name: str, near: Path) -> Path:
        """The image that an annotation names, without `..` in its path.

        Args:
            name: its path, name, or name without extension.
            near: folder of the annotation.

        Raises:
            FileNotFoundError: there is none.
            ValueError: several images have that name.
        """
        name = name.replace("\\", "/")
        for folder in (near, self.image_root):
            if (folder / name).is_file() and not os.path.isabs(name):
                return Path(os.path.normpath(folder / name))
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        found = self._named.get(parts[-1] if parts else "", [])
        for count in range(len(parts), 1, -1):  # the longest common end
            ending = [file for file in found if file.parts[-count:] == tuple(parts[-count:])]
            if len(ending) == 1:
                return ending[0]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"its image {name!r} may be {found[0]} or {found[1]}; give --images FOLDER"
            )
        raise FileNotFoundError(f"no image {name!r} below {self.image_root}; give --images FOLDER")

    def inside(self, file: Path) -> str:
        """The path of a file within the folder, for messages and splits."""
        for folder in (self.root, self.image_root):
            if folder in file.parents:
                return file.relative_to(folder).as_posix()
        return file.name


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: list[Path] = []
    for path, folders, names in os.walk(folder):
        folders[:] = [x for x in folders if not x.startswith(".") and x != CACHED_MASKS]
        found += [Path(path, name) for name in names if not name.startswith(".")]
    return sorted(found)


def read_json(file: Path) -> Any:
    """The content of a JSON file; ValueError if it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged JSON ({one_line(error)})") from error


def split_of(path: str) -> str:
    """The split that a path names in its last folder or file that names one; "" if none does.

    Example:
        >>> split_of("train/images/a.jpg"), split_of("annotations/instances_val2017.json")
        ('training', 'validation')
    """
    for part in reversed(path.replace("\\", "/").split("/")):
        if found := _SPLIT.search(part):
            return _SPLIT_OF[found[1].lower()]
    return ""


def problem_of(file: Path, error: Exception) -> str:
    """The message of an error, which names the file once."""
    text = str(error)
    return text if text.startswith(str(file)) else f"{file}: {text}"


def stated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """(width, height) that an annotation states; None unless both are positive integers."""
    valid = all(type(side) is int and side > 0 for side in (width, height))
    return (width, height) if valid else None


# ------------------------------------------------------------------------------ shapes
def polygon(
    label: str,
    corners: np.ndarray,
    where: str,
    remarks: list[str],
    fill: Callable[[np.ndarray, int, int], np.ndarray] = coco_shapes.fill_polygon,
    holes: Sequence[np.ndarray] = (),
) -> Shape | None:
    """A filled polygon; None, with a remark, if it has too few corners.

    Args:
        label: name of its class.
        corners: (n, 2) x and y in pixels.
        where: the annotation, for the remark.
        remarks: gets a line if there are fewer than three corners.
        fill: returns the pixels of a polygon in an image of (height, width), which tools define
            differently; default: as COCO's API.
        holes: polygons that are cut out.
    """
    if len(corners) < 3:
        remarks.append(
            f"{where}: {label!r} has {len(corners)} of the 3 corners of a polygon; left out"
        )
        return None
    return Shape(label, partial(_filled, fill, (corners, *holes)), corners)


def points_of(points: Any, where: str) -> np.ndarray:
    """(n, 2) float64 from a JSON list of [x, y]; ValueError if it is something else."""
    if not isinstance(points, list) or not all(
        isinstance(point, list)
        and len(point) == 2
        and all(type(z) in (int, float) and abs(z) < 1e9 for z in point)
        for point in points
    ):
        raise ValueError(f"{where}: corners {points!r:.60} are not a list of [x, y]")
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _filled(
    fill: Callable[[np.ndarray, int, int], np.ndarray],
    rings: Sequence[np.ndarray],
    height: int,
    width: int,
) -> np.ndarray:
    area = fill(rings[0], height, width)
    for hole in rings[1:]:
        area &= ~fill(hole, height, width)
    return area


def placed(area: np.ndarray, x: int, y: int, height: int, width: int) -> np.ndarray:
    """A bitmap at (x, y) of an image of (height, width), cut off at its borders."""
    whole = np.zeros((height, width), dtype=bool)
    top, left = max(y, 0), max(x, 0)
    part = area[top - y : max(height - y, 0), left - x : max(width - x, 0)]
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    return whole


def draw_shapes(
    shapes: Sequence[Shape],
    stated: tuple[int, int] | None,
    smaller_on_top: bool,
    where: str,
    size: tuple[int, int],
    numbers: Numbers,
    remarks: list[str],
) -> np.ndarray:
    """The class ids of an image, from its shapes.

    Args:
        shapes: in the order of their file: later ones are on top.
        stated: (width, height) that the annotation states; None: that of the image.
        smaller_on_top: order the shapes by their area instead.
        where: the annotation, for messages.
        size: (width, height) of the upright image.
        numbers: class ids.
        remarks: gets a line about shapes that leave the image.

    Returns:
        (height, width) int32, -1 for ignored.
    """
    width, height = stated or size
    labels = np.full((height, width), numbers.unlabelled, dtype=np.int32)
    areas = [(shape, shape.draw(height, width)) for shape in shapes]
    outside, cut = [], []
    for shape, area in areas:
        if not area.any():
            outside.append(shape.label)
        elif shape.corners is not None and (
            (shape.corners < -1).any() or (shape.corners > np.array([width, height]) + 1).any()
        ):
            cut.append(shape.label)
    for found, what in ((outside, "cover no pixel"), (cut, "leave the image and are cut off")):
        if found:
            remarks.append(f"{where}: {len(found)} shapes {what}, the first is {found[0]!r}")
    if smaller_on_top:
        areas.sort(key=lambda pair: -int(pair[1].sum()))
    areas.sort(key=lambda pair: not pair[0].ignored)  # stable
    for shape, area in areas:
        labels[area] = -1 if shape.ignored or shape.label == IGNORED_NAME else numbers[shape.label]
    return labels
