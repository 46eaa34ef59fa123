"""Losses of auxiliary heads for boundaries, for `Auxiliary(loss=...)`.

Labels are (B, h, w) int64, -1 ignored, of any size: scores are resized to them. Half precision is
computed and returned in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mit_semseg.losses.functional import IGNORED, nll, widened


def boundaries(label: Tensor, radius: int = 2) -> Tensor:
    """Pixels with another class in their neighbourhood.

    Args:
        label: (B, h, w) int64, -1 ignored.
        radius: radius of the square neighbourhood, in pixels.

    Returns:
        (B, h, w) bool; False at ignored pixels, which do not count as another class.
    """
    window = (2 * radius + 1, 1, radius)  # side, stride, padding
    ids = label.unsqueeze(1).float()  # pooling does not support integers
    highest = F.max_pool2d(ids, *window)
    lowest = -F.max_pool2d((-ids).masked_fill(ids < 0, -torch.inf), *window)
    return ((highest != lowest) & (ids >= 0)).squeeze(1)


def _at_label(scores: Tensor, label: Tensor) -> Tensor:
    """Scores (B, C, H, W) in at least float32, resized to the label."""
    if scores.ndim != 4 or label.ndim != 3 or len(scores) != len(label):
        raise ValueError(
            f"scores is {tuple(scores.shape)} and label {tuple(label.shape)}; expected "
            "(B, C, H, W) and (B, h, w)"
        )
    scores = widened(scores)
    if scores.shape[2:] == label.shape[1:]:
        return scores
    size = (label.shape[1], label.shape[2])
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def boundary_bce(scores: Tensor, label: Tensor, radius: int = 2) -> Tensor:
    """Class-balanced binary cross entropy of boundaries, mean over the labelled pixels.

    Boundary pixels are weighted by the fraction of other pixels, and vice versa.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.4 (l1); weights of Xie and Tu 2015,
    arXiv:1504.06375, eq. 2.

    Args:
        scores: (B, 1, H, W) float logits.
        label: (B, h, w) int64, -1 ignored.
        radius: see `boundaries`.

    Returns:
        Scalar; 0 without labelled pixels.

    Raises:
        ValueError: the shapes do not match.
    """
    logits = _at_label(scores, label).squeeze(1)
    target, valid = boundaries(label, radius), label != IGNORED
    count = valid.sum().to(logits.dtype)
    fraction = target.sum() / count.clamp(min=1)
    weight = torch.where(target, 1 - fraction, fraction) * valid
    total = F.binary_cross_entropy_with_logits(
        logits, target.to(logits.dtype), weight.to(logits.dtype), reduction="sum"
    )
    return total / count.clamp(min=1)


def boundary_nll(scores: Tensor, label: Tensor, threshold: float = 0.8) -> Tensor:
    """Cross entropy of the classes at predicted boundaries.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.4, eq. 9.

    Args:
        scores: (B, 1 + C, H, W) float logits: the boundary first, then the classes.
        label: (B, h, w) int64, -1 ignored.
        threshold: probability above which a pixel is a boundary.

    Returns:
        Scalar; 0 without such pixels.

    Raises:
        ValueError: the shapes do not match, or a label is out of range.
    """
    scores = _at_label(scores, label)
    found = scores[:, 0].sigmoid() > threshold
    return nll(scores[:, 1:].log_softmax(1), label.where(found, torch.full_like(label, IGNORED)))


def details(label: Tensor) -> Tensor:
    """Pixels of a label with fine structure, from its Laplacian at three scales.

    A pixel is an edge if the Laplacian of the class ids is positive, which is the case on the side
    of the higher id. Edges at strides 1, 2 and 4 are summed with the weights 0.6, 0.3 and 0.1, and
    a pixel with a sum above 0.1 is detail.

    Paper: Fan et al. 2021, arXiv:2104.13188, sec. 3.3 and fig. 5.

    Args:
        label: (B, h, w) int64, -1 ignored.

    Returns:
        (B, h, w) bool; False at ignored pixels, which do not form edges.
    """
    valid = (label != IGNORED).unsqueeze(1)
    ids = label.unsqueeze(1).float() * valid
    ones = ids.new_ones(1, 1, 3, 3)
    around = F.conv2d(torch.cat([ids, valid.float()], 0), ones, padding=1)
    total, count = around.chunk(2)
    edges = (((ids * count - total) > 0.1) & valid).float()
    size = (label.shape[1], label.shape[2])
    sums = 0.6 * edges
    for weight, step in ((0.3, 2), (0.1, 4)):
        sums = sums + weight * F.interpolate(edges[..., ::step, ::step], size)  # nearest
    # The next larger sum is 0.3: a threshold of 0.2 is robust to rounding.
    return ((sums > 0.2) & valid).squeeze(1)


def detail(scores: Tensor, label: Tensor) -> Tensor:
    """Sum of binary cross entropy and Dice loss of `details`, over the labelled pixels.

    Paper: Fan et al. 2021, arXiv:2104.13188, sec. 3.3, eq. 5 and 6.

    Args:
        scores: (B, 1, H, W) float logits.
        label: (B, h, w) int64, -1 ignored.

    Returns:
        Scalar; 0 without labelled pixels.

    Raises:
        ValueError: the shapes do not match.
    """
    logits = _at_label(scores, label).squeeze(1)
    valid = (label != IGNORED).to(logits.dtype)
    target, count = details(label).to(logits.dtype), valid.sum()
    bce = F.binary_cross_entropy_with_logits(logits, target, valid, reduction="sum")
    p, axes = logits.sigmoid() * valid, (1, 2)
    both, each = (p * target).sum(axes), p.sum(axes) + target.sum(axes)
    dice = 1 - (2 * both + 1) / (each + 1)  # (B,); 0 of an image without valid pixels
    return bce / count.clamp(min=1) + dice.mean()
