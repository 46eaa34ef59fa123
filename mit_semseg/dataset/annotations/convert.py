"""Converts annotations to masks, lists, a class table and a recipe: `mit-semseg data import`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mit_semseg.dataset.annotations.base import SPLITS, Annotations, Choices, Item, Numbers, Tree
from mit_semseg.dataset.annotations.recipe import recipe_of
from mit_semseg.dataset.annotations.recognise import read
from mit_semseg.dataset.class_files import IGNORED_NAME, is_background
from mit_semseg.dataset.classes import ClassTable, distinct_colors
from mit_semseg.dataset.images import exif_orientation
from mit_semseg.dataset.listing import shortened
from mit_semseg.dataset.records import Record, write_odgt
from mit_semseg.errors import counted, one_line
from mit_semseg.files import PathLike, replacing

# How pixels without annotation are labelled.
UNLABELLED = ("background", "ignore")
_MOST_IN_8_BITS = 255
# Rotations and reflections of EXIF's orientations that exchange width and height.
_TRANSPOSING: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    5: np.transpose,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).T,
    8: np.rot90,
}


@dataclass
class Imported:
    """What was converted.

    Attributes:
        title: the format.
        out: folder of masks, lists, `classes.csv` and `recipe.yaml`.
        root: `DATASET.root_dataset`.
        classes: names and colours.
        ignored: the stored value of ignored pixels.
        records: by split, with paths relative to `root`.
        pixels: number of pixels of each class.
        rules: what was decided, a sentence each.
        problems: what is left out, a line each.
        remarks: other lines about single annotations.
    """

    title: str
    out: Path
    root: Path
    classes: ClassTable
    ignored: int
    records: dict[str, list[Record]]
    pixels: np.ndarray
    rules: list[str]
    problems: list[str]
    remarks: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.out / "recipe.yaml"

    def describe(self) -> str:
        """A report for a terminal."""
        counts = ", ".join(f"{len(found)} {split}" for split, found in self.records.items())
        lines = [
            f"{self.title}: {counts} samples, {counted(len(self.classes), 'class')} "
            f"({listed(self.classes.names)})",
            *(f"- {rule}" for rule in self.rules),
        ]
        absent = [name for name, n in zip(self.classes.names, self.pixels.tolist()) if not n]
        if absent:
            lines.append(f"- in no mask: {listed(absent)}")
        for found, title in ((self.problems, "left out"), (self.remarks, "remarks")):
            if found:
                lines += [f"{title} ({len(found)}):", *shortened(found)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The content of `import.json`."""
        return {
            "format": self.title,
            "samples": {split: len(found) for split, found in self.records.items()},
            "classes": [
                {"name": name, "pixels": n}
                for name, n in zip(self.classes.names, self.pixels.tolist())
            ],
            "rules": self.rules,
            "left_out": self.problems,
            "remarks": self.remarks,
        }


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a line, and the number of the others."""
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def convert(
    folder: PathLike,
    out: PathLike,
    name: str = "auto",
    choices: Choices | None = None,
    *,
    unlabelled: str = "background",
    ignore: Sequence[str] = (),
    split: float = 0.9,
    seed: int = 304,
    overwrite: bool = False,
) -> Imported:
    """Convert the annotations of a folder.

    Writes `masks/*.png`, lists, `classes.csv`, and `recipe.yaml` to `out`. The images stay where
    they are. An image whose annotation cannot be used is left out and reported.

    Args:
        folder: the annotations, with or without their images.
        out: output folder; created if it does not exist.
        name: a name of `READERS`, or `auto`.
        choices: where the images are, a class table, or the name of the only class.
        unlabelled: `background`: pixels without annotation are class 0; `ignore`: they are ignored.
        ignore: names of classes that are ignored.
        split: share for training, in (0, 1], if the annotations name no splits.
        seed: seed of the random split.
        overwrite: replace existing lists.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: the format is unknown, nothing can be used, or lists exist in `out`.
    """
    if not 0 < split <= 1:
        raise ValueError(f"--split is {split}; it is the share for training, in (0, 1]")
    if unlabelled not in UNLABELLED:
        raise ValueError(f"--unlabelled is {unlabelled!r}; it is background or ignore")
    choices = choices or Choices()
    folder, out = Path(os.path.abspath(folder)), Path(os.path.abspath(out))
    existing = [file for kind in SPLITS if (file := out / f"{kind}.odgt").exists()]
    if existing and not overwrite:
        names = " and ".join(map(str, existing))
        raise ValueError(f"{names} would be replaced: give another --out, or --overwrite")
    if out == folder:
        raise ValueError(f"--out is {out}, the folder of the annotations; give another one")
    tree = Tree(folder, choices.images)
    tree.leave_out(out)
    _, annotations = read(tree, name, choices)
    classes, numbers = numbering(annotations, choices, unlabelled, ignore)
    ignored = 255 if len(classes) <= _MOST_IN_8_BITS else 65535
    folders = [folder, out, *([choices.images] if choices.images else [])]
    root = Path(os.path.commonpath([os.path.abspath(path) for path in folders]))

    items, problems = _unique(annotations)
    masks = _mask_names(items, tree)
    results = list(_draw_all(items, masks, out, numbers, classes, ignored))
    rules = list(annotations.rules)
    if numbers.unlabelled >= 0:
        rules.append(f"pixels without annotation are {classes.names[numbers.unlabelled]}")
    elif annotations.gaps or any(map(is_background, annotations.names)):
        rules.append("pixels without annotation are ignored")
    records: dict[str, list[Record]] = {kind: [] for kind in SPLITS}
    pixels = np.zeros(len(classes), dtype=np.int64)
    remarks: list[str] = []
    splits = _splits([item for item, one in zip(items, results) if not one.problem], split, seed)
    rules.append(splits.rule)
    given = iter(splits.names)
    for item, one in zip(items, results):
        remarks += one.remarks
        if one.problem:
            problems.append(one.problem)
            continue
        pixels += one.pixels
        image, mask = (
            file.relative_to(root).as_posix() if root in file.parents else str(file)
            for file in (Path(os.path.abspath(item.image)), out / masks[item.image])
        )
        width, height = one.size
        record = Record(fpath_img=image, fpath_segm=mask, width=width, height=height)
        records[next(given)].append(record)
    imported = Imported(
        *(annotations.title, out, root, classes, ignored),
        {kind: found for kind, found in records.items() if found},
        *(pixels, rules, problems, remarks),
    )
    if not any(records.values()):
        first = f": {problems[0]}" if problems else ""
        raise ValueError(f"{folder}: none of its {len(items)} images can be used{first}")
    _write(imported)
    return imported


# ------------------------------------------------------------------------------ classes
def numbering(
    annotations: Annotations, choices: Choices, unlabelled: str, ignore: Sequence[str]
) -> tuple[ClassTable, Numbers]:
    """The class table, and the class id of each name.

    The background, if it is a class, is class 0; the others keep the order of the annotations, or
    of the table that was chosen.

    Raises:
        ValueError: a name in `ignore` is unknown, or no class is left.
    """
    table = choices.table
    names = list(table.names if table is not None and annotations.gaps else annotations.names)
    names = [name for name in names if name != IGNORED_NAME]
    every = [*names, *(name for name in annotations.names if name not in names)]
    unknown = [name for name in ignore if name not in every]
    if unknown:
        raise ValueError(
            f"--ignore {unknown[0]!r}: no such class (classes: {', '.join(every) or 'none'})"
        )
    background = next(filter(is_background, names), None)
    first = []
    if (annotations.gaps or background) and unlabelled == "background" and background not in ignore:
        first = [background or "background"]
    others = [name for name in names if name not in (*ignore, background)]
    kept = [*first, *others]
    if not kept:
        raise ValueError(f"{annotations.title}: no class is left, all are ignored")
    ids = dict.fromkeys((*ignore, *([background] if background else [])), -1)
    ids |= {name: k for k, name in enumerate(kept)}
    colors = np.concatenate(
        [np.zeros((len(first), 3), dtype=np.uint8), distinct_colors(len(others))]
    )
    stated = annotations.colors
    if table is not None and table.colors is not None:
        stated = stated | dict(zip(table.names, map(tuple, table.colors.tolist())))
    if others and all(name in stated for name in others):
        colors = np.array([stated.get(name, (0, 0, 0)) for name in kept], dtype=np.uint8)
    return ClassTable(tuple(kept), colors), Numbers(ids, 0 if first else -1)


# ------------------------------------------------------------------------------ masks
def _unique(annotations: Annotations) -> tuple[list[Item], list[str]]:
    """The items without second ones of an image, and the problems."""
    problems = list(annotations.problems)
    items: dict[Path, Item] = {}
    for item in annotations.items:
        if item.image in items:
            problems.append(
                f"{item.source}: its image {item.image} has another annotation, "
                f"{items[item.image].source}; left out"
            )
        items.setdefault(item.image, item)
    return list(items.values()), problems


def _mask_names(items: Iterable[Item], tree: Tree) -> dict[Path, str]:
    """Image -> its mask's path below the output folder, different for every image."""
    found: dict[Path, str] = {}
    taken: set[str] = set()
    for item in items:
        inside = tree.inside(item.image)
        # Images may differ in extension only, or have one name in several folders elsewhere.
        stem, _ = os.path.splitext(inside)
        numbered = (f"{inside}-{n}" for n in itertools.count(2))
        names = itertools.chain((stem, inside), numbered)
        name = next(name for name in names if name not in taken)
        taken.add(name)
        found[item.image] = f"masks/{name}.png"
    return found


@dataclass
class _Result:
    """The mask of an item, or the `problem` of it; `size` is that of the image, upright."""

    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    problem: str = ""
    remarks: list[str] = field(default_factory=list)


def _draw_all(
    items: Sequence[Item],
    masks: Mapping[Path, str],
    out: Path,
    numbers: Numbers,
    classes: ClassTable,
    ignored: int,
) -> Iterable[_Result]:
    def one(item: Item) -> _Result:
        result = _Result()
        try:
            labels = class_ids(item, numbers, result.remarks)
        except (OSError, ValueError) as error:
            text = one_line(error)
            named = item.source in text or str(item.image) in text
            result.problem = text if named else f"{item.source}: {text}"
            return result
        result.size = labels.shape[1], labels.shape[0]
        result.pixels = np.bincount(labels[labels >= 0], minlength=len(classes))
        target = out / masks[item.image]
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            _index_image(labels, classes.colors, ignored).save(part, format="PNG")
        return result

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from tqdm(
            pool.map(one, items), total=len(items), desc="converting", disable=None, leave=False
        )


def class_ids(item: Item, numbers: Numbers, remarks: list[str]) -> np.ndarray:
    """The class ids of an item at the size of its upright image, (H, W) int32, -1 for ignored.

    An annotation of the size that the file has before it is rotated by EXIF is rotated with it.

    Raises:
        FileNotFoundError, ValueError: image or annotation cannot be used, or sizes differ.
    """
    try:
        with Image.open(item.image) as image:
            orientation, stored = exif_orientation(image), image.size
    except OSError as error:
        raise ValueError(f"{item.image}: not a readable image ({one_line(error)})") from error
    size = stored[::-1] if orientation in _TRANSPOSING else stored
    labels = item.draw(size, numbers, remarks)
    if labels.shape == size[::-1]:
        return labels
    if labels.shape == stored[::-1] and orientation in _TRANSPOSING:
        remarks.append(
            f"{item.source}: its annotation is rotated as {item.image.name} by EXIF orientation "
            f"{orientation}"
        )
        return np.ascontiguousarray(_TRANSPOSING[orientation](labels))
    raise ValueError(
        f"{item.source}: {labels.shape[1]}x{labels.shape[0]} pixels, but its image {item.image} "
        f"has {size[0]}x{size[1]} (upright by EXIF); export both at one size"
    )


def _index_image(labels: np.ndarray, colors: np.ndarray, ignored: int) -> Image.Image:
    """A mask file that stores class ids, with a palette if they have 8 bits."""
    stored = np.where(labels < 0, ignored, labels)
    if ignored > 255:
        return Image.fromarray(stored.astype(np.uint16))
    image = Image.fromarray(stored.astype(np.uint8))
    palette = np.full((256, 3), 255, dtype=np.uint8)
    palette[: len(colors)] = colors
    image.putpalette(palette.tobytes())
    return image


# ------------------------------------------------------------------------------ files
@dataclass
class _Splits:
    names: list[str]
    rule: str


def _splits(items: Sequence[Item], share: float, seed: int) -> _Splits:
    """The split of each item: that of the annotations, or a random one."""
    named = [item.split for item in items]
    if not set(named) & {"training", "validation"}:
        named = [""] * len(named)  # a test set alone is divided
    if {"training", "validation"} <= set(named):
        rule = "the splits of the annotations"
        if "" in named:
            rule += f"; {counted(named.count(''), 'image')} in none of them are for training"
        return _Splits([name or "training" for name in named], rule)
    rest = [k for k, name in enumerate(named) if name != "test"]
    order = np.random.default_rng(seed).permutation(len(rest)).tolist()
    count = len(rest)
    if share < 1 and count > 1:  # neither list may be empty
        count = min(max(round(count * share), 1), count - 1)
    for n, k in enumerate(order):
        named[rest[k]] = "training" if n < count else "validation"
    return _Splits(named, f"a random split, {share:g} of the images for training (--split)")


def _write(imported: Imported) -> None:
    """Lists, class table and recipe."""
    out = imported.out
    for kind in SPLITS:
        path = out / f"{kind}.odgt"
        if kind in imported.records:
            write_odgt(path, imported.records[kind])
        else:
            path.unlink(missing_ok=True)  # of an earlier import
    imported.classes.save(out / "classes.csv")
    every = [record for found in imported.records.values() for record in found]
    short = float(np.median([min(record["width"], record["height"]) for record in every]))
    inside = out.relative_to(imported.root).as_posix()
    lists = {kind: f"{inside}/{kind}.odgt".removeprefix("./") for kind in imported.records}
    text = recipe_of(
        imported.title,
        imported.root,
        lists,
        f"{inside}/classes.csv".removeprefix("./"),
        len(imported.classes),
        imported.ignored,
        round(short),
        out / "ckpt",
    )
    with replacing(imported.recipe) as part:
        part.write_text(text, encoding="utf-8")
