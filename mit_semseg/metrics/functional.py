"""Figures of segmentation quality as functions of one confusion matrix.

Row = label, column = prediction. A class is *absent* when no pixel has it, in the labels or in
the prediction: its IoU is 0/0, written NaN and left out of means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 16  # pixels


def _integers(values: Any, name: str) -> Tensor:
    """A tensor or an array-like of integers as a flat int64 tensor."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "iub":
            raise ValueError(f"{name} is {array.dtype}; give integer class ids")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).reshape(-1)
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} is {values.dtype}; give integer class ids")
    return values.detach().to(torch.int64).reshape(-1)


def _check_range(values: Tensor, low: int, high: int, name: str) -> None:
    smallest, largest = values.aminmax()
    for value in (int(smallest), int(largest)):
        if not low <= value <= high:
            raise ValueError(f"{name} {value} is outside {low}..{high}")


def confusion_matrix(pred: Tensor | Any, label: Tensor | Any, num_class: int) -> Tensor:
    """Counts of pixels by label and prediction.

    Args:
        pred: class ids in 0..num_class-1, integers of any shape; tensor or array.
        label: class ids of the same shape, -1 where a pixel is ignored.
        num_class: number of classes K.

    Returns:
        (K, K) int64, row = label, column = prediction, on the device of `pred`.

    Raises:
        ValueError: shapes differ, values are no integers, or an id is out of range.

    Example:
        >>> confusion_matrix([0, 1, 1, 0], [0, 1, 0, -1], 2)
        tensor([[1, 1],
                [0, 1]])
    """
    if num_class < 1:
        raise ValueError(f"num_class is {num_class}; give at least 1")
    if np.shape(pred) != np.shape(label):
        raise ValueError(
            f"pred has shape {tuple(np.shape(pred))} but label {tuple(np.shape(label))}; "
            "predict at the size of the label"
        )
    pred, label = _integers(pred, "pred"), _integers(label, "label")
    label = label.to(pred.device)
    counts = torch.zeros((num_class + 1) * num_class, dtype=torch.int64, device=pred.device)
    # Half the bytes, half the time; more than 46000 classes need them all.
    number = torch.int32 if len(counts) < 2**31 else torch.int64
    # On the CPU in pieces that stay in its cache.
    piece = _PIECE if pred.device.type == "cpu" else max(1, pred.numel())
    for some_pred, some_label in zip(pred.split(piece), label.split(piece)):
        if not some_pred.numel():
            continue
        _check_range(some_pred, 0, num_class - 1, "predicted class")
        _check_range(some_label, -1, num_class - 1, "label")
        # Ignored pixels fall into a first row of their own, which is dropped.
        cells = some_label.to(number).add_(1).mul_(num_class).add_(some_pred.to(number))
        counts += torch.bincount(cells, minlength=len(counts))
    return counts[num_class:].view(num_class, num_class)


def _counts(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hits, labelled, predicted) pixels per class, (K,) float64."""
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion has shape {tuple(confusion.shape)}; it must be (K, K)")
    if (confusion < 0).any():
        raise ValueError(f"confusion holds a negative count, {confusion.min().item()}")
    counts = confusion.double()
    return counts.diagonal(), counts.sum(1), counts.sum(0)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of every class, in [0, 1]; NaN where the class is absent.

    Paper: Everingham et al. 2010, IJCV 88, sec. 4.3.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        (K,) float64. A class that is predicted but never labelled has 0.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    hits, labelled, predicted = _counts(confusion)
    return hits / (labelled + predicted - hits)


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean intersection-over-union over the classes that occur, in [0, 1].

    Paper: Long et al. 2015, arXiv:1411.4038, sec. 5. A class occurs when it is labelled or
    predicted somewhere; one that is predicted but never labelled counts as 0, as it does in
    torchmetrics.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64; NaN when no class occurs.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_iou(confusion).nanmean()


def mean_iou_all_classes(confusion: Tensor) -> Tensor:
    """Mean IoU over all K classes, an absent one counting 0, as the published toolkit prints it.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64 in [0, 1].

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_iou(confusion).nan_to_num(0.0).mean()


def pixel_accuracy(confusion: Tensor) -> Tensor:
    """Share of labelled pixels that are predicted right, in [0, 1].

    Paper: Long et al. 2015, arXiv:1411.4038, sec. 5.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64; NaN when nothing is labelled.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    hits, labelled, _ = _counts(confusion)
    return hits.sum() / labelled.sum()


def class_recall(confusion: Tensor) -> Tensor:
    """Share of each class's labelled pixels that are predicted right; NaN where none are.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        (K,) float64 in [0, 1].

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    hits, labelled, _ = _counts(confusion)
    return hits / labelled


def class_accuracy(confusion: Tensor) -> Tensor:
    """Mean over the labelled classes of the share of their pixels that is predicted right.

    Paper: "mean accuracy" in Long et al. 2015, arXiv:1411.4038, sec. 5.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64 in [0, 1]; NaN when nothing is labelled.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_recall(confusion).nanmean()


def fw_iou(confusion: Tensor) -> Tensor:
    """Mean IoU weighted by how many pixels each class has in the labels, in [0, 1].

    Paper: "frequency weighted IU" in Long et al. 2015, arXiv:1411.4038, sec. 5.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64; NaN when nothing is labelled.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    _, labelled, _ = _counts(confusion)
    return (labelled * class_iou(confusion)).nansum() / labelled.sum()


def class_dice(confusion: Tensor) -> Tensor:
    """Dice coefficient (F1) of every class, in [0, 1]; NaN where the class is absent.

    Paper: Dice 1945, Ecology 26(3). Equal to 2 IoU / (1 + IoU).

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        (K,) float64.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    hits, labelled, predicted = _counts(confusion)
    return 2 * hits / (labelled + predicted)


def mean_dice(confusion: Tensor) -> Tensor:
    """Mean Dice coefficient over the classes that occur, in [0, 1].

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64; NaN when no class occurs.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_dice(confusion).nanmean()
