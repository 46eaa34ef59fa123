"""The training or validation data of a configuration: records, classes and label map."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, DataFormat
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.label_map import LabelMap, label_warnings
from mit_semseg.dataset.loading import load_depth_of, load_raw, paths_of
from mit_semseg.dataset.rasters import units_warning
from mit_semseg.dataset.records import Record, locate, read_odgt
from mit_semseg.errors import counted
from mit_semseg.files import PathLike


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


def entries_of(options: DataOptions, which: str, data_format: DataFormat) -> list[str]:
    """The entries of `list_train` or `list_val`, with default lists replaced by splits."""
    lists = options.list_train if which == "train" else options.list_val
    entries = [lists] if isinstance(lists, str) else lists
    return [data_format.default_splits.get(entry, entry) for entry in entries]


def class_table(dataset_cfg: Any, which: str = "train") -> ClassTable:
    """The class table of a configuration: `DATASET.classes`, or that of the data set.

    Args:
        dataset_cfg: `cfg.DATASET`.
        which: `"train"` or `"val"`: for data sets whose files name the classes, those of
            `list_train` or `list_val`.

    Raises:
        FileNotFoundError: `DATASET.classes`, or a file that names the classes, does not exist.
        ValueError: the format is unknown, or the table does not have `num_class` rows.
    """
    options = DataOptions.read(dataset_cfg)
    data_format: DataFormat = FORMATS.get(options.format)()
    root = Path(options.root_dataset)
    own = data_format.classes_for(root, entries_of(options, which, data_format), options)
    if not options.classes or data_format.reads_classes:
        return own
    table = ClassTable.load(locate(options.classes, root, "DATASET.classes"))
    return table.checked(options.num_class, options.classes, "make them equal")


def build_split(dataset_cfg: Any, which: str) -> Split:
    """Records, classes and label map of the training or validation data of a configuration.

    Args:
        dataset_cfg: `cfg.DATASET`.
        which: `"train"` or `"val"`: `list_train` or `list_val`.

    Raises:
        FileNotFoundError: a list or folder does not exist.
        ValueError: the format is unknown, a list is invalid, or the number of classes is wrong.
    """
    if which not in ("train", "val"):
        raise ValueError(f"a split is 'train' or 'val', not {which!r}")
    options = DataOptions.read(dataset_cfg)
    classes = class_table(options, which)
    data_format: DataFormat = FORMATS.get(options.format)()
    root, entries = options.root_dataset, entries_of(options, which, data_format)
    records: list[Record] = []
    for entry in entries:
        if entry.endswith(".odgt"):  # a custom list can select images of any data set
            records += read_odgt(locate(entry, root))
        else:
            records += data_format.records_for(Path(root), entry, options)
    if not records:
        raise ValueError(f"DATASET.list_{which} is {entries!r}, which has no records")
    if options.depth:
        lacking = [record["fpath_img"] for record in records if "fpath_depth" not in record]
        if lacking:
            raise ValueError(
                f"DATASET.depth is True, but DATASET.list_{which} has no depth for {len(lacking)} "
                f"of {len(records)} images, first {lacking[0]}; add 'fpath_depth' to the list"
            )
    else:
        for record in records:
            record.pop("fpath_depth", None)
    label_map = data_format.label_map(records, options).ignoring(options.ignore_label)
    if data_format.mirror_pairs:
        label_map = label_map.pairing(data_format.mirror_pairs)
    return Split([absolute(record, root) for record in records], classes, label_map)


def absolute(record: Record, root: PathLike) -> Record:
    """The record with absolute paths; relative ones are relative to `root`."""
    full = record.copy()
    for key in ("fpath_img", "fpath_segm", "fpath_depth"):
        if key in record:
            path = os.path.abspath(os.path.join(root, record[key]))  # type: ignore[literal-required]
            full[key] = path  # type: ignore[literal-required]
    return full


def check_depth(options: DataOptions) -> None:
    """Checks that the data format has depth images if `options.depth` is set.

    Raises:
        ValueError: the format is unknown, or has no depth.
    """
    has_depth = FORMATS.get(options.format)().depth_scale is not None
    if options.depth and not has_depth:
        with_depth = [n for n in FORMATS.names() if FORMATS.get(n)().depth_scale is not None]
        raise ValueError(
            f"DATASET.depth is True, but DATASET.format {options.format} has no depth; formats "
            f"with depth: {' and '.join(with_depth)} (lists with 'fpath_depth')"
        )


def check_sample(
    split: Split,
    n: int = 32,
    seed: int = 0,
    *,
    on_error: str = "stop",
    options: DataOptions | None = None,
) -> list[str]:
    """Loads some random samples, and logs warnings about suspicious labels.

    Args:
        split: the samples.
        n: maximum number of samples to load.
        seed: seed of the selection.
        on_error: `DATASET.on_error`; with "skip", an unusable sample is a warning.
        options: their `bands` are read.

    Returns:
        The warnings.

    Raises:
        FileNotFoundError, ValueError: a sample is unusable (see `load_pair`), or, with "skip", all
            are.
    """
    count = min(n, len(split.records))
    chosen = np.random.default_rng(seed).choice(len(split.records), count, replace=False)
    stored: set[int] = set()
    seen: set[int] = set()
    ignored = pixels = 0
    warnings: list[str] = []
    far = ""
    for index in sorted(chosen.tolist()):
        record = split.records[index]
        try:
            image, raw = load_raw(record, options=options)
            ids = split.label_map(raw, paths_of(record)[1])
            if "fpath_depth" in record:  # its scale does not matter here
                as_read = DataOptions(depth=True, depth_scale=1)
                load_depth_of(record, "", as_read, (ids.shape[1], ids.shape[0]))
        except (OSError, ValueError) as error:
            warnings.append(str(error))
            if on_error != "skip" or len(warnings) == count:
                raise
            continue
        if options and options.bands and not far:
            far = units_warning(image, options, record["fpath_img"])
        stored.update(np.unique(raw).tolist())
        seen.update(np.unique(ids).tolist())
        ignored += int(np.count_nonzero(ids < 0))
        pixels += ids.size
    where = counted(count - len(warnings), "sampled mask")
    present = {k: split.classes.names[k] for k in seen - {-1}}
    warnings += [far] if far else []
    warnings += label_warnings(stored, ignored, pixels, where, present, len(split.classes))
    for warning in warnings:
        logging.getLogger("mit_semseg").warning("%s", warning)
    return warnings
