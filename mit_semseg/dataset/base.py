"""The base of data set formats: where records, classes and label map of a data set come from."""

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
    title: str = ""  # named in messages
    num_class: int | None = None  # of a public data set
    table: str = ""  # its class table, a file of the folder `tables` without `.csv`
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

    def classes(self, options: DataOptions) -> ClassTable:
        """The class table; numbered classes where there is none.

        Raises:
            ValueError: `options.num_class` does not fit it.
        """
        if not self.table:
            return ClassTable.numbered(options.num_class)
        return table_of(self.table, options.num_class, self.title)

    def classes_for(self, root: Path, splits: Sequence[str], options: DataOptions) -> ClassTable:
        """As `classes`, for data sets whose own files name the classes of these splits."""
        return self.classes(options)

    def count_for(self, root: Path, split: str) -> int | None:
        """How many classes a split has, where its files or the data set say so."""
        return self.num_class

    @abstractmethod
    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        """How these records' masks are to be read, `options.ignore_label` not yet applied."""


class PairedFolders(DataFormat):
    """A data set of two folders a split: images, and masks of the same names."""

    @abstractmethod
    def layouts(self, split: str) -> Sequence[tuple[str, str]]:
        """The folders (images, masks) of a split, below the root; of several the first there is."""

    def records(self, root: Path, split: str) -> list[Record]:
        layouts = self.layouts(split)
        for images, masks in layouts:
            if (root / images).is_dir() and (root / masks).is_dir():
                return pair_folders(root, images, masks)
        images, masks = layouts[0]
        raise not_here(root, self.title, f"the folders {images} and {masks}", self.table)


def not_here(root: Path, title: str, expected: str, name: str) -> FileNotFoundError:
    """The error about a data set that is not below its root.

    Args:
        root: `DATASET.root_dataset`.
        title: of the data set.
        expected: a file or folder that is missing.
        name: of the data format.
    """
    return FileNotFoundError(
        f"{root}: no {title} here, expected {expected}; check DATASET.root_dataset, or run "
        f"mit-semseg data download {name}"
    )
