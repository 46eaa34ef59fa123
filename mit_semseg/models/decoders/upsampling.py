"""How decoders that go up step by step do it: by how much, back to which pixels, to which size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mit_semseg.models.layers import resize


def factors(strides: Sequence[int] | None, levels: int) -> list[int]:
    """How many times finer each of the last `levels` maps is than the next, finest first.

    Args:
        strides: of all feature maps, deepest last; None: each is half as fine as the one before.
        levels: maps that are used, counted from the deepest.

    Returns:
        `levels` - 1 whole numbers; 1 where two maps have the same stride.

    Raises:
        ValueError: a stride is no whole multiple of the one before.
    """
    if strides is None:
        return [2] * (levels - 1)
    used = tuple(strides)[-levels:]
    if any(coarse % fine for fine, coarse in pairwise(used)):
        raise ValueError(
            f"strides {tuple(strides)} cannot be gone up step by step: each must be a multiple of "
            "the one before; take another encoder"
        )
    return [coarse // fine for fine, coarse in pairwise(used)]


def up_convolution(n_in: int, n_out: int, factor: int) -> nn.Module:
    """Transposed convolution whose pixels each become factor x factor; 1x1 for a factor of 1."""
    if factor == 1:
        return nn.Conv2d(n_in, n_out, 1)
    return nn.ConvTranspose2d(n_in, n_out, factor, factor)


def full_convolution(n_in: int, n_out: int, factor: int, bias: bool = False) -> nn.ConvTranspose2d:
    """3x3 transposed convolution, larger for factors above 2; sides times the factor."""
    kernel = max(3, 2 * factor - 1)
    return nn.ConvTranspose2d(
        n_in, n_out, kernel, factor, kernel // 2, output_padding=factor - 1, bias=bias
    )


def fit(x: Tensor, like: Tensor) -> Tensor:
    """Resized to the sides of another map, if it has others.

    Sides are rounded up on the way down, so on the way up a map may be a pixel too large.
    """
    return x if x.shape[-2:] == like.shape[-2:] else resize(x, like.shape[-2:])


def unpool(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Puts each value back to where max pooling took one from; the other pixels are 0.

    What `torch.nn.functional.max_unpool2d` does for windows that do not overlap, but for all
    dtypes, and always in the same order.

    Args:
        x: (B, C, h, w).
        indices: (B, C, h, w) int64, into the flattened plane that was pooled.
        size: (H, W) of that plane.

    Returns:
        (B, C, H, W).
    """
    B, C, _, _ = x.shape
    H, W = size
    if x.is_contiguous(memory_format=torch.channels_last):  # as it came, for the next convolution
        place, values = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (indices, x))
        plane = x.new_zeros(B, H * W, C).scatter_(1, place, values)
        return plane.view(B, H, W, C).permute(0, 3, 1, 2)
    plane = x.new_zeros(B, C, H * W).scatter_(2, indices.flatten(2), x.flatten(2))
    return plane.view(B, C, H, W)
