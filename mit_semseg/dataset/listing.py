"""Lists of a user's own images and masks: `mit-semseg data make-odgt`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mit_semseg.config import DataOptions
from mit_semseg.dataset.images import ImageFile, image_size, stored_values
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.reading import PathLike
from mit_semseg.dataset.records import Record, list_images, match_by_stem, write_odgt

# What the lists are called, as published.
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

    Images and masks are matched by their path without extension, folders included. Paths in the
    lists are relative to the deepest folder that holds both, which is returned as `root`: that is
    what `DATASET.root_dataset` is to be. When `out` lies elsewhere, nothing would tell where that
    folder is, and the paths are absolute.

    Args:
        images: folder of images, searched with its subfolders.
        labels: folder of masks.
        out: folder the lists are written to; made when absent.
        split: share of the samples that goes to training, in (0, 1]; 1 writes no validation list.
        seed: of the random split.
        image_suffix, label_suffix: what stems end with on one side only (`_mask`).
        overwrite: replace lists that `out` holds already.
        label_map: `DATASET.label_map`, pairs (stored value, class): every mask is read, and one
            that holds another value is left out.

    Returns:
        `root`, `training` and `validation` (list paths), `n_training`, `n_validation`,
        `images_without_mask`, `masks_without_image`, and `unusable`: samples left out because a
        file cannot be read, the two sizes differ or a value is not in `label_map`, with the
        reason; and `label_map`.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: nothing matches, `split` is outside (0, 1], or `out` has such lists already.
    """
    if not 0 < split <= 1:
        raise ValueError(f"split is {split}; it is the share for training, in (0, 1]")
    mapping = LabelMap.of_options(options_of(label_map)) if label_map else None
    images, labels, out = (Path(os.path.abspath(p)) for p in (images, labels, out))
    there = [file for name in LISTS if (file := out / f"{name}.odgt").exists()]
    if there and not overwrite:
        names = " and ".join(map(str, there))
        raise ValueError(f"{names} would be replaced: give another --out, or --overwrite")
    pairs, lonely_images, lonely_masks = match_by_stem(
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
            size = image_size(images / image)
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
            f"({len(lonely_images)} images and {len(lonely_masks)} masks are alone){first}"
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
            path.unlink(missing_ok=True)  # one of other samples
    report["images_without_mask"] = lonely_images
    report["masks_without_image"] = lonely_masks
    report["unusable"] = unusable
    return report


def describe_made(report: dict[str, Any]) -> str:
    """What `make_odgt` did, and how to use it, in plain text."""
    lines = [f"{report['n_training']} training and {report['n_validation']} validation samples"]
    for key in ("images_without_mask", "masks_without_image", "unusable"):
        if report[key]:
            lines.append(f"{len(report[key])} {key.replace('_', ' ')}, left out:")
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
    """Checked options with a label map, and as many classes as it has."""
    pairs = DataOptions.read({"num_class": 1 << 31, "label_map": tuple(label_map)}).label_map
    return DataOptions(num_class=max([0, *(int(k) for _, k in pairs)]) + 1, label_map=pairs)


def shortened(items: Sequence[str], most: int = 10) -> list[str]:
    """Lines of the first items, and how many more there are."""
    rest = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return [f"  {item}" for item in items[:most]] + rest
