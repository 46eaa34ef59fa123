"""Losses on log-probabilities, as functions; pixels labelled -1 take no part.

Every function takes `log_probs` (B, C, h, w), float, and `label` (B, h, w), int64 in [0, C) or
-1 for ignored pixels, and returns a scalar. When every pixel is ignored it is zero, with a graph,
so that a step can be taken. None of them branches on values: they compile. Half precision is
computed, and returned, in float32: sums over an image do not fit in float16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1


def denominator(label: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a mean over pixels divides by.

    Args:
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights.

    Returns:
        Scalar float: the valid pixels counted, or their class weights added up.
    """
    valid = label != IGNORED
    if weight is None:
        return valid.sum().to(torch.get_default_dtype())
    per_pixel = weight.to(label.device)[label.clamp(min=0)]
    return torch.where(valid, per_pixel, per_pixel.new_zeros(())).sum()


def labelled_images(label: Tensor) -> Tensor:
    """What a mean over images divides by: those of (B, h, w) with a valid pixel; scalar float."""
    return (label != IGNORED).flatten(1).any(1).sum().to(torch.get_default_dtype())


def _checked(log_probs: Tensor, label: Tensor) -> Tensor:
    """The log-probabilities in float32 or wider; ValueError where the two do not fit together."""
    if log_probs.ndim != 4 or label.shape != (log_probs.shape[0], *log_probs.shape[2:]):
        raise ValueError(
            f"log_probs is {tuple(log_probs.shape)} and label {tuple(label.shape)}; expected "
            "(B, C, h, w) and (B, h, w)"
        )
    _check_label(label, log_probs.shape[1])
    return _wide(log_probs)


def _check_label(label: Tensor, classes: int) -> None:
    """Refuse labels of another type and, where looking at them is cheap, of other values."""
    if label.dtype != torch.int64:
        raise ValueError(f"label is {label.dtype}; expected int64")
    # A GPU would have to be waited for; it ends in an assertion of its own, dice and lovasz apart.
    if label.device.type != "cpu" or not label.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in label.aminmax())
    if low < IGNORED or high >= classes:
        raise ValueError(
            f"label has values from {low} to {high}; expected 0 to {classes - 1}, or {IGNORED} "
            "for ignored pixels"
        )


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, other types as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count; 0, with a gradient of 0, where the count is 0."""
    some = count > 0
    return torch.where(some, total / torch.where(some, count, torch.ones_like(count)), 0 * total)


def nll(log_probs: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood: cross entropy, given log-probabilities.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights; the mean is then weighted too.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not belong together, or the label holds what is no class.
    """
    log_probs = _checked(log_probs, label)
    if weight is not None:
        weight = weight.to(log_probs)
    total = F.nll_loss(log_probs, label, weight, ignore_index=IGNORED, reduction="sum")
    return _divide(total, denominator(label, weight).to(total.dtype))


def smooth(
    log_probs: Tensor, label: Tensor, weight: Tensor | None = None, eps: float = 0.1
) -> Tensor:
    """Cross entropy with smoothed labels: 1 - eps goes to the label, eps to all classes alike.

    Paper: Szegedy et al. 2016, arXiv:1512.00567, sec. 7, with a uniform prior. With class weights
    every class's share is weighed by its own weight, as `torch.nn.CrossEntropyLoss` does it.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights; the mean is then divided by those of the labels.
        eps: in [0, 1]; 0 is `nll`.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not belong together, the label holds what is no class,
            or eps is outside [0, 1].
    """
    log_probs = _checked(log_probs, label)
    if not 0 <= eps <= 1:
        raise ValueError(f"eps is {eps}; it must be within [0, 1]")
    weighted = log_probs if weight is None else log_probs * weight.to(log_probs)[:, None, None]
    spread = -weighted.sum(1).masked_fill(label == IGNORED, 0)
    total = spread.sum() / log_probs.shape[1]
    return (1 - eps) * nll(log_probs, label, weight) + eps * _divide(
        total, denominator(label, weight).to(total.dtype)
    )


def focal(
    log_probs: Tensor, label: Tensor, weight: Tensor | None = None, gamma: float = 2.0
) -> Tensor:
    """Mean of (1 - p)^gamma * -log p, with p the probability of the label.

    Paper: Lin et al. 2017, arXiv:1708.02002, eq. 4; over a softmax instead of sigmoids.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights (alpha in the paper); the mean is then weighted too.
        gamma: how fast easy pixels fade; 0 is `nll`.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not belong together, the label holds what is no class,
            or gamma is negative.
    """
    log_probs = _checked(log_probs, label)
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; it must be 0 or more")
    log_p = _label_log_probs(log_probs, label).masked_fill(label == IGNORED, 0)
    # 1 - p, exact where p is nearly 1; at 0 the slope of a root (gamma < 1) would be infinite.
    doubt = -torch.expm1(log_p)
    doubt = doubt.clamp(min=torch.finfo(doubt.dtype).tiny)
    per_pixel = -(doubt**gamma) * log_p
    if weight is not None:
        per_pixel = per_pixel * weight.to(log_p)[label.clamp(min=0)]
    total = per_pixel.sum()
    return _divide(total, denominator(label, weight).to(total.dtype))


def _label_log_probs(log_probs: Tensor, label: Tensor) -> Tensor:
    """(B, h, w) log p of the label; that of class 0 at ignored pixels."""
    return log_probs.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1)


def _one_hot(log_probs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Label and validity, (C, P) and (1, P), in the type of the log-probabilities."""
    flat = label.reshape(1, -1)
    classes = torch.arange(log_probs.shape[1], device=label.device).unsqueeze(1)
    return (flat == classes).to(log_probs), (flat != IGNORED).to(log_probs)


def _class_mean(per_class: Tensor, present: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of (C,) values over the classes present, weighted if asked."""
    share = present.to(per_class)
    if weight is not None:
        share = share * weight.to(per_class)
    return _divide((per_class * share).sum(), share.sum())


def dice(
    log_probs: Tensor, label: Tensor, weight: Tensor | None = None, smooth: float = 1.0
) -> Tensor:
    """1 - soft Dice of each class over the whole batch, mean over the classes in the labels.

    Paper: Milletari et al. 2016, arXiv:1606.04797, sec. 3; with plain instead of squared sums in
    the denominator, and several classes.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights of the mean over classes.
        smooth: pixels added to numerator and denominator, which calms tiny classes.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: the shapes do not belong together, or the label holds what is no class.
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
    """Mean negative log-likelihood of the hard pixels only.

    Hard are pixels whose label has a probability below the threshold; when they are fewer than
    `min_share` of the valid pixels, the hardest that many.

    Paper: Shrivastava et al. 2016, arXiv:1604.03540 (regions); by pixel as is usual in scene
    parsing, with a share instead of a number, since sizes vary from batch to batch.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights; they weigh the mean and do not change which pixels are hard.
        threshold: probability in [0, 1].
        min_share: share in [0, 1] of the valid pixels that is kept at least.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not belong together, the label holds what is no class,
            or a setting is outside [0, 1].
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
        p = torch.where(valid, p, torch.full_like(p, torch.inf)).flatten()  # ignored: easiest
        kept = torch.ceil(valid.sum() * min_share).long().clamp(min=1)
        kth = p.sort().values.gather(0, (kept - 1).reshape(1))
        hard = ((p < threshold) | (p <= kth)).view_as(label) & valid
    return nll(log_probs, torch.where(hard, label, torch.full_like(label, IGNORED)), weight)


def lovasz(log_probs: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Lovasz-Softmax: the convex extension of 1 - IoU, mean over the classes in the labels.

    Paper: Berman et al. 2018, arXiv:1705.08790, eq. 8, 9 and 13, over the pixels of the batch.

    Args:
        log_probs: (B, C, h, w) log-probabilities.
        label: (B, h, w) int64, -1 ignored.
        weight: (C,) class weights of the mean over classes.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: the shapes do not belong together, or the label holds what is no class.
    """
    log_probs = _checked(log_probs, label)
    y, valid = _one_hot(log_probs, label)
    p = log_probs.transpose(0, 1).flatten(1).exp()
    count = y.sum(1)
    with torch.no_grad():
        # An ignored pixel has no error, sorts last and adds nothing: no need to cut it out.
        order = ((y - p).abs() * valid).argsort(dim=1, descending=True)
        hit = y.gather(1, order)
        intersection = count[:, None] - hit.cumsum(1)
        union = count[:, None] + (1 - hit).cumsum(1)
        # How much 1 - IoU grows from one pixel to the next: as the difference of two values that
        # are nearly equal it would be mostly rounding.
        other = intersection / (union * (union - 1).clamp(min=1))
        steps = torch.where(hit > 0, 1 / union, other)
        steps = valid * torch.zeros_like(steps).scatter_(1, order, steps)
        slope = steps * (1 - 2 * y)  # the error is 1 - p where the label is the class, p elsewhere
        start = (steps * y).sum(1)
    return _class_mean(start + (slope * p).sum(1), count > 0, weight)


def presence(scores: Tensor, label: Tensor) -> Tensor:
    """Binary cross entropy of which classes occur in each image, mean over images and classes.

    Unlike the other losses it takes logits of whole images. Images without a valid pixel take no
    part.

    Paper: Zhang et al. 2018, "EncNet", arXiv:1803.08904, sec. 3.1 (the semantic encoding loss).

    Args:
        scores: (B, C) float logits.
        label: (B, h, w) int64, -1 ignored.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes do not belong together, or the label holds what is no class.
    """
    if scores.ndim != 2 or label.ndim != 3 or len(label) != len(scores):
        raise ValueError(
            f"scores is {tuple(scores.shape)} and label {tuple(label.shape)}; expected "
            "(B, C) and (B, h, w)"
        )
    scores = _wide(scores)
    B, C = scores.shape
    _check_label(label, C)
    occurs = scores.new_zeros(B, C + 1).scatter(1, label.flatten(1) + 1, 1.0)[:, 1:]
    per_image = F.binary_cross_entropy_with_logits(scores, occurs, reduction="none").mean(1)
    counts = (label != IGNORED).flatten(1).any(1).to(scores.dtype)
    return _divide((per_image * counts).sum(), counts.sum())
