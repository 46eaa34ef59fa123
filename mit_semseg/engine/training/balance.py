"""Class weights from the class frequencies of the training labels."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mit_semseg.config import Options
from mit_semseg.dataset import Split, load_mask
from mit_semseg.dataset.loading import paths_of
from mit_semseg.dataset.records import Record
from mit_semseg.files import replacing

log = logging.getLogger("mit_semseg")

# Masks to count. The frequencies converge well before 1000 masks, and more would delay the first
# step; the larger number is used if a class occurs in none of the first 1000.
SAMPLES = (1000, 10_000)
# File in DIR that caches the counts for later runs.
CACHE = "class_frequencies.json"


def frequency_weights(pixels: np.ndarray, images: np.ndarray, power: float) -> Tensor:
    """Median-frequency weights, raised to a power.

    Paper: Eigen and Fergus 2015, arXiv:1411.4734, sec. 6.3.2. The frequency of a class is its
    share of the pixels of the images it occurs in; the weight is (median frequency / frequency).

    Args:
        pixels: (K,) pixels of each class.
        images: (K,) all valid pixels of the images in which the class occurs.
        power: 1 for median-frequency balancing, 0.5 for its square root.

    Returns:
        (K,) float32; 1 for classes without pixels.
    """
    present = pixels > 0
    if not present.any():
        return torch.ones(len(pixels))
    frequency = np.where(present, pixels / np.maximum(images, 1), np.nan)
    weights = np.where(present, (np.nanmedian(frequency) / frequency) ** power, 1.0)
    return torch.from_numpy(weights.astype(np.float32))


def enet_weights(pixels: np.ndarray, c: float = 1.02) -> Tensor:
    """ENet's weights, 1 / ln(c + share of the class among all valid pixels).

    Paper: Paszke et al. 2016, arXiv:1606.02147, sec. 5.2.

    Args:
        pixels: (K,) pixels of each class.
        c: above 1; the paper's 1.02 gives weights between 1.4 and 50.5.

    Returns:
        (K,) float32; 1 / ln(c), the largest weight, for classes without pixels.
    """
    share = pixels / max(pixels.sum(), 1)
    return torch.from_numpy((1 / np.log(c + share)).astype(np.float32))


def class_weights(options: Options, split: Split, *, progress: bool = True) -> Tensor | None:
    """The weights for `TRAIN.class_weights`, (num_class,) float32, or None for `none`.

    The counts are cached in `DIR`. They are recomputed if the list, one of its masks or the label
    map changes.

    Raises:
        FileNotFoundError, ValueError: a mask cannot be used, unless `DATASET.on_error` is skip.
    """
    wanted, num_class = options.TRAIN.class_weights, options.DATASET.num_class
    if isinstance(wanted, tuple):
        return torch.tensor(wanted)
    if wanted == "none":
        return None
    cache, skip = Path(options.DIR) / CACHE, options.DATASET.on_error == "skip"
    pixels, images = _frequencies(cache, split, num_class, skip, progress)
    if wanted == "enet":
        return enet_weights(pixels)
    return frequency_weights(pixels, images, 1.0 if wanted == "median" else 0.5)


def _frequencies(
    file: Path, split: Split, num_class: int, skip: bool, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(K,) pixels of each class and (K,) pixels of the images it occurs in, cached in `file`."""
    records = split.records
    # Spread over the whole list, since lists are often sorted, for example by city.
    sizes = sorted({min(len(records), size) for size in SAMPLES})
    samples = [[records[k * len(records) // size] for k in range(size)] for size in sizes]
    keys = [_fingerprint(sample, split, num_class) for sample in samples]
    for key in keys:
        if (known := _read(file, key)) is not None:
            return known
    for key, sample in zip(keys, samples, strict=True):
        counted = key, *_count(sample, split, num_class, skip, progress)
        if counted[1].all():
            break
    _write(file, *counted)
    return counted[1:]


def _count(
    records: Sequence[Record], split: Split, num_class: int, skip: bool, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    pixels, images = np.zeros(num_class, dtype=np.int64), np.zeros(num_class, dtype=np.int64)
    for record in tqdm(records, desc="class frequencies", disable=not progress, leave=False):
        path = paths_of(record)[1]
        try:
            label = split.label_map(load_mask(path), path)
        except (OSError, ValueError) as error:
            if not skip:
                raise
            log.warning("mask skipped for TRAIN.class_weights: %s", error)
            continue
        counts = np.bincount(label[label >= 0].ravel(), minlength=num_class)
        pixels += counts
        images += np.where(counts > 0, counts.sum(), 0)
    return pixels, images


# ------------------------------------------------------------------------------ cache
def _fingerprint(records: Sequence[Record], split: Split, num_class: int) -> str:
    """Hash of the list, size and modification time of its masks, and the label map."""
    files: list[Any] = []
    for record in records:
        path = paths_of(record)[1]
        try:
            stat = os.stat(path)
        except OSError:
            files.append([path])
        else:
            files.append([path, stat.st_size, stat.st_mtime_ns])
    text = json.dumps([num_class, sorted(split.label_map.values.items()), files])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _read(file: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The counts stored in a file, if its key matches."""
    try:
        stored = json.loads(file.read_text("utf-8"))
        if stored["key"] != key:
            return None
        return np.array(stored["pixels"], np.int64), np.array(stored["images"], np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or invalid: it will be rewritten


def _write(file: Path, key: str, pixels: np.ndarray, images: np.ndarray) -> None:
    stored = {"key": key, "pixels": pixels.tolist(), "images": images.tolist()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:  # all ranks write the same content
            part.write_text(json.dumps(stored) + "\n", "utf-8")
    except OSError as error:  # the next run counts again
        log.debug("class frequencies are not cached: %s", error)
