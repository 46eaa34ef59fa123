"""Masks as images: colours or numbers with a class table, palettes, black and white."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mit_semseg.dataset.annotations.base import (
    Annotations,
    Choices,
    Item,
    Numbers,
    Tree,
    split_of,
)
from mit_semseg.dataset.class_files import IGNORED_NAME, TABLE_FILES, ClassFile
from mit_semseg.dataset.classes import TABLES
from mit_semseg.dataset.images import load_image, stored_values
from mit_semseg.dataset.records import image_extensions

# Folders of images and of masks; masks below _OTHER are not of classes.
_IMAGES = ("images", "image", "imgs", "img", "photos", "jpegimages", "rgb")
_MASKS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass"),
    "segmentationclasspng",  # of earlier versions of labelme
    *("segmentation", "segmentations", "gt", "ground_truth", "groundtruth", "labelmaps"),
)
_OTHER = re.compile("segmentationobject.*|.*visualization", re.IGNORECASE)
# Suffixes of the names of masks beside their images.
_SUFFIXES = ("_mask", "-mask", "_masks", "_label", "_labels", "_seg", "_gt", "_l")
_WHITE, _FOREGROUND = 255, "foreground"
_VOC_BORDER = 255


class MaskReader:
    """A mask per image, matched by name: see the page on data for the layouts."""

    title = "masks"
    recognised_by = (
        "masks as images in a folder such as masks, labels or SegmentationClass, or named "
        "x_mask.png beside x.jpg, with or without a class table"
    )

    def finds(self, tree: Tree) -> bool:
        return bool(_masks(tree, []))

    def read(self, tree: Tree, choices: Choices) -> Annotations:
        found = Annotations(self.title, [], [], gaps=False)
        masks = _masks(tree, found.problems)
        table = choices.table
        if table is None and not choices.binary:
            table = _own_table(tree)
        if choices.binary:
            table = _binary(choices.binary)
            found.rules.append(f"values of 128 and more are {choices.binary}, others background")
        elif table is None:
            table = _guessed(list(masks.values()), found)
        else:
            found.rules.append(f"classes from {table.path}")
        listed = _listed(tree)
        images = _images(tree, set(masks.values()), found.problems)
        for key, mask in masks.items():
            if key not in images:
                found.problems.append(f"{mask}: no image {key!r}; left out (or give --images)")
                continue
            image = images.pop(key)
            split = listed.get(Path(key).name, "") if listed else split_of(tree.inside(image))
            draw = partial(_draw, mask, table, bool(choices.binary))
            found.items.append(Item(image, str(mask), draw, split))
        found.problems += [f"{image}: has no mask; left out" for image in images.values()]
        found.names = [name for name in table.names if name != IGNORED_NAME]
        if table.colors is not None:
            found.colors = {n: tuple(c) for n, c in zip(table.names, table.colors.tolist())}
        return found


# ------------------------------------------------------------------------------ files
def _masks(tree: Tree, problems: list[str]) -> dict[str, Path]:
    """Key -> mask file; images and masks with the same key belong together."""
    known = image_extensions()
    files = [file for file in tree.files if file.suffix.lower() in known]
    return _by_key((x for x in files if _is_mask(x.relative_to(tree.root))), tree.root, problems)


def _images(tree: Tree, masks: set[Path], problems: list[str]) -> dict[str, Path]:
    """Key -> image file."""
    root = tree.image_root
    files = [file for file in tree.images if file not in masks]
    return _by_key((x for x in files if not _is_mask(x.relative_to(root))), root, problems)


def _by_key(files: Iterable[Path], root: Path, problems: list[str]) -> dict[str, Path]:
    """Key -> the first of the files with it."""
    found: dict[str, Path] = {}
    for file in files:
        inside = file.relative_to(root)
        if _is_separate(inside):
            continue
        first = found.setdefault(_key(inside), file)
        if first != file:
            problems.append(f"{file}: {first} belongs to the same image; left out")
    return found


def _is_separate(inside: Path) -> bool:
    return inside.stem.endswith("_viz") or any(map(_OTHER.fullmatch, inside.parts[:-1]))


def _is_mask_folder(name: str) -> bool:
    return name.lower() in _MASKS or (name.lower().endswith("annot") and len(name) > 5)


def _is_mask(inside: Path) -> bool:
    folders = inside.parts[:-1]
    if any(folder.lower() in _IMAGES for folder in folders[-1:]):
        return False
    stem = inside.stem.lower()
    return (
        any(map(_is_mask_folder, folders)) or stem.endswith(_SUFFIXES) or stem == "label"
    ) and inside.suffix.lower() != ".npy"


def _key(inside: Path) -> str:
    """The path without the folders and ends that tell images and masks apart."""
    parts = []
    for part in inside.parts[:-1]:
        if part.lower() in (*_IMAGES, *_MASKS):
            continue
        parts.append(part[: -len("annot")] if _is_mask_folder(part) else part)
    stem = inside.stem
    if stem in ("img", "label"):  # of labelme_export_json
        stem = "img"
    elif _is_mask(inside):
        end = next((end for end in _SUFFIXES if stem.lower().endswith(end)), "")
        stem = stem[: len(stem) - len(end)]
    return "/".join([*parts, stem])


def _own_table(tree: Tree) -> ClassFile | None:
    """The class table in the folder.

    Raises:
        ValueError: there are several that differ.
    """
    found = tree.named(*TABLE_FILES)
    tables = [ClassFile.load(file) for file in found if file.name == found[0].name]
    if not tables:
        return None
    for other in tables[1:]:
        if (other.names, other.values) != (tables[0].names, tables[0].values):
            raise ValueError(
                f"{tables[0].path} and {other.path} have different classes; give --classes FILE"
            )
    return tables[0]


def _listed(tree: Tree) -> dict[str, str]:
    """Image name -> split, of the lists in `ImageSets/Segmentation`."""
    found: dict[str, str] = {}
    for file in tree.of_type(".txt"):
        if file.parent.name == "Segmentation" and (split := split_of(file.stem)):
            for name in file.read_text(encoding="utf-8", errors="replace").split():
                found.setdefault(name, split)
    return found


# ------------------------------------------------------------------------------ values
def _binary(name: str) -> ClassFile:
    colors = np.array([[0, 0, 0], [255, 255, 255]], dtype=np.uint8)
    return ClassFile("black and white", ("background", name), colors, (0, _WHITE))


def voc_palette() -> np.ndarray:
    """The 256 colours of Pascal VOC's masks, (256, 3) uint8: bits of the number, interleaved."""
    numbers = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            taken = (numbers >> (3 * bit + channel)) & 1
            colors[:, channel] |= (taken << (7 - bit)).astype(np.uint8)
    return colors


def _guessed(masks: Sequence[Path], found: Annotations) -> ClassFile:
    """A table for masks without one, from their values.

    Raises:
        ValueError: colour masks with other colours than those of VOC.
    """
    values: set[int] = set()
    voc = voc_palette()
    by_color = ClassFile(
        "the colours of Pascal VOC", tuple(map(str, range(256))), voc, (*range(256),)
    )
    for mask in masks:
        try:
            colored = _has_colors(mask)
            pixels = load_image(mask) if colored else stored_values(mask)
        except (OSError, ValueError):
            continue  # reported when the masks are converted
        if colored:
            try:
                pixels = by_color.rows_of(pixels, mask)
            except ValueError as error:
                raise ValueError(
                    f"{error}; there is no class table ({', '.join(TABLE_FILES)}): give --classes"
                ) from error
        values.update(np.unique(pixels).tolist())
    if values and values <= {0, _WHITE}:
        found.rules.append(f"masks of 0 and 255: 255 is {_FOREGROUND} (--binary NAME names it)")
        return _binary(_FOREGROUND)
    of_voc = any(mask.parent.name == "SegmentationClass" for mask in masks)
    if of_voc and values - {_VOC_BORDER} <= set(range(21)):
        names = ClassFile.load(TABLES / "voc2012.csv").names
        found.rules.append("no class table: the classes of Pascal VOC; 255 is ignored")
    else:
        count = max(values - {_VOC_BORDER}, default=0) + 1
        names = tuple(f"class {k}" for k in range(count))
        found.rules.append("no class table: classes have numbers (--classes FILE names them)")
    rows = [*range(len(names)), *([_VOC_BORDER] if _VOC_BORDER in values else [])]
    names = (*names, *([IGNORED_NAME] if _VOC_BORDER in values else []))
    colors = voc[rows] if len(names) <= 256 else None
    return ClassFile("the values of the masks", names, colors, tuple(rows))


def _has_colors(mask: Path) -> bool:
    """Whether a mask has several channels."""
    with Image.open(mask) as image:
        return image.mode not in ("1", "L", "P", "F") and not image.mode.startswith("I")


def _draw(
    mask: Path,
    table: ClassFile,
    binary: bool,
    size: tuple[int, int],
    numbers: Numbers,
    remarks: list[str],
) -> np.ndarray:
    """Class ids of a mask file, (H, W) int32, in its own size."""
    ids = np.array([-1 if n == IGNORED_NAME else numbers[n] for n in table.names], dtype=np.int32)
    if binary:
        return ids[(load_image(mask).mean(axis=2) >= 128).astype(np.int64)]
    return ids[_rows(mask, table)]


def _rows(mask: Path, table: ClassFile) -> np.ndarray:
    """Row numbers of the table, (H, W)."""
    if _has_colors(mask):
        return table.rows_of(_pixels(mask), mask)
    stored = stored_values(mask)
    present = np.unique(stored).tolist()
    if table.colors is not None and _by_color(mask, table, present):
        return table.rows_of(_pixels(mask), mask)
    rows = {value: row for row, value in enumerate(table.values)}
    unknown = [value for value in present if value not in rows]
    if unknown:
        y, x = np.unravel_index(int((stored == unknown[0]).argmax()), stored.shape)
        fix = "add a row for it"
        if unknown[0] in (0, _WHITE):
            fix += f", such as a class void, and --ignore void if {unknown[0]} is unlabelled"
        raise ValueError(
            f"{mask}: value {unknown[0]} at column {x}, row {y} is not in {table.path} "
            f"({_run(table.values)}); {fix}"
        )
    lookup = np.zeros(max(present) + 1, dtype=np.int64)
    lookup[present] = [rows[value] for value in present]
    return lookup[stored]


def _pixels(mask: Path) -> np.ndarray:
    """(H, W, 3) uint8; ValueError if the file's format changes colours."""
    with Image.open(mask) as image:
        kind = image.format
    if kind in ("JPEG", "MPO", "JPEG2000", "AVIF"):
        raise ValueError(f"{mask}: a {kind} mask has altered colours; export masks as PNG")
    return load_image(mask)


def _by_color(mask: Path, table: ClassFile, present: Iterable[int]) -> bool:
    """Whether a mask of one channel stands for the colours of the table, not for its values.

    A palette does if all colours that occur are in the table; grey levels only if they are not
    values.
    """
    assert table.colors is not None
    colors = {tuple(color) for color in table.colors.tolist()}
    with Image.open(mask) as image:
        palette = (image.getpalette("RGB") or []) if image.mode == "P" else None
    if palette is not None:
        return all(tuple(palette[3 * v : 3 * v + 3]) in colors for v in present)
    return not {*present} <= {*table.values} and all((v, v, v) in colors for v in present)


def _run(values: Sequence[int]) -> str:
    text = ", ".join(map(str, values[:8]))
    return text + (", ..." if len(values) > 8 else "")
