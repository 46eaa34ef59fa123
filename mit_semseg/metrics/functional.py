"""Figures of segmentation quality as functions of one confusion matrix.

Row = label, column = prediction. A class is *absent* when no pixel has it, in the labels or in
the prediction: its IoU is 0/0, written NaN and left out of means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE, _DEVICE_PIECE = 1 << 16, 1 << 22  # pixels, on a CPU and elsewhere


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


def _check_range(found: tuple[Any, Any], low: int, high: int, name: str) -> None:
    """ValueError when the smallest or the largest value found is out of range."""
    for value in map(int, found):
        if not low <= value <= high:
            raise ValueError(f"{name} {value} is outside {low}..{high}")


def confusion_matrix(
    pred: Tensor | Any, label: Tensor | Any, num_class: int, check: bool = True
) -> Tensor:
    """Counts of pixels by label and prediction.

    Args:
        pred: class ids in 0..num_class-1, integers of any shape; tensor or array.
        label: class ids of the same shape, -1 where a pixel is ignored.
        num_class: number of classes K.
        check: False where all ids are known to be in range: then a GPU is not waited for.

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
    if not check:
        counts = _count_unchecked(pred, label, num_class)
    elif pred.device.type == "cpu":
        counts = _count_on_cpu(pred.numpy(), label.numpy(), num_class)
    else:
        _check_range(pred.aminmax(), 0, num_class - 1, "predicted class")
        _check_range(label.aminmax(), -1, num_class - 1, "label")
        cells = torch.add(pred, label, alpha=num_class).add_(num_class)
        counts = torch.bincount(cells, minlength=(num_class + 1) * num_class)
    # Ignored pixels fell into a first row of their own.
    return counts[num_class:].view(num_class, num_class)


def _count_unchecked(pred: Tensor, label: Tensor, num_class: int) -> Tensor:
    """As `_count_on_cpu`; unlike bincount this has a result of known size."""
    counts = torch.zeros((num_class + 1) * num_class, dtype=torch.int64, device=pred.device)
    pieces = (x.split(_DEVICE_PIECE) for x in (pred, label))  # they take 24 bytes a pixel
    for some_pred, some_label in zip(*pieces, strict=True):
        cells = torch.add(some_pred, some_label, alpha=num_class).add_(num_class)
        counts.scatter_add_(0, cells, torch.ones_like(cells))
    return counts


def _count_on_cpu(pred: np.ndarray, label: np.ndarray, num_class: int) -> Tensor:
    """How often each value of `(label + 1) * num_class + pred` occurs, (num_class + 1) * num_class.

    By NumPy, in pieces that stay in a core's cache: so little work is done sooner than threads
    are woken. With classes predicted in range, a label out of range gives a value out of range,
    which counting notices by itself.
    """
    size = (num_class + 1) * num_class
    counts = np.zeros(size, dtype=np.int64)
    scratch = np.empty(min(_PIECE, len(pred)), dtype=np.int64)
    for start in range(0, len(pred), _PIECE):
        some_pred, some_label = pred[start : start + _PIECE], label[start : start + _PIECE]
        _check_range((some_pred.min(), some_pred.max()), 0, num_class - 1, "predicted class")
        cells = np.multiply(some_label, num_class, out=scratch[: len(some_label)])
        cells += some_pred
        cells += num_class
        try:
            counts += np.bincount(cells, minlength=size)
        except ValueError:  # a negative cell, or more of them than there are counts
            _check_range((some_label.min(), some_label.max()), -1, num_class - 1, "label")
            raise
    return torch.from_numpy(counts)


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
