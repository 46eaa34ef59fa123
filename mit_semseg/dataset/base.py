"""Base classes of data formats, which provide the records, classes and label map of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mit_semseg.config import DataOptions
from mit_semseg.dataset.classes import ClassTable, table_of
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record, pair_folders
from mit_semseg.registry import Registry

FORMATS: Registry[type[DataFormat]] = Registry("data set format")


@dataclass(frozen=True)
class Archive:
    """One archive of a public data set.

    Attributes:
        urls: URLs of the same file, in order of preference; empty if the owner requires a
            registration or consent, so that users must download it themselves.
        sha256: digest of the file, or None if it is not known.
        member: folder in the archive whose content is unpacked; "": everything.
        into: subfolder of the data set's folder that it is unpacked to.
        name: its file name, if there is no URL.
    """

    urls: tuple[str, ...]
    sha256: str | None = None
    member: str = ""
    into: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.urls and not self.name:
            raise ValueError("an Archive needs a URL or a name")

    @property
    def file_name(self) -> str:
        """Name of the archive in the data set's folder."""
        return self.name or self.urls[0].rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Source:
    """Origin of a public data set.

    Attributes:
        title: its full name.
        licence: terms in one line.
        home: its web page.
        layout: required content of the folder, for manual downloads.
        folder: usual name of its folder in `data/`.
        archives: archives to download and unpack.
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
    """A data format: a subclass in its own file, registered by name in `FORMATS`."""

    source: Source | None = None
    title: str = ""  # for messages
    num_class: int | None = None  # of a public data set
    table: str = ""  # its class table, a file in the folder `tables` without `.csv`
    reads_classes: bool = False  # whether it reads DATASET.classes itself
    # DATASET.depth_scale of its depth images; None: there are none.
    depth_scale: float | str | None = None
    # Pairs of classes that a horizontal flip exchanges, such as left and right arm.
    mirror_pairs: tuple[tuple[int, int], ...] = ()
    # Published default lists -> splits. Other entries of list_train / list_val are splits.
    default_splits: Mapping[str, str] = {
        "./data/training.odgt": "train",
        "./data/validation.odgt": "val",
    }

    @abstractmethod
    def records(self, root: Path, split: str) -> list[Record]:
        """Records of one split, with paths relative to `root` or absolute."""

    def records_for(self, root: Path, split: str, options: DataOptions) -> list[Record]:
        """As `records`, for data sets whose masks depend on the options."""
        return self.records(root, split)

    def classes(self, options: DataOptions) -> ClassTable:
        """The class table; numbered classes if there is none.

        Raises:
            ValueError: it does not have `options.num_class` rows.
        """
        if not self.table:
            return ClassTable.numbered(options.num_class)
        return table_of(self.table, options.num_class, self.title)

    def classes_for(self, root: Path, splits: Sequence[str], options: DataOptions) -> ClassTable:
        """As `classes`, for data sets whose files name the classes of these splits."""
        return self.classes(options)

    def count_for(self, root: Path, split: str) -> int | None:
        """Number of classes of a split, if its files or the data set define it."""
        return self.num_class

    @abstractmethod
    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        """The label map for these records, without `options.ignore_label`."""


class PairedFolders(DataFormat):
    """A data set with two folders per split: images, and masks of the same names."""

    @abstractmethod
    def layouts(self, split: str) -> Sequence[tuple[str, str]]:
        """Possible folders (images, masks) of a split, below the root; the first pair is used."""

    def records(self, root: Path, split: str) -> list[Record]:
        layouts = self.layouts(split)
        for images, masks in layouts:
            if (root / images).is_dir() and (root / masks).is_dir():
                return pair_folders(root, images, masks)
        images, masks = layouts[0]
        raise not_here(root, self.title, f"the folders {images} and {masks}", self.table)


def not_here(root: Path, title: str, expected: str, name: str) -> FileNotFoundError:
    """The error for a data set that is not in its folder.

    Args:
        root: `DATASET.root_dataset`.
        title: name of the data set.
        expected: a missing file or folder.
        name: name of the data format.
    """
    return FileNotFoundError(
        f"{root}: no {title} here, expected {expected}; check DATASET.root_dataset, or run "
        f"mit-semseg data download {name}"
    )
