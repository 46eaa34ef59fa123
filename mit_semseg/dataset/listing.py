"""Creates lists of images and masks: `mit-semseg data make-odgt`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mit_semseg.config import DataOptions
from mit_semseg.dataset.images import ImageFile, image_size, stored_values
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.rasters import raster_size
from mit_semseg.dataset.records import Record, list_images, match_by_stem, write_odgt
from mit_semseg.errors import counted
from mit_semseg.files import PathLike

# Names of the lists, as published.
LISTS = ("training", "validation")


def make_odgt(
    images: PathLike,
    labels: PathLike,
    out: PathLike,
    split: float = 0.9,
    seed: int = 304,
    image_suffix: str = "",
    label_suffix: str = "",
    overwrite: bool = False,
    label_map: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Write `training.odgt` and `validation.odgt` from a folder of images and one of masks.

    Images and masks are matched by their relative path without extension. Paths in the lists are
    relative to the deepest common folder, which is returned as `root`, for `DATASET.root_dataset`.
    If `out` is outside of that folder, paths are absolute.

    Args:
        images: folder of images, searched with its subfolders.
        labels: folder of masks.
        out: folder for the lists; created if it does not exist.
        split: fraction of the samples for training, in (0, 1]; 1: no validation list.
        seed: seed of the random split.
        image_suffix, label_suffix: ends of the stems to ignore (`_mask`).
        overwrite: replace existing lists.
        label_map: `DATASET.label_map`, pairs (stored value, class): every mask is read, and those
            with other values are left out.

    Returns:
        `root`, `training` and `validation` (list paths), `n_training`, `n_validation`,
        `images_without_mask`, `masks_without_image`, and `unusable`: messages about samples left
        out because a file cannot be read, the sizes differ or a value is not in `label_map`; and
        `label_map`.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: nothing matches, `split` is outside (0, 1], or lists exist in `out`.
    """
    if not 0 < split <= 1:
        raise ValueError(f"split is {split}; it is the fraction for training, in (0, 1]")
    mapping = LabelMap.of_options(options_of(label_map)) if label_map else None
    images, labels, out = (Path(os.path.abspath(p)) for p in (images, labels, out))
    existing = [file for name in LISTS if (file := out / f"{name}.odgt").exists()]
    if existing and not overwrite:
        names = " and ".join(map(str, existing))
        raise ValueError(f"{names} would be replaced: give another --out, or --overwrite")
    pairs, unmatched_images, unmatched_masks = match_by_stem(
        list_images(images), list_images(labels), image_suffix, label_suffix
    )
    root = Path(os.path.commonpath([images, labels]))
    inside = root == out or root in out.parents

    def listed(file: Path) -> str:
        return (file.relative_to(root) if inside else file).as_posix()

    records: list[Record] = []
    unusable: list[str] = []
    for image, label in tqdm(pairs, desc="reading sizes", disable=None, leave=False):
        try:
            size = _size(images / image)
            with ImageFile(labels / label) as mask:
                mask_size, is_label = mask.size, mask.is_label
            if mapping is not None:
                mapping.check(stored_values(labels / label), labels / label)
            elif not is_label:
                stored_values(labels / label)  # raises, except for grey levels stored as RGB
        except (ValueError, FileNotFoundError) as error:
            unusable.append(str(error))
            continue
        if size != mask_size:
            unusable.append(
                f"{labels / label}: {mask_size[0]}x{mask_size[1]} pixels, its image "
                f"{images / image} has {size[0]}x{size[1]}"
            )
            continue
        records.append(
            Record(
                fpath_img=listed(images / image),
                fpath_segm=listed(labels / label),
                width=size[0],
                height=size[1],
            )
        )
    if not records:
        first = f"; the first of {len(unusable)} unusable pairs: {unusable[0]}" if unusable else ""
        raise ValueError(
            f"no image in {images} has a usable mask of the same name in {labels} "
            f"({len(unmatched_images)} unmatched images, {len(unmatched_masks)} masks){first}"
        )
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    n_training = len(records)
    if split < 1 and len(records) > 1:  # neither list may be empty
        n_training = min(max(round(len(records) * split), 1), len(records) - 1)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"root": str(root), "label_map": [list(pair) for pair in label_map]}
    for name, chosen in zip(LISTS, (order[:n_training], order[n_training:]), strict=True):
        path = out / f"{name}.odgt"
        report[f"n_{name}"] = len(chosen)
        report[name] = str(path) if chosen else ""
        if chosen:
            write_odgt(path, [records[k] for k in sorted(chosen)])
        else:
            path.unlink(missing_ok=True)  # of an earlier call
    report["images_without_mask"] = unmatched_images
    report["masks_without_image"] = unmatched_masks
    report["unusable"] = unusable
    return report


def _size(path: Path) -> tuple[int, int]:
    """(width, height) of an image, of any bands if rasterio is installed."""
    try:
        return image_size(path)
    except ValueError:
        if path.suffix.lower() not in (".tif", ".tiff") or not find_spec("rasterio"):
            raise
        return raster_size(path)


def describe_made(report: dict[str, Any]) -> str:
    """The report of `make_odgt` as text, with the options to set."""
    lines = [f"{report['n_training']} training and {report['n_validation']} validation samples"]
    for key, noun, what in (
        ("images_without_mask", "image", " without mask"),
        ("masks_without_image", "mask", " without image"),
        ("unusable", "unusable pair", ""),
    ):
        if report[key]:
            lines.append(f"{counted(len(report[key]), noun)}{what}, left out:")
            lines += shortened(report[key])
    lines.append(f"DATASET.root_dataset {report['root']}")
    lines.append(f"DATASET.list_train {report['training']}")
    if report["validation"]:
        lines.append(f"DATASET.list_val {report['validation']}")
    if report["label_map"]:
        lines.append(f"DATASET.num_class {options_of(report['label_map']).num_class}")
        lines.append(f'DATASET.label_map "{report["label_map"]}"')
    return "\n".join(lines)


def options_of(label_map: Iterable[Sequence[int]]) -> DataOptions:
    """Checked options with a label map and its number of classes."""
    pairs = DataOptions.read({"num_class": 1 << 31, "label_map": tuple(label_map)}).label_map
    return DataOptions(num_class=max([0, *(int(k) for _, k in pairs)]) + 1, label_map=pairs)


def shortened(items: Sequence[str], most: int = 10) -> list[str]:
    """Lines with the first items, and the number of the others."""
    rest = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return [f"  {item}" for item in items[:most]] + rest
