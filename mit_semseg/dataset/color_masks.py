"""Custom data: images, and masks in the colours of a class table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS
from mit_semseg.dataset.class_files import ClassFile
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.folder import FolderFormat
from mit_semseg.dataset.images import load_image
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.mask_cache import FOLDER, MaskJob, converted_masks
from mit_semseg.dataset.records import Record, locate

_MOST = 256  # rows of a table, which masks store in 8 bits


@FORMATS.register("colors")
class ColorMasks(FolderFormat):
    """`images_dir:masks_dir`; `DATASET.classes` has the colours, in any form of `ClassFile`.

    The rows of the table are the classes. Rows whose numbers, from 0, are in
    `DATASET.ignore_label` are ignored, and the classes after them move up. Masks of row numbers are
    computed once, in `semantic_masks` beside the data, and again when a mask or the table changes.
    """

    reads_classes = True

    def records_for(self, root: Path, split: str, options: DataOptions) -> list[Record]:
        table = _table(root, options)
        assert table.colors is not None
        mark = hashlib.sha256(table.colors.tobytes() + split.encode("utf-8", "surrogateescape"))
        folder = f"{FOLDER}/colors-{mark.hexdigest()[:8]}"
        jobs = []
        for record in self.records(root, split):
            source = record["fpath_segm"]
            # Without "/" and "..", so that the masks stay in their folder.
            parts = [part for part in PurePosixPath(source).parts if part not in ("/", "//", "..")]
            target = PurePosixPath(folder, *parts).with_suffix(".png")
            changed = Record(fpath_img=record["fpath_img"], fpath_segm=str(target))
            jobs.append((root / source, MaskJob(changed, partial(_rows, root / source, table))))
        return converted_masks(root, jobs, "class")

    def classes(self, options: DataOptions) -> ClassTable:
        return self.classes_for(Path(options.root_dataset), (), options)

    def classes_for(self, root: Path, splits: Sequence[str], options: DataOptions) -> ClassTable:
        table = _table(root, options)
        assert table.colors is not None
        kept = _kept(table, options)
        if len(kept) != options.num_class:
            ignored = len(table.names) - len(kept)
            raise ValueError(
                f"DATASET.num_class is {options.num_class}, but {table.path} has "
                f"{len(table.names)} classes, {ignored} of which are ignored "
                f"(DATASET.ignore_label); set DATASET.num_class {len(kept)}"
            )
        return ClassTable(tuple(table.names[k] for k in kept), table.colors[kept])

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        table = _table(Path(options.root_dataset), options)
        values = dict.fromkeys(range(len(table.names)), -1)
        values |= {row: k for k, row in enumerate(_kept(table, options))}
        return LabelMap(values, options.num_class, f" (rows of {table.path})")


def _table(root: Path, options: DataOptions) -> ClassFile:
    """The class table of the options; ValueError if it has no colours."""
    if not options.classes:
        raise ValueError(
            "DATASET.format colors needs the colours of the classes: set DATASET.classes to a "
            "table of them, such as labelmap.txt"
        )
    table = ClassFile.load(locate(options.classes, root, "DATASET.classes"))
    if table.colors is None or len(table.names) > _MOST:
        what = "no colours" if table.colors is None else f"more than {_MOST} classes"
        raise ValueError(f"DATASET.classes {table.path} has {what}, for DATASET.format colors")
    return table


def _kept(table: ClassFile, options: DataOptions) -> list[int]:
    return [k for k in range(len(table.names)) if k not in options.ignore_label]


def _rows(mask: Path, table: ClassFile) -> np.ndarray:
    return table.rows_of(load_image(mask), mask).astype(np.uint8)
