"""Upsampling by the factors between the strides of an encoder, and unpooling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mit_semseg.models.layers import resize


def factors(strides: Sequence[int] | None, levels: int) -> list[int]:
    """Ratios of the strides of neighbouring maps, of the last `levels` maps, finest first.

    Args:
        strides: strides of all feature maps, deepest last; None: each is twice the one before.
        levels: number of maps used, counted from the deepest.

    Returns:
        `levels` - 1 integers; 1 for two maps of equal stride.

    Raises:
        ValueError: a stride is not a multiple of the one before.
    """
    if strides is None:
        return [2] * (levels - 1)
    used = tuple(strides)[-levels:]
    if any(coarse % fine for fine, coarse in pairwise(used)):
        raise ValueError(
            f"the encoder's strides are {tuple(strides)}, but this decoder needs each to be a "
            "multiple of the one before: set another MODEL.arch_encoder or MODEL.arch_decoder"
        )
    return [coarse // fine for fine, coarse in pairwise(used)]


def up_convolution(n_in: int, n_out: int, factor: int) -> nn.Module:
    """Transposed convolution with kernel size and stride `factor`; 1x1 convolution for 1."""
    if factor == 1:
        return nn.Conv2d(n_in, n_out, 1)
    return nn.ConvTranspose2d(n_in, n_out, factor, factor)


def full_convolution(n_in: int, n_out: int, factor: int, bias: bool = False) -> nn.ConvTranspose2d:
    """Transposed convolution that multiplies the sides by `factor`: 3x3, or larger above 2."""
    kernel = max(3, 2 * factor - 1)
    return nn.ConvTranspose2d(
        n_in, n_out, kernel, factor, kernel // 2, output_padding=factor - 1, bias=bias
    )


def fit(x: Tensor, like: Tensor) -> Tensor:
    """x, resized to the size of `like` if it differs.

    Encoders round sizes up, so an upsampled map can be a pixel larger than its skip connection.
    """
    return x if x.shape[-2:] == like.shape[-2:] else resize(x, like.shape[-2:])


def unpool(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Max unpooling: puts each value at the index of the maximum; other pixels are 0.

    Same as `F.max_unpool2d` for windows that do not overlap, but deterministic, and for all dtypes.

    Args:
        x: (B, C, h, w).
        indices: (B, C, h, w) int64, into the flattened (H, W) input plane of the pooling layer.
        size: (H, W).

    Returns:
        (B, C, H, W).
    """
    B, C, _, _ = x.shape
    H, W = size
    if x.is_contiguous(memory_format=torch.channels_last):  # keep the memory format
        place, values = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (indices, x))
        plane = x.new_zeros(B, H * W, C).scatter_(1, place, values)
        return plane.view(B, H, W, C).permute(0, 3, 1, 2)
    plane = x.new_zeros(B, C, H * W).scatter_(2, indices.flatten(2), x.flatten(2))
    return plane.view(B, C, H, W)
