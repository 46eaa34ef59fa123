"""Class weights from the class frequencies of the training labels."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mit_semseg.config.node import Config
from mit_semseg.dataset import Split, load_mask

log = logging.getLogger("mit_semseg")

# Frequencies settle long before this many masks; more would only delay the first step.
SAMPLE = 1000


def frequency_weights(pixels: np.ndarray, images: np.ndarray, power: float) -> Tensor:
    """Median-frequency weights, raised to a power.

    Paper: Eigen and Fergus 2015, arXiv:1411.4734, sec. 6.3.2. The frequency of a class is its
    share of the pixels of the images it occurs in; the weight is (median frequency / frequency).

    Args:
        pixels: (K,) pixels of each class.
        images: (K,) all valid pixels of the images in which the class occurs.
        power: 1 = plain median-frequency balancing, 0.5 = its square root.

    Returns:
        (K,) float32; 1 for classes that never occur.
    """
    present = pixels > 0
    frequency = np.where(present, pixels / np.maximum(images, 1), np.nan)
    weights = np.where(present, (np.nanmedian(frequency) / frequency) ** power, 1.0)
    return torch.from_numpy(weights.astype(np.float32))


def class_weights(cfg: Config, split: Split, *, progress: bool = True) -> Tensor | None:
    """The weights TRAIN.class_weights asks for, (num_class,) float32, or None.

    Raises:
        ValueError: an unknown scheme, or a list whose length is not num_class.
    """
    wanted, num_class = cfg.TRAIN.class_weights, cfg.DATASET.num_class
    if isinstance(wanted, list):
        if len(wanted) != num_class:
            raise ValueError(
                f"TRAIN.class_weights has {len(wanted)} numbers; DATASET.num_class is {num_class}"
            )
        return torch.tensor([float(w) for w in wanted])
    if wanted == "none":
        return None
    powers = {"median": 1.0, "sqrt": 0.5}
    if wanted not in powers:
        raise ValueError(
            f"TRAIN.class_weights is {wanted!r}; it takes none, sqrt, median or a list"
        )
    records = split.records
    chosen = records[:: max(1, len(records) // SAMPLE)][:SAMPLE]
    pixels, images = np.zeros(num_class), np.zeros(num_class)
    for record in tqdm(chosen, desc="class frequencies", disable=not progress, leave=False):
        path = Path(record["fpath_segm"])
        try:
            label = split.label_map(load_mask(path), path)
        except (OSError, ValueError) as error:
            if cfg.DATASET.on_error != "skip":
                raise
            log.warning("not counted for TRAIN.class_weights: %s", error)
            continue
        counts = np.bincount(label[label >= 0].ravel(), minlength=num_class)
        pixels += counts
        images += np.where(counts > 0, counts.sum(), 0)
    return frequency_weights(pixels, images, powers[wanted])
