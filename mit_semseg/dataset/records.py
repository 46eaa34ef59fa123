"""Records, the common form of all data sets, and lists of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from mit_semseg.dataset.images import image_size
from mit_semseg.dataset.rasters import raster_size
from mit_semseg.errors import one_line
from mit_semseg.files import PathLike, replacing

_NAMED = 3  # number of bad files named in a warning


class Record(TypedDict, total=False):
    """One sample; paths are relative to `DATASET.root_dataset`, or absolute. Sizes in pixels."""

    fpath_img: str
    fpath_segm: str
    fpath_depth: str
    width: int
    height: int


def locate(
    path: PathLike, root: PathLike = "", keys: str = "DATASET.list_train and DATASET.list_val"
) -> Path:
    """An existing file: absolute, or relative to the working folder, or relative to `root`.

    Raises:
        FileNotFoundError: it does not exist; the message names `keys`.
    """
    here, there = Path(path), Path(root) / path
    for candidate in (here, there):
        if candidate.exists():
            return candidate
    tried = f"{here}" if here == there else f"{here} or {there}"
    raise FileNotFoundError(f"there is no {tried}; check {keys}")


def read_odgt(path: PathLike) -> list[Record]:
    """Reads a list file: one JSON object per line; blank lines are skipped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a record, or there are no records.
    """
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: no such list file")
    records = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append(_parse(line, f"{name}:{number}"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: a binary file, not a list; a list has one JSON record per line (mit-semseg "
            "data make-odgt)"
        ) from error
    if not records:
        raise ValueError(f"{name}: the list has no records")
    return records


def write_odgt(path: PathLike, records: Iterable[Record]) -> None:
    """Writes a list file atomically."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _parse(line: str, where: str) -> Record:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, 1000 brackets
        raise ValueError(
            f"{where}: not JSON ({one_line(error)}); a list has one JSON record per line"
        ) from error
    return check_record(entry, where)


def check_record(entry: Any, where: str) -> Record:
    """`entry` as a record; ValueError, starting with `where`, if it is not one."""
    if not isinstance(entry, dict) or not isinstance(entry.get("fpath_img"), str):
        of_coco = isinstance(entry, dict) and "annotations" in entry
        raise ValueError(
            f"{where}: a record needs the key 'fpath_img', an image path"
            + ("; for COCO's annotations list images_dir:FILE.json, format coco" * of_coco)
        )
    record = Record(fpath_img=entry["fpath_img"])
    for key in ("fpath_segm", "fpath_depth"):
        if key in entry:
            if not isinstance(entry[key], str):
                raise ValueError(f"{where}: {key!r} is {entry[key]!r}, not a path")
            record[key] = entry[key]  # type: ignore[literal-required]
    if "width" in entry or "height" in entry:
        for key in ("width", "height"):
            value = entry.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{where}: {key!r} is {value!r}; it must be a number of pixels, or be left out"
                )
        record["width"], record["height"] = entry["width"], entry["height"]
    return record


def read_records(source: Any, root: PathLike = "") -> list[Record]:
    """Records from a list file, several list files, or ready-made records.

    Args:
        source: a path, or a sequence of paths, or a sequence of dicts.
        root: folder for relative list paths that do not exist in the working folder.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_odgt(locate(source, root))
    if not isinstance(source, Sequence):
        raise ValueError(f"a list is a path, paths, or records; got {type(source).__name__}")
    records: list[Record] = []
    for number, item in enumerate(source):
        if isinstance(item, (str, os.PathLike)):
            records += read_odgt(locate(item, root))
        else:
            records.append(check_record(item, f"record {number}"))
    if not records:
        raise ValueError("the list has no records")
    return records


def with_sizes(
    records: Sequence[Record], root: PathLike, on_error: str = "stop", bands: Sequence[str] = ()
) -> list[Record]:
    """Adds missing widths and heights from the image headers.

    Args:
        records: records in any order, which is kept.
        root: folder that relative paths are relative to.
        on_error: "stop": raise an error if a header cannot be read; "skip": leave such records out
            and log their number and some reasons.
        bands: `DATASET.bands`.

    Raises:
        OSError, ValueError: an image cannot be read, or, with "skip", none can.
    """

    def complete(record: Record) -> Record | str:
        if "width" in record:
            return record
        try:
            width, height = size_of(os.path.join(root, record["fpath_img"]))
        except (OSError, ValueError) as error:
            if on_error != "skip":
                raise
            return str(error)
        return Record(**{**record, "width": width, "height": height})  # type: ignore[typeddict-item]

    size_of = raster_size if bands else image_size
    if all("width" in record for record in records):
        return list(records)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        completed = list(pool.map(complete, records))
    reasons = [each for each in completed if isinstance(each, str)]
    kept = [each for each in completed if not isinstance(each, str)]
    if not kept:
        raise ValueError(f"none of the {len(reasons)} images can be read: {reasons[0]}")
    if reasons:
        logging.getLogger("mit_semseg").warning(
            "%d of %d images cannot be read and are left out: %s%s",
            len(reasons),
            len(completed),
            "; ".join(reasons[:_NAMED]),
            "; ..." if len(reasons) > _NAMED else "",
        )
    return kept


# ------------------------------------------------------------------------------ folders
def two_places(entry: str) -> list[tuple[str, str]]:
    """Splits `A:B` at every colon, because a Windows drive ("C:\\x") also has one.

    Returns:
        (A, B) for every colon with text on both sides.
    """
    colons = [k for k, letter in enumerate(entry) if letter == ":"]
    return [(entry[:k], entry[k + 1 :]) for k in colons if k > 0 and entry[k + 1 :]]


def image_extensions() -> set[str]:
    """All extensions that Pillow can open, in lower case with the dot."""
    return {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def list_images(folder: PathLike) -> list[str]:
    """Image files below `folder`, as sorted '/'-separated paths relative to it.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    base = Path(folder)
    if not base.is_dir():
        raise FileNotFoundError(f"{base}: no such folder")
    known = image_extensions()
    return sorted(
        file.relative_to(base).as_posix()
        for file in base.rglob("*")
        if file.suffix.lower() in known and file.is_file() and not file.name.startswith(".")
    )


def match_by_stem(
    images: Iterable[str], labels: Iterable[str], image_end: str = "", label_end: str = ""
) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Pairs images and masks whose relative paths are equal without extension.

    Args:
        images, labels: relative paths.
        image_end, label_end: ends of the stems that are ignored in the comparison
            (`_leftImg8bit`, `_gtFine_labelIds`); files without them are left out.

    Returns:
        (image, label) pairs in the order of the images, images without mask, masks without image.

    Raises:
        ValueError: two images, or two masks, share a stem.
    """

    def by_stem(files: Iterable[str], end: str) -> dict[str, str]:
        table: dict[str, str] = {}
        for file in files:
            stem = os.path.splitext(file)[0]
            if not stem.endswith(end):
                continue
            stem = stem[: len(stem) - len(end)]
            if stem in table:
                raise ValueError(f"{table[stem]} and {file} differ only in extension; remove one")
            table[stem] = file
        return table

    photos, masks = by_stem(images, image_end), by_stem(labels, label_end)
    pairs = [(file, masks[stem]) for stem, file in photos.items() if stem in masks]
    without_mask = [file for stem, file in photos.items() if stem not in masks]
    without_image = [file for stem, file in masks.items() if stem not in photos]
    return pairs, without_mask, without_image


def pair_folders(
    root: PathLike, images: str, labels: str, image_end: str = "", label_end: str = ""
) -> list[Record]:
    """Records of two folders below `root` (or absolute), matched by stem.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: an image has no mask, or nothing matches.
    """
    image_dir, label_dir = Path(root) / images, Path(root) / labels
    pairs, unmatched, _ = match_by_stem(
        list_images(image_dir), list_images(label_dir), image_end, label_end
    )
    if not pairs:
        raise ValueError(f"no image in {image_dir} has a mask of the same name in {label_dir}")
    if unmatched:
        raise ValueError(
            f"{len(unmatched)} of {len(pairs) + len(unmatched)} images in {image_dir} have no mask "
            f"in {label_dir}, the first is {unmatched[0]}; remove them, or create a list "
            "(mit-semseg data make-odgt)"
        )
    return [
        Record(fpath_img=f"{images}/{image}", fpath_segm=f"{labels}/{label}")
        for image, label in pairs
    ]


# ------------------------------------------------------------------------------ depth
# Folders of depth images in SUN RGB-D: with holes filled, and as measured.
DEPTH_FOLDERS = ("depth_bfx", "depth")
_DEPTH_END = "_depth"
_DEPTH_SUFFIXES = (".png", ".tif", ".tiff")


def find_depth(image: PathLike) -> Path | None:
    """The depth image of a colour image; None if there is none.

    For `a/image/x.jpg` it is the first that exists of: `a/image/x_depth.png` (or `.tif`);
    `a/depth_bfx/x.png`; `a/depth/x.png`; the only image in `a/depth_bfx` or `a/depth` if `x.jpg`
    is the only image in its folder, as in a frame of SUN RGB-D.
    """
    image = Path(image)
    beside = [image.with_name(f"{image.stem}{_DEPTH_END}{end}") for end in _DEPTH_SUFFIXES]
    folders = [image.parent.parent / name for name in DEPTH_FOLDERS]
    named = [folder / f"{image.stem}{end}" for folder in folders for end in _DEPTH_SUFFIXES]
    for candidate in (*beside, *named):
        if candidate.is_file():
            return candidate
    for folder in folders:
        only = only_image(folder)
        if only is not None and only_image(image.parent) == image:
            return only
    return None


def is_depth(file: PathLike) -> bool:
    """Whether a file is a depth image for `find_depth`, by its name or folder."""
    file = Path(file)
    return file.suffix.lower() in _DEPTH_SUFFIXES and (
        file.stem.endswith(_DEPTH_END) or file.parent.name in DEPTH_FOLDERS
    )


def only_image(folder: PathLike) -> Path | None:
    """The only image in a folder; None if there are none or several.

    It stops at the second image, because it is called for every image of a folder.
    """
    if not os.path.isdir(folder):
        return None
    known = image_extensions()
    with os.scandir(folder) as entries:
        images = (e.name for e in entries if os.path.splitext(e.name)[1].lower() in known)
        first, second = next(images, None), next(images, None)
    return Path(folder, first) if first is not None and second is None else None
