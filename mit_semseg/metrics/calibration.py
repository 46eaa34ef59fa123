"""Calibration: whether a prediction is right as often as its probability says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 15  # of the expected calibration error, as in the paper
# Thresholds are finer than the bins by this factor.
_FINER = 4
# Confidences are summed in these units, so that sums do not depend on the order.
_UNIT = 2.0**24


class Calibration:
    """Counts predictions by class and confidence, the largest probability of a pixel.

    Paper: Guo et al. 2017, arXiv:1706.04599, sec. 2. The sum of those of several processes equals
    that of a single process exactly.

    Args:
        num_class: number of classes K.

    Attributes:
        counts: (3, K, 60) int64, by predicted class and confidence: pixels, correct pixels, and
            the sum of their confidences in units of 2^-24.
        labelled: (K,) int64, labelled pixels of each class.

    Raises:
        ValueError: num_class is below 1.
    """

    def __init__(self, num_class: int) -> None:
        if num_class < 1:
            raise ValueError(f"num_class is {num_class}; give at least 1")
        self.num_class = num_class
        self.counts = torch.zeros(3, num_class, BINS * _FINER, dtype=torch.int64)
        self.labelled = torch.zeros(num_class, dtype=torch.int64)

    def update(self, confidence: Tensor | Any, pred: Tensor | Any, label: Tensor | Any) -> None:
        """Add a prediction.

        Args:
            confidence: probability of the predicted class, in [0, 1], of any shape.
            pred: class ids in 0..K-1, integers of that shape.
            label: class ids of that shape, -1 for ignored pixels.

        Raises:
            ValueError: shapes differ.
        """
        arrays = [np.asarray(x).reshape(-1) for x in (confidence, pred, label)]
        if len({np.shape(x) for x in (confidence, pred, label)}) != 1:
            shapes = [tuple(np.shape(x)) for x in (confidence, pred, label)]
            raise ValueError(
                f"confidence, pred and label have the shapes {shapes}; make them equal"
            )
        known = arrays[2] >= 0
        sure, predicted, truth = (x[known] for x in arrays)
        bins = BINS * _FINER
        # A confidence of exactly k / bins is in the bin below, as in the paper.
        cells = np.clip(np.ceil(sure * np.float64(bins)).astype(np.int64) - 1, 0, bins - 1)
        cells += predicted.astype(np.int64) * bins
        # Sums below 2^53, which float64 has exactly.
        units = np.rint(sure * np.float64(_UNIT))
        parts = (None, (predicted == truth).astype(np.float64), units)
        for total, weights in zip(self.counts, parts, strict=True):
            found = np.bincount(cells, weights, minlength=self.num_class * bins)
            total += torch.from_numpy(found.astype(np.int64)).view_as(total)
        self.labelled += torch.from_numpy(np.bincount(truth, minlength=self.num_class))

    def __add__(self, other: Calibration) -> Calibration:
        if not isinstance(other, Calibration) or other.num_class != self.num_class:
            return NotImplemented
        result = Calibration(self.num_class)
        result.counts = self.counts + other.counts
        result.labelled = self.labelled + other.labelled
        return result

    def compute(self) -> dict[str, Any]:
        """Calibration over all classes, and thresholds per class.

        Returns:
            `ece`: expected calibration error, the mean difference of accuracy and confidence over
            15 bins, weighted by their pixels; NaN if there are none. `share`, `accuracy` and
            `confidence`, (15,) float64: of each bin, NaN if it is empty. `precision` and `recall`,
            (K, 61) float64: of a class if only predictions with a confidence above k / 60 count;
            the precision is NaN if there are none, the recall if the class is not labelled.
        """
        pixels, correct, sure = self.counts.double()
        bins = [x.sum(0).view(BINS, _FINER).sum(1) for x in (pixels, correct, sure / _UNIT)]
        total = bins[0].sum()
        accuracy, confidence = bins[1] / bins[0], bins[2] / bins[0]
        gaps = (bins[1] - bins[2]).abs().sum() / total
        above = [
            torch.nn.functional.pad(x.flip(1).cumsum(1).flip(1), (0, 1)) for x in (pixels, correct)
        ]
        return {
            "ece": gaps.item(),
            "share": bins[0] / total,
            "accuracy": accuracy,
            "confidence": confidence,
            "precision": above[1] / above[0],
            "recall": above[1] / self.labelled.double()[:, None],
        }
