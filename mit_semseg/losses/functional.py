"""Losses on log-probabilities, as functions.

Every function takes `log_probs` (B, C, h, w), float, and `label` (B, h, w), int64 in [0, C) or
-1 for ignored pixels, and returns a scalar. If every pixel is ignored it is zero, with gradients
of zero. No function branches on values, so all of them can be compiled. Half precision is computed
and returned in float32, because sums over an image overflow in float16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1


def denominator(label: Tensor, weight: Tensor | None = None) -> Tensor:
    """The denominator of a mean over pixels.

    Args:
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights.

    Returns:
        Scalar float: the number of labelled pixels, or the sum of their class weights.
    """
    valid = label != IGNORED
    if weight is None:
        return valid.sum().to(torch.get_default_dtype())
    per_pixel = weight.to(label.device)[label.clamp(min=0)]
    return torch.where(valid, per_pixel, per_pixel.new_zeros(())).sum()


def labelled_images(label: Tensor) -> Tensor:
    """Number of images in `label` (B, h, w) with at least one labelled pixel; scalar float."""
    return (label != IGNORED).flatten(1).any(1).sum().to(torch.get_default_dtype())


def _checked(log_probs: Tensor, label: Tensor) -> Tensor:
    """Checks the arguments; returns the log-probabilities in at least float32."""
    if log_probs.ndim != 4 or label.shape != (log_probs.shape[0], *log_probs.shape[2:]):
        raise ValueError(
            f"log_probs is {tuple(log_probs.shape)} and label {tuple(label.shape)}; expected "
            "(B, C, h, w) and (B, h, w)"
        )
    _check_label(label, log_probs.shape[1])
    return widened(log_probs)


def _check_label(label: Tensor, classes: int) -> None:
    """ValueError if labels are not int64 or, on a CPU, out of range."""
    if label.dtype != torch.int64:
        raise ValueError(f"label is {label.dtype}; expected int64")
    # On a GPU the check would synchronise; torch's kernels assert there, except in dice and lovasz.
    if label.device.type != "cpu" or not label.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in label.aminmax())
    if low < IGNORED or high >= classes:
        raise ValueError(
            f"label has values from {low} to {high}; expected 0 to {classes - 1}, or {IGNORED} "
            "for ignored pixels"
        )


def widened(x: Tensor) -> Tensor:
    """Half precision is cast to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count; 0, with a gradient of 0, if the count is 0."""
    some = count > 0
    return torch.where(some, total / torch.where(some, count, torch.ones_like(count)), 0 * total)


def nll(log_probs: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood: cross entropy, given log-probabilities.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights of a weighted mean.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not match, or a label is out of range.
    """
    log_probs = _checked(log_probs, label)
    if weight is not None:
        weight = weight.to(log_probs)
    total = F.nll_loss(log_probs, label, weight, ignore_index=IGNORED, reduction="sum")
    return _divide(total, denominator(label, weight).to(total.dtype))


def smooth(
    log_probs: Tensor, label: Tensor, weight: Tensor | None = None, eps: float = 0.1
) -> Tensor:
    """Cross entropy with label smoothing: 1 - eps for the label, eps uniform over all classes.

    Class weights have the same effect as in `torch.nn.CrossEntropyLoss`.

    Paper: Szegedy et al. 2016, arXiv:1512.00567, sec. 7, with a uniform prior.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights; the sum is divided by the weights of the labels.
        eps: in [0, 1]; 0 is `nll`.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not match, a label is out of range, or eps is outside [0, 1].
    """
    log_probs = _checked(log_probs, label)
    if not 0 <= eps <= 1:
        raise ValueError(f"eps is {eps}; it must be within [0, 1]")
    weighted = log_probs if weight is None else log_probs * weight.to(log_probs)[:, None, None]
    uniform = -weighted.sum(1).masked_fill(label == IGNORED, 0)
    total = uniform.sum() / log_probs.shape[1]
    return (1 - eps) * nll(log_probs, label, weight) + eps * _divide(
        total, denominator(label, weight).to(total.dtype)
    )


def focal(
    log_probs: Tensor, label: Tensor, weight: Tensor | None = None, gamma: float = 2.0
) -> Tensor:
    """Focal loss: mean of -(1 - p)^gamma * log p, where p is the probability of the label.

    Paper: Lin et al. 2017, arXiv:1708.02002, eq. 4; with softmax instead of sigmoid.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights (alpha in the paper) of a weighted mean.
        gamma: focusing parameter: reduces the loss of well-classified pixels; 0 is `nll`.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not match, a label is out of range, or gamma is negative.
    """
    log_probs = _checked(log_probs, label)
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; it must be 0 or more")
    log_p = _label_log_probs(log_probs, label).masked_fill(label == IGNORED, 0)
    # 1 - p, accurate for p near 1. Clamped, as the gradient at 0 is infinite for gamma < 1.
    error = -torch.expm1(log_p)
    error = error.clamp(min=torch.finfo(error.dtype).tiny)
    per_pixel = -(error**gamma) * log_p
    if weight is not None:
        per_pixel = per_pixel * weight.to(log_p)[label.clamp(min=0)]
    total = per_pixel.sum()
    return _divide(total, denominator(label, weight).to(total.dtype))


def _label_log_probs(log_probs: Tensor, label: Tensor) -> Tensor:
    """(B, h, w) log-probability of the label; of class 0 at ignored pixels."""
    return log_probs.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)


def _one_hot(log_probs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """One-hot label (C, P) and mask of labelled pixels (1, P), in the dtype of `log_probs`."""
    flat = label.reshape(1, -1)
    classes = torch.arange(log_probs.shape[1], device=label.device).unsqueeze(1)
    return (flat == classes).to(log_probs), (flat != IGNORED).to(log_probs)


def _class_mean(per_class: Tensor, present: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of (C,) values over the classes present, weighted if `weight` is given."""
    weights = present.to(per_class)
    if weight is not None:
        weights = weights * weight.to(per_class)
    return _divide((per_class * weights).sum(), weights.sum())


def dice(
    log_probs: Tensor, label: Tensor, weight: Tensor | None = None, smooth: float = 1.0
) -> Tensor:
    """1 - soft Dice of each class over the whole batch, mean over the classes in the labels.

    Paper: Milletari et al. 2016, arXiv:1606.04797, sec. 3; for several classes, and without the
    squares in the denominator.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights of the mean over classes.
        smooth: added to numerator and denominator, in pixels, which stabilises rare classes.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: the shapes do not match, or a label is out of range.
    """
    log_probs = _checked(log_probs, label)
    y, valid = _one_hot(log_probs, label)
    p = log_probs.transpose(0, 1).flatten(1).exp() * valid
    count = y.sum(1)
    score = (2 * (p * y).sum(1) + smooth) / (p.sum(1) + count + smooth)
    return _class_mean(1 - score, count > 0, weight)


def ohem(
    log_probs: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    threshold: float = 0.7,
    min_share: float = 0.25,
) -> Tensor:
    """Online hard example mining: mean negative log-likelihood of the hard pixels only.

    A pixel is hard if the probability of its label is below the threshold. If fewer than
    `min_share` of the labelled pixels are, those with the smallest probabilities are used.

    Paper: Shrivastava et al. 2016, arXiv:1604.03540 (for regions); for pixels as is usual in
    segmentation, with a minimum fraction instead of a number, since batches vary in size.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights of the mean; they do not change which pixels are hard.
        threshold: probability in [0, 1].
        min_share: minimum fraction of the labelled pixels, in [0, 1].

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not match, a label is out of range, or `threshold` or
            `min_share` is outside [0, 1].
    """
    log_probs = _checked(log_probs, label)
    for name, value in (("threshold", threshold), ("min_share", min_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be within [0, 1]")
    if not label.numel():
        return nll(log_probs, label, weight)
    valid = label != IGNORED
    with torch.no_grad():
        p = _label_log_probs(log_probs, label).exp()
        p = p.masked_fill(~valid, torch.inf).flatten()  # ignored pixels sort last
        kept = torch.ceil(valid.sum() * min_share).long().clamp(min=1)
        kth = p.sort().values.gather(0, (kept - 1).reshape(1))
        hard = ((p < threshold) | (p <= kth)).view_as(label) & valid
    return nll(log_probs, torch.where(hard, label, torch.full_like(label, IGNORED)), weight)


def lovasz(log_probs: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Lovasz-Softmax: the Lovasz extension of 1 - IoU, mean over the classes in the labels.

    Paper: Berman et al. 2018, arXiv:1705.08790, eq. 8, 9 and 13, over the pixels of the batch.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights of the mean over classes.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: the shapes do not match, or a label is out of range.
    """
    log_probs = _checked(log_probs, label)
    y, valid = _one_hot(log_probs, label)
    p = log_probs.transpose(0, 1).flatten(1).exp()
    count = y.sum(1)
    with torch.no_grad():
        # Ignored pixels have error 0: they sort last and contribute nothing.
        order = ((y - p).abs() * valid).argsort(dim=1, descending=True)
        hit = y.gather(1, order)
        intersection = count[:, None] - hit.cumsum(1)
        union = count[:, None] + (1 - hit).cumsum(1)
        # Increments of 1 - IoU from pixel to pixel, in closed form: as differences of nearly equal
        # values they would be dominated by rounding.
        other = intersection / (union * (union - 1).clamp(min=1))
        steps = torch.where(hit > 0, 1 / union, other)
        steps = valid * torch.zeros_like(steps).scatter_(1, order, steps)
        slope = steps * (1 - 2 * y)  # the error is 1 - p where the label is the class, p elsewhere
        start = (steps * y).sum(1)
    return _class_mean(start + (slope * p).sum(1), count > 0, weight)


def presence(scores: Tensor, label: Tensor) -> Tensor:
    """Binary cross entropy of the presence of each class, mean over images and classes.

    Unlike the other losses it takes logits of whole images. Images without a labelled pixel are
    ignored.

    Paper: Zhang et al. 2018, "EncNet", arXiv:1803.08904, sec. 3.1 (the semantic encoding loss).

    Args:
        scores: (B, C) float logits.
        label: (B, h, w) int64, -1 ignored.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not match, or a label is out of range.
    """
    if scores.ndim != 2 or label.ndim != 3 or len(label) != len(scores):
        raise ValueError(
            f"scores is {tuple(scores.shape)} and label {tuple(label.shape)}; expected "
            "(B, C) and (B, h, w)"
        )
    scores = widened(scores)
    B, C = scores.shape
    _check_label(label, C)
    occurs = scores.new_zeros(B, C + 1).scatter(1, label.flatten(1) + 1, 1.0)[:, 1:]
    per_image = F.binary_cross_entropy_with_logits(scores, occurs, reduction="none").mean(1)
    counts = (label != IGNORED).flatten(1).any(1).to(scores.dtype)
    return _divide((per_image * counts).sum(), counts.sum())
