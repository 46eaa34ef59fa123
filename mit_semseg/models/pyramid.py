"""Feature maps of several resolutions: pooling, resizing within tiles, and their convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.matrices import MATRICES, is_exporting, is_plain
from mit_semseg.models.layers import resize


@dataclass(frozen=True)
class Tile:
    """Position of a tile in the whole image, and the image's pools, for a decoder.

    Attributes:
        pools: scale s -> adaptive average pool of the deepest map of the whole image, (N, C, s, s).
        top, left: position of the tile's first pixel in that map.
        height, width: size of that map.
    """

    pools: Mapping[int, Tensor]
    top: int
    left: int
    height: int
    width: int


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which autocast is off."""
    if not torch.amp.is_autocast_available(device.type):  # such as the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


# ------------------------------------------------------------------------------ pools
def pooled(x: Tensor, scales: Sequence[int], tile: Tile | None = None) -> list[Tensor]:
    """Adaptive average pools of a map, (N, C, s, s) for each scale s.

    They are computed as one matrix product. For four pools, torch's kernels take 1.5 times as long
    on a CPU, and ten times as long in the backward pass; on a GPU they are the slowest part of PPM
    in channels last.

    Args:
        x: (N, C, H, W).
        scales: output sizes s.
        tile: position of x if it is part of a larger map, whose pools are returned.
    """
    if tile is not None:
        return [tile.pools[scale].to(x.dtype) for scale in scales]
    if is_exporting():
        return [_pooled_by_products(x, scale) for scale in scales]
    if not is_plain(x):
        return [F.adaptive_avg_pool2d(x, scale) for scale in scales]
    H, W = x.shape[2:]
    scales = tuple(scales)
    wide = torch.promote_types(x.dtype, torch.float32)
    matrix = MATRICES.get(
        ("pools", H, W, scales, x.dtype), x.device, lambda: _pools_matrix(H, W, scales).to(x.dtype)
    )
    factors = MATRICES.get(
        ("pool factors", H, W, scales, wide), x.device, lambda: _pool_factors(H, W, scales).to(wide)
    )
    with without_autocast(x.device):
        sums = matrix @ x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, cells, C)
        means = (sums * factors).to(x.dtype)
    cells = means.transpose(1, 2).split([s * s for s in scales], dim=2)
    return [part.unflatten(2, (s, s)) for part, s in zip(cells, scales, strict=True)]


def _pooled_by_products(x: Tensor, scale: int) -> Tensor:
    """`F.adaptive_avg_pool2d` in operations whose sizes may be symbolic.

    Exporters have no such pool for a map whose size is not known.
    """
    down, across = (_cells_matrix(n, scale, x) for n in x.shape[2:])
    return down @ x @ across.T


def _cells_matrix(n_in: int, n_out: int, like: Tensor) -> Tensor:
    """`pool_matrix` from the size as a tensor, in the dtype and on the device of `like`."""
    pixel = torch.arange(n_in, device=like.device)
    cell = torch.arange(n_out, device=like.device)[:, None]
    inside = (pixel >= cell * n_in // n_out) & (pixel * n_out < (cell + 1) * n_in)
    matrix = inside.to(like.dtype)
    return matrix / matrix.sum(dim=1, keepdim=True)


def pool_cells(n_in: int, n_out: int) -> list[tuple[int, int]]:
    """(start, stop) of the pixels that each output of a 1D adaptive pool covers."""
    return [(i * n_in // n_out, -(-(i + 1) * n_in // n_out)) for i in range(n_out)]


def pool_matrix(n_in: int, n_out: int) -> Tensor:
    """1D adaptive average pooling as a matrix, (n_out, n_in) float32."""
    matrix = torch.zeros(n_out, n_in)
    for row, (start, stop) in zip(matrix, pool_cells(n_in, n_out), strict=True):
        row[start:stop] = 1 / (stop - start)
    return matrix


def _areas(H: int, W: int, scales: Sequence[int]) -> list[int]:
    """Number of pixels in every cell of all pools, in row-major order."""
    return [
        (bottom - top) * (right - left)
        for scale in scales
        for top, bottom in pool_cells(H, scale)
        for left, right in pool_cells(W, scale)
    ]


def _pools_matrix(H: int, W: int, scales: Sequence[int]) -> Tensor:
    """(cells, H * W): 1 / area of the cell that contains a pixel, rounded down to a power of two.

    Powers of two are exact in every dtype, and the weighted sums do not overflow float16. The
    sums are then multiplied by `_pool_factors`.
    """
    layers = []
    for scale in scales:
        rows, columns = ((pool_matrix(n, scale) > 0).float() for n in (H, W))
        layers.append(torch.einsum("ih,jw->ijhw", rows, columns).flatten(2).flatten(0, 1))
    powers = [2.0 ** -math.ceil(math.log2(area)) for area in _areas(H, W, scales)]
    return torch.cat(layers) * torch.tensor(powers)[:, None]


def _pool_factors(H: int, W: int, scales: Sequence[int]) -> Tensor:
    """(cells, 1) float64, in [1, 2): 1 / area divided by its rounded value."""
    factors = [2.0 ** math.ceil(math.log2(area)) / area for area in _areas(H, W, scales)]
    return torch.tensor(factors, dtype=torch.float64)[:, None]


# ------------------------------------------------------------------------------ resizing
def resize_within(x: Tensor, size: torch.Size, tile: Tile | None = None) -> Tensor:
    """Bilinear resize (align_corners=False) of a map of the whole image, cropped to a tile.

    Args:
        x: (N, C, h, w).
        size: (H, W) of the result.
        tile: position of the crop in the resized map; None: no crop.

    Returns:
        (N, C, H, W).
    """
    if tile is None:
        return resize(x, size)
    with without_autocast(x.device):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        down = _taps(x.shape[2], size[0], wide, tile.top, tile.height)[1]
        across = _taps(x.shape[3], size[1], wide, tile.left, tile.width)[1]
        return (down @ wide @ across.T).to(x.dtype)


def _taps(n_in: int, n_out: int, like: Tensor, start: int = 0, whole: int | None = None) -> Tensor:
    """1D bilinear resize as a matrix, shifted for each tap of a 3-tap filter.

    Args:
        n_in: length of the input.
        n_out: length of the result.
        like: tensor with the dtype and device of the result.
        start: first pixel of the result in the whole resized axis.
        whole: length of the whole resized axis; None: `n_out`.

    Returns:
        (3, n_out, n_in): row [t, i] has the weights of the resized pixel start + i + t - 1. It is
        zero if that lies outside the whole axis, like the padding of the convolution.
    """
    lengths = n_in, n_out, start, n_out if whole is None else whole
    make = partial(_make_taps, *lengths, like.dtype)
    if not is_plain(like):
        return make().to(like.device)
    return MATRICES.get(("taps", *lengths, like.dtype), like.device, make)


def _make_taps(n_in: int, n_out: int, start: int, whole: int, dtype: torch.dtype) -> Tensor:
    output = torch.arange(start - 1, start + n_out + 1, dtype=dtype)
    at = (output + 0.5) * (n_in / whole) - 0.5
    distance = at.clamp(0, n_in - 1)[:, None] - torch.arange(n_in)
    weight = (1 - distance.abs()).clamp(min=0)
    weight = weight * ((output >= 0) & (output < whole))[:, None]
    return torch.stack([weight[t : t + n_out] for t in range(3)])


# ------------------------------------------------------------------------------ convolution
class PyramidConv2d(nn.Conv2d):
    """3x3 convolution of a map and of coarser maps: `conv(cat([x, *resized maps], dim=1))`.

    Bilinear resizing and convolution are linear, so on a CPU the taps of the filter are applied to
    the coarse maps at their own resolution, and the results are resized, one axis at a time. This
    is at most half the work of the largest layer of PPM or UPerNet. On a GPU one large convolution
    is faster.
    """

    def __init__(self, fine_channels: int, coarser_channels: int, out_channels: int) -> None:
        """Initialise the layer, with zero padding and without a bias.

        Args:
            fine_channels: channels of x.
            coarser_channels: total channels of the coarser maps.
            out_channels: output channels.
        """
        joined = fine_channels + coarser_channels
        super().__init__(joined, out_channels, 3, padding=1, bias=False)
        self.fine_channels = fine_channels

    def forward(  # type: ignore[override]
        self, x: Tensor, coarser: Sequence[Tensor] = (), tile: Tile | None = None
    ) -> Tensor:
        """Convolution with zero padding, of the size of x.

        Args:
            x: (N, C, H, W).
            coarser: (N, C_k, h_k, w_k) each; the input channels after those of x, in order.
            tile: position of x in the whole map, which the coarser ones cover; None: x is whole.

        Returns:
            (N, out_channels, H, W).
        """
        if coarser and x.device.type == "cpu" and is_plain(x):
            C = x.shape[1]
            y = F.conv2d(x, self.weight[:, :C], self.bias, padding=1)
            return y + convolve_coarser(coarser, self.weight[:, C:], y, tile).to(y.dtype)
        resized = [resize_within(y, x.shape[2:], tile) for y in coarser]
        return super().forward(torch.cat([x, *resized], dim=1))


def convolve_coarser(
    maps: Sequence[Tensor], weight: Tensor, like: Tensor, tile: Tile | None
) -> Tensor:
    """Contribution of the coarse maps to the output, in at least float32: (N, K, H, W).

    Args:
        maps: (N, C_k, h_k, w_k) each.
        weight: (K, sum of C_k, 3, 3).
        like: the output, (N, K, H, W).
        tile: position of the output in what the maps cover.
    """
    N, K, H, W = like.shape
    top, left, height, width = 0, 0, H, W
    if tile is not None:
        top, left, height, width = tile.top, tile.left, tile.height, tile.width
    parts = weight.split([x.shape[1] for x in maps], dim=1)
    pixels = [x.permute(0, 2, 3, 1) for x in maps]  # (N, h, w, C)
    total: Tensor | None = None
    # One row of the filter at a time, to limit memory.
    for row in range(3):
        wide = []
        for x, part in zip(pixels, parts):
            filters = part[:, :, row].permute(2, 0, 1).flatten(0, 1)  # (3 * K, C)
            taps = F.linear(x, filters)
            with without_autocast(x.device):
                taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
                taps = taps.unflatten(3, (3, K)).flatten(2, 3)  # (N, h, w * 3, K)
                across = _taps(x.shape[2], W, taps, left, width)
                across = across.permute(1, 2, 0).flatten(1)  # (W, w * 3)
                wide.append(across @ taps)  # (N, h, W, K)
        with without_autocast(like.device):
            down = torch.cat(
                [_taps(x.shape[1], H, wide[0], top, height)[row] for x in pixels], dim=1
            )
            added = down @ torch.cat(wide, dim=1).flatten(2)  # (N, H, W * K)
            total = added if total is None else total + added
    assert total is not None
    return total.unflatten(2, (W, K)).permute(0, 3, 1, 2)
