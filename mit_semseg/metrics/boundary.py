"""The boundary F-score: how well predicted class boundaries match those of the label."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Scores are summed as integers in units of 2^-40: a sum of floats would depend on its order, and so
# on the number of processes.
_UNIT = 1 << 40


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask with a neighbour (above, below, left or right) that is not in it.

    Args:
        mask: (H, W) bool. Pixels beyond the border of the image are not neighbours.

    Returns:
        (H, W) bool.
    """
    wide = np.pad(mask, 1, mode="edge")
    inner = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask & ~inner


def boundary_f(
    pred: Tensor | Any, label: Tensor | Any, num_class: int, tolerance: float = 0.0075
) -> np.ndarray:
    """Boundary F-score of every class in one image, in [0, 1]; NaN if the class is absent.

    Precision P is the fraction of the predicted boundary within a distance of the labelled one,
    recall R the fraction of the labelled boundary within that distance of the predicted one, and
    the score is 2 P R / (P + R). It is 0 if only one of the two has a boundary, and 1 if neither
    has, because the class fills the image in both.

    The boundary of a class is its outermost pixels. Predictions at ignored pixels are ignored, but
    the border between a class and ignored pixels is a boundary: objects that are surrounded by
    ignored pixels, as in PASCAL VOC, would otherwise have none.

    Paper: Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?",
    BMVC, sec. 3. F in Perazzi et al. 2016, "A benchmark dataset and evaluation methodology for
    video object segmentation", CVPR, sec. 4, is the same with one-to-one matching of pixels.

    Args:
        pred: (H, W) class ids in 0..num_class-1, tensor or array of integers.
        label: (H, W) class ids, -1 for ignored pixels.
        num_class: number of classes K.
        tolerance: the distance, as a fraction of the image's diagonal.

    Returns:
        (K,) float64.

    Raises:
        ValueError: the shapes differ or are not (H, W), an id is out of range, or the tolerance is
            negative.
    """
    predicted, labelled = _array(pred, "pred"), _array(label, "label")
    if predicted.shape != labelled.shape:
        raise ValueError(
            f"pred has shape {predicted.shape} but label {labelled.shape}; predict at the size of "
            "the label"
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it is a fraction of the diagonal, 0 or more")
    distance = tolerance * math.hypot(*labelled.shape)
    valid = labelled >= 0
    found = np.union1d(labelled[valid], predicted[valid])
    for name, ids in ("label", labelled[valid]), ("pred", predicted[valid]):
        outside = ids[(ids < 0) | (ids >= num_class)]
        if outside.size:
            raise ValueError(
                f"{name} has id {outside[0]}, outside 0..{num_class - 1}; map it to a class, or "
                "label it -1"
            )
    scores = np.full(num_class, np.nan)
    for k in found:
        scores[k] = _f_score((predicted == k) & valid, labelled == k, distance)
    return scores


def _array(values: Any, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; give integer class ids of one image, "
            "(H, W)"
        )
    return array


def _f_score(predicted: np.ndarray, labelled: np.ndarray, distance: float) -> float:
    """Boundary F-score of two (H, W) masks of one class."""
    ours, theirs = (np.argwhere(boundary(mask)) for mask in (predicted, labelled))
    if not len(ours) or not len(theirs):
        # A class without a boundary either is absent or fills the image.
        return float(len(ours) == len(theirs) and predicted.any() and labelled.any())
    precision, recall = (
        _fraction_near(ours, theirs, distance),
        _fraction_near(theirs, ours, distance),
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _fraction_near(points: np.ndarray, others: np.ndarray, distance: float) -> float:
    """Fraction of the points that have one of the others within the distance."""
    from scipy.spatial import KDTree  # slow to import, and rarely used

    # The upper bound of the query is exclusive, so it is slightly larger than the distance.
    nearest, _ = KDTree(others).query(points, distance_upper_bound=1.001 * distance + 1e-6)
    return float(np.mean(nearest <= distance))


class BoundaryScore:
    """Accumulates boundary F-scores, for each class over the images in which it occurs.

    The sum of those of several processes equals that of a single process exactly.

    Args:
        num_class: number of classes K.
        tolerance: see `boundary_f`.

    Attributes:
        sums: (K,) int64, sums of scores in units of 2^-40.
        images: (K,) int64, numbers of images.

    Raises:
        ValueError: num_class is below 1.
    """

    def __init__(self, num_class: int, tolerance: float = 0.0075) -> None:
        if num_class < 1:
            raise ValueError(f"num_class is {num_class}; give at least 1")
        self.num_class, self.tolerance = num_class, tolerance
        self.sums = torch.zeros(num_class, dtype=torch.int64)
        self.images = torch.zeros(num_class, dtype=torch.int64)

    def update(self, pred: Tensor | Any, label: Tensor | Any) -> None:
        """Count one image; see `boundary_f`."""
        scores = torch.from_numpy(boundary_f(pred, label, self.num_class, self.tolerance))
        self.sums += (scores.nan_to_num(0.0) * _UNIT).round().long()
        self.images += ~scores.isnan()

    def __add__(self, other: BoundaryScore) -> BoundaryScore:
        if not isinstance(other, BoundaryScore):
            return NotImplemented
        if (other.num_class, other.tolerance) != (self.num_class, self.tolerance):
            raise ValueError(
                f"cannot add boundary scores of {self.num_class} and {other.num_class} classes, "
                f"tolerances {self.tolerance:g} and {other.tolerance:g}"
            )
        result = BoundaryScore(self.num_class, self.tolerance)
        result.sums, result.images = self.sums + other.sums, self.images + other.images
        return result

    def compute(self) -> dict[str, Any]:
        """The mean scores, in [0, 1].

        Returns:
            `boundary_f`, (K,) float64: mean over the images in which the class is labelled or
            predicted, NaN if there are none; `mean_boundary_f`, float: its mean over the classes
            that occur. (Csurka et al. average over the classes of each image first, which weights
            classes by the number of images.)
        """
        scores = self.sums.double() / _UNIT / self.images
        return {"boundary_f": scores, "mean_boundary_f": scores.nanmean().item()}
