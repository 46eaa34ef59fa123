"""What a data set is: records, a class table, and a map from stored values to classes."""

from __future__ import annotations

import colorsys
import csv
import itertools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.records import Record, find_depth, locate, read_odgt
from mit_semseg.dataset.transforms import ImageFile, load_depth, stored_values
from mit_semseg.registry import Registry

PathLike = str | os.PathLike[str]

FORMATS = Registry("data set format")
TABLES = Path(__file__).parent / "tables"

_UNKNOWN = -2  # in lookup tables: neither a class nor ignored
# White in 8 and 16 bits: what masks of two classes store beside 0, and others for "no label".
_WHITE = (255, 65535)


# ------------------------------------------------------------------------------ classes
def distinct_colors(count: int) -> np.ndarray:
    """`count` well separated colours, (count, 3) uint8: hues a golden angle apart."""
    colors = [
        colorsys.hsv_to_rgb((0.6180339887 * k) % 1, (0.55, 0.95, 0.75)[k % 3], (0.95, 0.75)[k % 2])
        for k in range(count)
    ]
    return np.rint(np.array(colors).reshape(-1, 3) * 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Names and colours of the classes, in class order.

    Attributes:
        names: K names.
        colors: (K, 3) uint8 RGB.
    """

    names: tuple[str, ...]
    colors: np.ndarray

    def __post_init__(self) -> None:
        if self.colors.shape != (len(self.names), 3):
            raise ValueError(
                f"a class table of {len(self.names)} names needs colors of shape "
                f"({len(self.names)}, 3); got {self.colors.shape}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, names: Iterable[str]) -> ClassTable:
        """A table of these names with generated colours."""
        names = tuple(names)
        return cls(names, distinct_colors(len(names)))

    @classmethod
    def numbered(cls, count: int) -> ClassTable:
        """`class 0`, `class 1`, ...: for data whose classes have no names."""
        return cls.of(f"class {k}" for k in range(count))

    @classmethod
    def load(cls, path: PathLike) -> ClassTable:
        """A csv with columns Idx (from 1, in order), Name and optionally R, G, B.

        Of several names joined by `;` the first is kept. Without R, G, B colours are generated.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a column is missing, a row is out of order, or a colour is outside 0..255.
        """
        name = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name}: no such class table; check DATASET.classes")
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        columns = set(rows[0]) if rows else set()
        if not {"Idx", "Name"} <= columns:
            raise ValueError(f"{name}: a class table needs the columns Idx,Name[,R,G,B] and rows")
        names, colors = [], []
        for number, row in enumerate(rows, 1):
            if row["Idx"] != str(number):
                raise ValueError(f"{name}: Idx is {row['Idx']!r} in row {number}; count from 1")
            names.append((row["Name"] or "").split(";")[0].strip())
            if {"R", "G", "B"} <= columns:
                values = [str(row[c]).strip() for c in "RGB"]
                if not all(v.isdecimal() and int(v) <= 255 for v in values):
                    raise ValueError(f"{name}: row {number} has colour {values}; use 0..255")
                colors.append([int(v) for v in values])
        if not colors:
            return cls.of(names)
        return cls(tuple(names), np.array(colors, dtype=np.uint8))

    def save(self, path: PathLike) -> None:
        """Write the table as csv with columns Idx,Name,R,G,B."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["Idx", "Name", "R", "G", "B"])
            for number, (name, color) in enumerate(zip(self.names, self.colors.tolist()), 1):
                writer.writerow([number, name, *color])


# ------------------------------------------------------------------------------ labels
def _two_classes(white: int) -> str:
    """What to set for masks that store two classes as black and white."""
    return (
        f"if 0 and {white} are two classes, set DATASET.num_class 2 DATASET.label_map "
        f'"[[0, 0], [{white}, 1]]"'
    )


class LabelMap:
    """From stored mask values to class ids, -1 for ignored, by a lookup table.

    Args:
        values: stored value -> class id in 0..num_class-1, or -1 for ignored.
        num_class: number of classes.
        hint: added to the error about a stored value that is not in `values`.
        mirror_pairs: classes that a mirror turns into each other, such as left and right arm.

    Example:
        >>> LabelMap.shifted(3, label_offset=0, ignore_label=[255])(np.array([[0, 2, 255]]))
        array([[ 0,  2, -1]])
    """

    def __init__(
        self,
        values: Mapping[int, int],
        num_class: int,
        hint: str = "",
        mirror_pairs: Iterable[tuple[int, int]] = (),
    ) -> None:
        if not values or min(values) < 0:
            raise ValueError("a label map needs stored values of 0 and above")
        if min(values.values()) < -1 or max(values.values()) >= num_class:
            raise ValueError(f"a label map for {num_class} classes maps to -1..{num_class - 1}")
        self.values = dict(values)
        self.num_class = num_class
        self.hint = hint
        self.mirror_pairs = tuple(mirror_pairs)
        self._table = np.full(max(values) + 1, _UNKNOWN, dtype=np.int64)
        self._table[list(values)] = list(values.values())
        self._run = next(k for k in itertools.count() if k not in values)  # 0..run-1 are known
        self._bytes = bytes(value for value in values if value < 256)

    @classmethod
    def shifted(
        cls, num_class: int, label_offset: int = 1, ignore_label: Iterable[int] = ()
    ) -> LabelMap:
        """Stored value minus `label_offset` is the class; values below the offset are ignored."""
        if label_offset < 0:
            raise ValueError(f"DATASET.label_offset is {label_offset}; it must be 0 or more")
        values = {v: max(v - label_offset, -1) for v in range(num_class + label_offset)}
        hint = f" (num_class {num_class}, label_offset {label_offset})"
        return cls(values, num_class, hint).ignoring(ignore_label)

    @classmethod
    def of_options(cls, options: DataOptions) -> LabelMap:
        """The map that `label_map`, or else `label_offset`, describes; `ignore_label` on top."""
        if not options.label_map:
            return cls.shifted(options.num_class, options.label_offset, options.ignore_label)
        values = {int(stored): int(class_id) for stored, class_id in options.label_map}
        return cls(values, options.num_class, " (DATASET.label_map)").ignoring(options.ignore_label)

    def ignoring(self, stored: Iterable[int]) -> LabelMap:
        """The same map with these stored values ignored as well."""
        extra = {int(value): -1 for value in stored}
        if any(value < 0 for value in extra):
            raise ValueError(
                f"DATASET.ignore_label is {sorted(extra)}; masks store values of 0 and above"
            )
        if not extra:
            return self
        return LabelMap({**self.values, **extra}, self.num_class, self.hint, self.mirror_pairs)

    def pairing(self, mirror_pairs: Iterable[tuple[int, int]]) -> LabelMap:
        """The same map with these classes for ones that a mirror turns into each other."""
        return LabelMap(self.values, self.num_class, self.hint, mirror_pairs)

    @cached_property
    def mirrored(self) -> LabelMap:
        """The map for masks of mirrored images: the classes of each of `mirror_pairs` swapped."""
        if not self.mirror_pairs:
            return self
        other = dict(self.mirror_pairs) | {b: a for a, b in self.mirror_pairs}
        values = {stored: other.get(k, k) for stored, k in self.values.items()}
        return LabelMap(values, self.num_class, self.hint, self.mirror_pairs)

    def describe(self) -> str:
        """The stored values that are classes or ignored, as `0..11, 255`."""
        known = sorted(self.values)
        runs: list[list[int]] = []
        for value in known:
            if runs and value == runs[-1][1] + 1:
                runs[-1][1] = value
            else:
                runs.append([value, value])
        return ", ".join(f"{a}..{b}" if a < b else f"{a}" for a, b in runs)

    def complaint(self, stored: Iterable[int], file: PathLike, others: Iterable[int] = ()) -> str:
        """What to say about a file that holds these stored values; "" when all are known.

        Args:
            stored: the values.
            file: named in what is said.
            others: values of further files of the same kind.
        """
        bad = sorted(set(stored) - set(self.values))
        if not bad:
            return ""
        message = (
            f"{os.fspath(file)}: label {', '.join(map(str, bad[:8]))} is outside {self.describe()}"
        )
        ignore = f"DATASET.ignore_label {bad[0] if len(bad) == 1 else bad[:8]}"
        found, white = {*stored, *others}, bad[0]
        if white in _WHITE and (found == {0, white} or (found == {white} and self.num_class <= 2)):
            message += f"; {_two_classes(white)}"
            return message + (f", else {ignore}" if self.num_class > 2 else "")
        return f"{message}; set {ignore} or a label map{self.hint}"

    def check(self, raw: np.ndarray, file: PathLike = "mask") -> None:
        """Refuse stored values that are neither a class nor ignored, without mapping them.

        Args:
            raw: integers of any shape.
            file: named in the error.

        Raises:
            ValueError: there is such a value.
        """
        if not raw.size:
            return
        low, high = 0 if raw.dtype.kind == "u" else int(raw.min()), int(raw.max())
        if low >= 0 and high < self._run:  # nearly always; the extremes are found very quickly
            return
        if raw.dtype == np.uint8:
            unknown = bool(raw.tobytes().translate(None, self._bytes))  # what is left of them
        else:
            in_table = low >= 0 and high < len(self._table)
            unknown = not in_table or bool((self._table[raw] == _UNKNOWN).any())
        if unknown:
            raise ValueError(self.complaint(np.unique(raw).tolist(), file))

    def __call__(self, raw: np.ndarray, file: PathLike = "mask") -> np.ndarray:
        """Class ids of stored values.

        Args:
            raw: integers of any shape.
            file: named in the error.

        Returns:
            int64 of the same shape, -1 = ignored.

        Raises:
            ValueError: a stored value is neither a class nor ignored.
        """
        self.check(raw, file)
        return self._table[raw]


# ------------------------------------------------------------------------------ formats
@dataclass(frozen=True)
class Archive:
    """One archive of a public data set.

    Attributes:
        urls: places of the same file, in order of preference; none where the owner asks for a
            registration or a consent first, so that people fetch it themselves.
        sha256: of the file, or None where it is not known.
        member: the folder in the archive whose content is unpacked; "" unpacks all.
        into: folder below the data set's that it is unpacked to.
        name: of its file, where no url says it.
    """

    urls: tuple[str, ...]
    sha256: str | None = None
    member: str = ""
    into: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.urls and not self.name:
            raise ValueError("an Archive needs a url, or a name")

    @property
    def file_name(self) -> str:
        """Name of the archive in the data set's folder."""
        return self.name or self.urls[0].rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Source:
    """Where a public data set comes from.

    Attributes:
        title: its name in full.
        licence: terms in one line.
        home: page of the data set.
        layout: what the folder must hold, for people who fetch it by hand.
        folder: usual name of the data set's folder, below `data/`.
        archives: what to download, or to fetch by hand, and unpack.
        lists: split -> list file to write beside the folder, for recipes that read lists.
    """

    title: str
    licence: str
    home: str
    layout: str
    folder: str
    archives: tuple[Archive, ...] = ()
    lists: Mapping[str, str] = field(default_factory=dict)


class DataFormat(ABC):
    """One kind of data: a subclass in its own file, registered by name in `FORMATS`."""

    source: Source | None = None
    num_class: int | None = None  # of a public data set
    # How its depth images are stored, as DATASET.depth_scale; None: it has none.
    depth_scale: float | str | None = None
    # Classes that a mirror turns into each other: a mirrored left arm is a right arm.
    mirror_pairs: tuple[tuple[int, int], ...] = ()
    # Entries of list_train / list_val are split names; the published default lists mean these.
    default_splits: Mapping[str, str] = {
        "./data/training.odgt": "train",
        "./data/validation.odgt": "val",
    }

    @abstractmethod
    def records(self, root: Path, split: str) -> list[Record]:
        """Records of one split, paths relative to `root` or absolute."""

    def records_for(self, root: Path, split: str, options: DataOptions) -> list[Record]:
        """As `records`, for data sets whose masks are made as the options ask for them."""
        return self.records(root, split)

    @abstractmethod
    def classes(self, options: DataOptions) -> ClassTable:
        """The class table; ValueError when `options.num_class` does not fit it."""

    def classes_for(self, root: Path, splits: Sequence[str], options: DataOptions) -> ClassTable:
        """As `classes`, for data sets whose own files name the classes of these splits."""
        return self.classes(options)

    def count_for(self, root: Path, split: str) -> int | None:
        """How many classes a split has, where its files or the data set say so."""
        return self.num_class

    @abstractmethod
    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        """How these records' masks are to be read, `options.ignore_label` not yet applied."""


def table_of(name: str, num_class: int, title: str) -> ClassTable:
    """A table of the package, checked against the configured class count."""
    table = ClassTable.load(TABLES / f"{name}.csv")
    if len(table) != num_class:
        raise ValueError(
            f"DATASET.num_class is {num_class}, but {title} has {len(table)} classes; "
            f"set DATASET.num_class {len(table)}"
        )
    return table


def first_layout(root: Path, candidates: Sequence[tuple[str, str]], title: str) -> tuple[str, str]:
    """The first pair of folders (images, labels) that exists below `root`.

    Raises:
        FileNotFoundError: none does; the first is named as what is expected.
    """
    for images, labels in candidates:
        if (root / images).is_dir() and (root / labels).is_dir():
            return images, labels
    images, labels = candidates[0]
    raise FileNotFoundError(
        f"{root}: no {title} here, expected the folders {images} and {labels}; "
        "check DATASET.root_dataset, or see `mit-semseg data download`"
    )


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set.

    Attributes:
        records: samples, with absolute paths.
        classes: names and colours.
        label_map: stored value -> class id or -1.
    """

    records: list[Record]
    classes: ClassTable
    label_map: LabelMap


def entries_of(dataset_cfg: Any, which: str, data_format: DataFormat) -> list[str]:
    """The entries of `list_train` or `list_val`, default lists turned into splits."""
    lists = getattr(dataset_cfg, f"list_{which}")
    entries = [lists] if isinstance(lists, str) else lists
    return [data_format.default_splits.get(entry, entry) for entry in entries]


def class_table(dataset_cfg: Any, which: str = "train") -> ClassTable:
    """The class table of a configuration: `DATASET.classes`, else the data set's own.

    Args:
        dataset_cfg: `cfg.DATASET`.
        which: `"train"` or `"val"`: where the files of a data set name its classes, those of
            `list_train` or `list_val`.

    Raises:
        FileNotFoundError: `DATASET.classes`, or a file that names the classes, does not exist.
        ValueError: unknown format, or the table does not have `num_class` rows.
    """
    options = DataOptions.read(dataset_cfg)
    data_format: DataFormat = FORMATS.get(getattr(dataset_cfg, "format", "odgt"))()
    root = Path(getattr(dataset_cfg, "root_dataset", ""))
    own = data_format.classes_for(root, entries_of(dataset_cfg, which, data_format), options)
    path = getattr(dataset_cfg, "classes", "")
    if not path:
        return own
    table = ClassTable.load(locate(path, root, "DATASET.classes"))
    if len(table) != options.num_class:
        raise ValueError(
            f"{path} has {len(table)} classes, but DATASET.num_class is {options.num_class}; "
            "make them equal"
        )
    return table


def build_split(dataset_cfg: Any, which: str) -> Split:
    """Records, classes and label map of the training or validation data of a configuration.

    Args:
        dataset_cfg: `cfg.DATASET`.
        which: `"train"` or `"val"`: reads `list_train` or `list_val`.

    Raises:
        FileNotFoundError: a list or folder is missing.
        ValueError: an unknown format, a bad list, or a class count that does not fit.
    """
    if which not in ("train", "val"):
        raise ValueError(f"a split is 'train' or 'val', not {which!r}")
    options = DataOptions.read(dataset_cfg)
    classes = class_table(dataset_cfg, which)
    data_format: DataFormat = FORMATS.get(getattr(dataset_cfg, "format", "odgt"))()
    root = getattr(dataset_cfg, "root_dataset", "")
    records: list[Record] = []
    for entry in entries_of(dataset_cfg, which, data_format):
        if entry.endswith(".odgt"):  # any data set can be narrowed by a custom list
            records += read_odgt(locate(entry, root))
        else:
            records += data_format.records_for(Path(root), entry, options)
    if not records:
        lists = getattr(dataset_cfg, f"list_{which}")
        raise ValueError(f"DATASET.list_{which} is {lists!r}: it names no records")
    if options.depth:
        flat = [record["fpath_img"] for record in records if "fpath_depth" not in record]
        if flat:
            raise ValueError(
                f"DATASET.depth is True, but DATASET.list_{which} gives no depth for {len(flat)} "
                f"of {len(records)} images, the first is {flat[0]}; add 'fpath_depth' to the list"
            )
    else:
        for record in records:
            record.pop("fpath_depth", None)
    label_map = data_format.label_map(records, options).ignoring(options.ignore_label)
    if data_format.mirror_pairs:
        label_map = label_map.pairing(data_format.mirror_pairs)
    return Split([absolute(record, root) for record in records], classes, label_map)


def absolute(record: Record, root: PathLike) -> Record:
    """The record with its paths made absolute, from `root`."""
    full = record.copy()
    for key in ("fpath_img", "fpath_segm", "fpath_depth"):
        if key in record:
            path = os.path.abspath(os.path.join(root, record[key]))  # type: ignore[literal-required]
            full[key] = path  # type: ignore[literal-required]
    return full


def check_channels(in_channels: int, dataset_cfg: Any) -> None:
    """Refuse a number of input channels that the data set does not have.

    Args:
        in_channels: `MODEL.in_channels`.
        dataset_cfg: `cfg.DATASET`.

    Raises:
        ValueError: `MODEL.in_channels` and `DATASET.depth` disagree, or the format has no depth.
    """
    options = DataOptions.read(dataset_cfg)
    if options.depth and FORMATS.get(options.format)().depth_scale is None:
        with_depth = [n for n in FORMATS.names() if FORMATS.get(n)().depth_scale is not None]
        raise ValueError(
            f"DATASET.depth is True, but DATASET.format {options.format} has no depth; it is in "
            f"{' and '.join(with_depth)} (lists with 'fpath_depth')"
        )
    if in_channels != 3 + options.depth:
        raise ValueError(
            f"MODEL.in_channels is {in_channels} and DATASET.depth {options.depth}: set "
            f"MODEL.in_channels {3 + options.depth}, or DATASET.depth {not options.depth}"
        )


# ------------------------------------------------------------------------------ samples
def paths_of(record: Record, root: PathLike = "") -> tuple[str, str]:
    """Image and mask file of a record.

    Raises:
        ValueError: the list gives no mask.
    """
    if "fpath_segm" not in record:
        raise ValueError(f"{record['fpath_img']}: the list gives no mask; add 'fpath_segm'")
    return os.path.join(root, record["fpath_img"]), os.path.join(root, record["fpath_segm"])


def load_values(record: Record, root: PathLike, size: tuple[int, int]) -> np.ndarray:
    """Stored mask values of a record, checked to be of the size they should be.

    Args:
        record: with a mask.
        root: folder that relative paths are relative to.
        size: (width, height) of the image file, upright by EXIF.

    Returns:
        (H, W) integers of the mask file's own type, maybe read-only.

    Raises:
        FileNotFoundError: the mask is missing.
        ValueError: it is unreadable, or sizes disagree; the file is named.
    """
    image_path, mask_path = paths_of(record, root)
    width, height = size
    raw = stored_values(mask_path)
    if "width" in record and (record["width"], record["height"]) != (width, height):
        raise ValueError(
            f"{image_path}: {width}x{height} pixels (upright by EXIF), but its list says "
            f"{record['width']}x{record['height']}; correct the list (mit-semseg data make-odgt)"
        )
    if raw.shape != (height, width):
        raise ValueError(
            f"{mask_path}: {raw.shape[1]}x{raw.shape[0]} pixels, but its image {image_path} has "
            f"{width}x{height} (upright by EXIF); masks must be as large as their images"
        )
    return raw


def load_raw(record: Record, root: PathLike = "") -> tuple[np.ndarray, np.ndarray]:
    """Image and stored mask values of a record, checked to be of the size they should be.

    Returns:
        (H, W, 3) uint8 RGB and (H, W) integers of the mask file's own type, maybe read-only.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is unreadable, or sizes disagree; the file is named.
    """
    image_path, _ = paths_of(record, root)
    with ImageFile(image_path) as file:
        raw = load_values(record, root, file.size)
        return file.pixels(), raw


def depth_scale(options: DataOptions) -> float | str:
    """`options.depth_scale`, or where it is "auto" that of `options.format`."""
    if options.depth_scale != "auto":
        return options.depth_scale
    own: float | str | None = FORMATS.get(options.format)().depth_scale
    return 1000.0 if own is None else own


def load_depth_of(
    record: Record, root: PathLike, options: DataOptions, size: tuple[int, int]
) -> np.ndarray | None:
    """Depth of a record, checked to be of the size it should be.

    Args:
        record: with `fpath_depth`.
        root: folder that relative paths are relative to.
        options: whether there is to be depth, and how it is stored.
        size: (width, height) of the image file, upright by EXIF.

    Returns:
        (H, W) float32 in metres, 0 where there is none; None unless `options.depth`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the record names none, it is unreadable, or sizes disagree.
    """
    if not options.depth:
        return None
    if "fpath_depth" not in record:
        raise ValueError(
            f"{record['fpath_img']}: the list gives no depth; add 'fpath_depth', or set "
            "DATASET.depth False"
        )
    path = os.path.join(root, record["fpath_depth"])
    depth = load_depth(path, depth_scale(options))
    if depth.shape != size[::-1]:
        raise ValueError(
            f"{path}: {depth.shape[1]}x{depth.shape[0]} pixels, but its image "
            f"{record['fpath_img']} has {size[0]}x{size[1]}; depth must be as large as its image"
        )
    return depth


def load_depth_beside(
    image: PathLike, options: DataOptions, size: tuple[int, int]
) -> np.ndarray | None:
    """As `load_depth_of`, of the depth image that `find_depth` finds for an image file."""
    if not options.depth:
        return None
    depth = find_depth(image)
    if depth is None:
        stem = Path(image).stem
        raise FileNotFoundError(
            f"{os.fspath(image)}: no depth image; put {stem}_depth.png beside it, or "
            f"depth/{stem}.png beside its folder"
        )
    record = Record(fpath_img=os.fspath(image), fpath_depth=os.fspath(depth))
    return load_depth_of(record, "", options, size)


# Image (h, w, 3) uint8, labels, and, with DATASET.depth, normalised depth (h, w) float32.
Sample = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image at the size that it is trained at, and where its labels are to be looked up.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        depth: (h, w) float32, normalised; None where there is none.
        stored: the mask as its file has it, (H, W) integers, checked.
        rows, columns: h and w indices: where in `stored` the label of each pixel of the image is.
        label_map: stored value -> class id or -1.
        mask_path: the mask's file, named in errors.
    """

    image: np.ndarray
    depth: np.ndarray | None
    stored: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    label_map: LabelMap
    mask_path: str

    def mirrored(self) -> Picture:
        """The whole picture with left and right swapped, in classes too; before it is cut."""
        return replace(
            self,
            image=_mirrored(self.image),
            depth=None if self.depth is None else _mirrored(self.depth),
            columns=self.stored.shape[1] - 1 - self.columns,
            label_map=self.label_map.mirrored,
        )

    def cut(self, down: slice, right: slice) -> Picture:
        """The part of it in these rows and columns."""
        return replace(
            self,
            image=self.image[down, right],
            depth=None if self.depth is None else self.depth[down, right],
            rows=self.rows[down],
            columns=self.columns[right],
        )

    def labels(self, rate: int = 1) -> np.ndarray:
        """Class ids, int64 with -1 ignored, of the pixel in the middle of each rate x rate block.

        It is what Pillow's nearest resize by 1/rate takes of labels that are padded to a multiple
        of `rate`; only those are ever looked up.
        """
        rows, columns = self.rows[rate // 2 :: rate], self.columns[rate // 2 :: rate]
        return self.label_map(self.stored[rows][:, columns], self.mask_path)


def _mirrored(image: np.ndarray) -> np.ndarray:
    """An image or depth with left and right swapped; by torch, which is 20 times as fast."""
    return torch.from_numpy(image).flip(1).numpy()


class BatchStyle(Protocol):
    """How a sample is made of a picture: the one step in which the batch styles differ.

    Called with a function that reads the picture, its short side at the first argument unless its
    long side would pass the second; the short side drawn for the batch; and the generator that
    every random number is to be drawn from.

    Attributes:
        by_orientation: a batch holds images of one orientation only.
    """

    by_orientation: bool

    def __call__(
        self, read: Callable[[float, float], Picture], short: int, rng: np.random.Generator
    ) -> Sample: ...


def load_pair(record: Record, root: PathLike, label_map: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """Image and class ids of a record.

    Returns:
        (H, W, 3) uint8 RGB and (H, W) int64 with -1 = ignored.

    Raises:
        FileNotFoundError, ValueError: as `load_raw`; ValueError also for an unknown stored value.
    """
    image, raw = load_raw(record, root)
    return image, label_map(raw, paths_of(record, root)[1])


def check_sample(split: Split, n: int = 32, seed: int = 0, *, on_error: str = "stop") -> list[str]:
    """Load up to `n` random samples before a long run starts, and warn of what looks wrong.

    Args:
        split: the samples.
        n: how many to load at most.
        seed: of the choice.
        on_error: `DATASET.on_error`; with "skip" a sample that cannot be used is a warning too.

    Returns:
        The warnings, which are also logged; empty when nothing is suspicious.

    Raises:
        FileNotFoundError, ValueError: a sample cannot be used, as `load_pair` says it, or, with
            "skip", none of those that were loaded.
    """
    count = min(n, len(split.records))
    chosen = np.random.default_rng(seed).choice(len(split.records), count, replace=False)
    stored: set[int] = set()
    seen: set[int] = set()
    ignored = pixels = 0
    warnings: list[str] = []
    for index in sorted(chosen.tolist()):
        record = split.records[index]
        try:
            _, raw = load_raw(record)
            ids = split.label_map(raw, paths_of(record)[1])
            if "fpath_depth" in record:  # how it is stored does not matter here
                as_read = DataOptions(depth=True, depth_scale=1)
                load_depth_of(record, "", as_read, (ids.shape[1], ids.shape[0]))
        except (OSError, ValueError) as error:
            warnings.append(str(error))
            if on_error != "skip" or len(warnings) == count:
                raise
            continue
        stored.update(np.unique(raw).tolist())
        seen.update(np.unique(ids).tolist())
        ignored += int(np.count_nonzero(ids < 0))
        pixels += ids.size
    where = f"{count - len(warnings)} sampled masks"
    names = [split.classes.names[k] for k in seen - {-1}]
    warnings += label_warnings(stored, ignored, pixels, where, names, len(split.classes))
    for warning in warnings:
        logging.getLogger("mit_semseg").warning("%s", warning)
    return warnings


def label_warnings(
    stored: Collection[int],
    ignored: int,
    pixels: int,
    where: str,
    names: Sequence[str],
    num_class: int,
) -> list[str]:
    """What is suspicious about stored values, ignored pixels and the classes of the others.

    Args:
        stored: values that occur.
        ignored, pixels: how many of all pixels are ignored.
        where: what was looked at.
        names: of the classes that occur, out of `num_class`.
    """
    warnings = []
    if pixels and ignored / pixels > 0.5:
        warnings.append(
            f"{100 * ignored / pixels:.0f} % of pixels are ignored in {where}; "
            "check DATASET.label_offset and DATASET.ignore_label"
        )
    white = max(stored, default=0)
    if white in _WHITE and set(stored) == {0, white} and ignored:
        warnings.append(
            f"{where} hold only 0 and {white}, one of which is ignored: {_two_classes(white)}"
        )
    elif len(names) == 1 and num_class > 1:
        warnings.append(
            f"all labelled pixels in {where} are of one class out of {num_class}, {names[0]}; "
            "check DATASET.label_map, DATASET.label_offset and DATASET.ignore_label"
        )
    return warnings
