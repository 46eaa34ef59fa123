"""Losses of heads that look for boundaries or detail, as `Auxiliary(loss=...)` takes them.

Labels are (B, h, w) int64, -1 ignored, of any size: scores are resized to them. Half precision is
computed, and returned, in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mit_semseg.losses.functional import IGNORED, nll


def boundaries(label: Tensor, radius: int = 2) -> Tensor:
    """Pixels with another class nearby.

    Args:
        label: (B, h, w) int64, -1 ignored.
        radius: how far, in pixels along either axis.

    Returns:
        (B, h, w) bool; false at ignored pixels, and ignored pixels are no other class.
    """
    window = (2 * radius + 1, 1, radius)  # side, stride, padding
    ids = label.unsqueeze(1).float()  # pooling takes no integers
    highest = F.max_pool2d(ids, *window)
    lowest = -F.max_pool2d((-ids).masked_fill(ids < 0, -torch.inf), *window)
    return ((highest != lowest) & (ids >= 0)).squeeze(1)


def _at_label(scores: Tensor, label: Tensor) -> Tensor:
    """(B, C, H, W) -> float32 or wider, resized to the label."""
    if scores.ndim != 4 or label.ndim != 3 or len(scores) != len(label):
        raise ValueError(
            f"scores is {tuple(scores.shape)} and label {tuple(label.shape)}; expected "
            "(B, C, H, W) and (B, h, w)"
        )
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if scores.shape[2:] == label.shape[1:]:
        return scores
    size = (label.shape[1], label.shape[2])
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def boundary_bce(scores: Tensor, label: Tensor, radius: int = 2) -> Tensor:
    """Binary cross entropy of what is a boundary, in which both kinds of pixels weigh the same.

    Boundary pixels are weighed by the share of the others, and the other way round; the mean is
    over the pixels that are not ignored.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.4 (l1); weights of Xie and Tu 2015,
    arXiv:1504.06375, eq. 2.

    Args:
        scores: (B, 1, H, W) float logits.
        label: (B, h, w) int64, -1 ignored.
        radius: see `boundaries`.

    Returns:
        Scalar; 0 without a valid pixel.

    Raises:
        ValueError: the shapes do not belong together.
    """
    logits = _at_label(scores, label).squeeze(1)
    target, valid = boundaries(label, radius), label != IGNORED
    count = valid.sum().to(logits.dtype)
    share = target.sum() / count.clamp(min=1)
    weight = torch.where(target, 1 - share, share) * valid
    total = F.binary_cross_entropy_with_logits(
        logits, target.to(logits.dtype), weight.to(logits.dtype), reduction="sum"
    )
    return total / count.clamp(min=1)


def boundary_nll(scores: Tensor, label: Tensor, threshold: float = 0.8) -> Tensor:
    """Cross entropy of the classes where a boundary is predicted.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.4, eq. 9.

    Args:
        scores: (B, 1 + C, H, W) float logits, that of a boundary first.
        label: (B, h, w) int64, -1 ignored.
        threshold: probability above which a pixel is taken for a boundary.

    Returns:
        Scalar; 0 without such a pixel.

    Raises:
        ValueError: the shapes do not belong together, or the label holds what is no class.
    """
    scores = _at_label(scores, label)
    found = scores[:, 0].sigmoid() > threshold
    return nll(scores[:, 1:].log_softmax(1), label.where(found, torch.full_like(label, IGNORED)))
