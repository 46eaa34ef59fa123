"""Segmentation metrics as functions of a confusion matrix (row = label, column = prediction).

A class is *absent* if no pixel has it, neither in the labels nor in the prediction: its IoU is 0/0,
reported as NaN and left out of means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK_CPU, _CHUNK = 1 << 16, 1 << 22  # pixels counted at a time, on a CPU and elsewhere


def _integers(values: Any, name: str) -> Tensor:
    """A tensor or array of integers as a flat int64 tensor."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "iub":
            raise ValueError(f"{name} is {array.dtype}; give integer class ids")
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).reshape(-1)
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} is {values.dtype}; give integer class ids")
    return values.detach().to(torch.int64).reshape(-1)


def _check_range(found: tuple[Any, Any], low: int, high: int, name: str) -> None:
    """ValueError if the smallest or the largest value is out of range."""
    for value in map(int, found):
        if not low <= value <= high:
            raise ValueError(f"{name} {value} is outside {low}..{high}")


def confusion_matrix(
    pred: Tensor | Any, label: Tensor | Any, num_class: int, check: bool = True
) -> Tensor:
    """Counts of pixels by label and prediction.

    Args:
        pred: class ids in 0..num_class-1, integers of any shape; tensor or array.
        label: class ids of the same shape, -1 for ignored pixels.
        num_class: number of classes K.
        check: check the range of the ids; on a GPU this synchronises.

    Returns:
        (K, K) int64, row = label, column = prediction, on the device of `pred`.

    Raises:
        ValueError: shapes differ, values are not integers, or an id is out of range.

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
    # The first row has the ignored pixels.
    return counts[num_class:].view(num_class, num_class)


def _count_unchecked(pred: Tensor, label: Tensor, num_class: int) -> Tensor:
    """As `_count_on_cpu`; not with bincount, which synchronises to find the size of its result."""
    counts = torch.zeros((num_class + 1) * num_class, dtype=torch.int64, device=pred.device)
    chunks = (x.split(_CHUNK) for x in (pred, label))  # counting needs 24 bytes per pixel
    for pred_chunk, label_chunk in zip(*chunks, strict=True):
        cells = torch.add(pred_chunk, label_chunk, alpha=num_class).add_(num_class)
        counts.scatter_add_(0, cells, torch.ones_like(cells))
    return counts


def _count_on_cpu(pred: np.ndarray, label: np.ndarray, num_class: int) -> Tensor:
    """Counts of the values `(label + 1) * num_class + pred`, ((num_class + 1) * num_class,) int64.

    NumPy counts in chunks that fit the cache of a core, which is faster than torch's threads. If
    predictions are in range, a label out of range gives a value out of range, which bincount finds.
    """
    size = (num_class + 1) * num_class
    counts = np.zeros(size, dtype=np.int64)
    scratch = np.empty(min(_CHUNK_CPU, len(pred)), dtype=np.int64)
    for start in range(0, len(pred), _CHUNK_CPU):
        pred_chunk, label_chunk = (x[start : start + _CHUNK_CPU] for x in (pred, label))
        _check_range((pred_chunk.min(), pred_chunk.max()), 0, num_class - 1, "predicted class")
        cells = np.multiply(label_chunk, num_class, out=scratch[: len(label_chunk)])
        cells += pred_chunk
        cells += num_class
        try:
            counts += np.bincount(cells, minlength=size)
        except ValueError:  # a negative value, or one beyond the counts
            _check_range((label_chunk.min(), label_chunk.max()), -1, num_class - 1, "label")
            raise
    return torch.from_numpy(counts)


def _counts(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hits, labelled, predicted) pixels per class, (K,) float64."""
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion has shape {tuple(confusion.shape)}; it must be (K, K)")
    if (confusion < 0).any():
        raise ValueError(f"confusion has a negative count, {confusion.min().item()}")
    counts = confusion.double()
    return counts.diagonal(), counts.sum(1), counts.sum(0)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of every class, in [0, 1]; NaN if the class is absent.

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
    """Mean intersection over union over the classes that occur, in [0, 1].

    A class occurs if it is labelled or predicted somewhere; one that is predicted but never
    labelled has IoU 0, as in torchmetrics.

    Paper: Long et al. 2015, arXiv:1411.4038, sec. 5.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64; NaN if no class occurs.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_iou(confusion).nanmean()


def mean_iou_all_classes(confusion: Tensor) -> Tensor:
    """Mean IoU over all K classes, with 0 for absent ones, as in the published toolkit.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64 in [0, 1].

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_iou(confusion).nan_to_num(0.0).mean()


def pixel_accuracy(confusion: Tensor) -> Tensor:
    """Fraction of labelled pixels that are predicted correctly, in [0, 1].

    Paper: Long et al. 2015, arXiv:1411.4038, sec. 5.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64; NaN if nothing is labelled.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    hits, labelled, _ = _counts(confusion)
    return hits.sum() / labelled.sum()


def class_recall(confusion: Tensor) -> Tensor:
    """Recall: fraction of each class's labelled pixels predicted correctly; NaN if it has none.

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
    """Mean recall over the labelled classes.

    Paper: "mean accuracy" in Long et al. 2015, arXiv:1411.4038, sec. 5.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64 in [0, 1]; NaN if nothing is labelled.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_recall(confusion).nanmean()


def fw_iou(confusion: Tensor) -> Tensor:
    """Mean IoU weighted by the number of labelled pixels of each class, in [0, 1].

    Paper: "frequency weighted IU" in Long et al. 2015, arXiv:1411.4038, sec. 5.

    Args:
        confusion: counts, (K, K) int64; row = label, column = prediction.

    Returns:
        Scalar float64; NaN if nothing is labelled.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    _, labelled, _ = _counts(confusion)
    return (labelled * class_iou(confusion)).nansum() / labelled.sum()


def class_dice(confusion: Tensor) -> Tensor:
    """Dice coefficient (F1) of every class, in [0, 1]; NaN if the class is absent.

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
        Scalar float64; NaN if no class occurs.

    Raises:
        ValueError: the matrix is not square, or a count is negative.
    """
    return class_dice(confusion).nanmean()
