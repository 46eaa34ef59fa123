"""Custom data: list files, or a folder of images and a folder of masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, DataFormat
from mit_semseg.dataset.classes import TABLES, ClassTable
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record, locate, pair_folders, read_odgt, two_places


@FORMATS.register("odgt")
class OdgtFormat(DataFormat):
    """List files with one JSON record per line; stored values are shifted by `label_offset`."""

    default_splits = {}
    depth_scale: float | str | None = 1000.0

    def records(self, root: Path, split: str) -> list[Record]:
        if two_places(split) and not (Path(split).exists() or (root / split).exists()):
            raise ValueError(
                f"DATASET.list_train / list_val is {split!r}, which is not a list file: set "
                "DATASET.format folder for images_dir:labels_dir, coco for images_dir:FILE.json"
            )
        return read_odgt(locate(split, root))

    def classes(self, options: DataOptions) -> ClassTable:
        if options.num_class == 150:  # the published lists
            return ClassTable.load(TABLES / "ade20k.csv")
        return ClassTable.numbered(options.num_class)

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap.of_options(options)


@FORMATS.register("folder")
class FolderFormat(OdgtFormat):
    """`images_dir:labels_dir`, matched by file name without extension."""

    depth_scale = None

    def records(self, root: Path, split: str) -> list[Record]:
        pairs = two_places(split)
        if not pairs:
            raise ValueError(
                f"DATASET.list_train / list_val is {split!r}; for DATASET.format folder give "
                "'images_dir:labels_dir'"
            )
        for images, labels in pairs:
            if (root / images).is_dir() and (root / labels).is_dir():
                return pair_folders(root, images, labels)
        if split.lower().endswith(".json"):
            raise ValueError(
                f"DATASET.list_train / list_val is {split!r}: for an annotation file set "
                "DATASET.format coco"
            )
        return pair_folders(root, *pairs[0])
