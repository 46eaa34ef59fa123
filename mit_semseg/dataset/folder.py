"""Data of the user's own: list files, or a folder of images beside a folder of masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg.dataset.base import (
    FORMATS,
    TABLES,
    ClassTable,
    DataFormat,
    LabelMap,
)
from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.records import Record, locate, pair_folders, read_odgt


@FORMATS.register("odgt")
class OdgtFormat(DataFormat):
    """List files of one JSON record a line; stored values are shifted by `label_offset`."""

    default_splits = {}
    depth_scale: float | str | None = 1000.0

    def records(self, root: Path, split: str) -> list[Record]:
        return read_odgt(locate(split, root))

    def classes(self, options: DataOptions) -> ClassTable:
        if options.num_class == 150:  # the published lists
            return ClassTable.load(TABLES / "ade20k.csv")
        return ClassTable.numbered(options.num_class)

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap.of_options(options)


@FORMATS.register("folder")
class FolderFormat(OdgtFormat):
    """`images_dir:labels_dir`, matched by name without extension."""

    depth_scale = None

    def records(self, root: Path, split: str) -> list[Record]:
        # A Windows drive ("C:\\x") has a colon of its own, so split at one that leaves two folders.
        places = [k for k, letter in enumerate(split) if letter == ":"]
        pairs = [(split[:k], split[k + 1 :]) for k in places if k > 0 and split[k + 1 :]]
        if not pairs:
            raise ValueError(
                f"DATASET.list_train / list_val is {split!r}; for DATASET.format folder give "
                "'images_dir:labels_dir'"
            )
        for images, labels in pairs:
            if (root / images).is_dir() and (root / labels).is_dir():
                return pair_folders(root, images, labels)
        return pair_folders(root, *pairs[0])
