"""Maps of several resolutions: pools, their place in a tile, and convolution without resizing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------ tiles
@dataclass(frozen=True)
class Window:
    """Where in the whole image's map a tile's map lies.

    Attributes:
        top, left: of its first pixel.
        height, width: of the whole map.
    """

    top: int
    left: int
    height: int
    width: int


class TileFeatures(list[Tensor]):
    """Feature maps of one tile of an image, deepest last, that know the rest of the image.

    A decoder that pools asks `pooled` and `window_of` and need not know whether it has a tile.

    Attributes:
        pools: scale -> adaptive average pool of the whole image's deepest map, (N, C, s, s).
        window: where in that map the tile lies.
    """

    def __init__(self, maps: Iterable[Tensor], pools: Mapping[int, Tensor], window: Window) -> None:
        super().__init__(maps)
        self.pools, self.window = pools, window


def pooled(features: list[Tensor], scales: Sequence[int]) -> list[Tensor]:
    """Adaptive average pools of the whole image's deepest map, (N, C, s, s) for each scale s."""
    x = features[-1]
    if isinstance(features, TileFeatures):
        return [features.pools[scale].to(x.dtype) for scale in scales]
    return [F.adaptive_avg_pool2d(x, scale) for scale in scales]


def window_of(features: list[Tensor]) -> Window | None:
    """Where in the whole image's deepest map that of `features` lies; None: it is the whole."""
    return features.window if isinstance(features, TileFeatures) else None


def pool_matrix(n_in: int, n_out: int) -> Tensor:
    """Adaptive average pooling of one axis as a matrix, (n_out, n_in) float32."""
    edges = [(i * n_in // n_out, -(-(i + 1) * n_in // n_out)) for i in range(n_out)]
    matrix = torch.zeros(n_out, n_in)
    for row, (start, stop) in zip(matrix, edges, strict=True):
        row[start:stop] = 1 / (stop - start)
    return matrix


def spread(x: Tensor, size: torch.Size, window: Window | None = None) -> Tensor:
    """Bilinear resize with align_corners=False.

    Args:
        x: (N, C, h, w).
        size: (H, W) of the result.
        window: what of the resized map is wanted, as large as `size`; None: all of it.

    Returns:
        (N, C, H, W).
    """
    if window is None:
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    with without_autocast(x.device):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        down = _taps(x.shape[2], size[0], wide, window.top, window.height)[1]
        across = _taps(x.shape[3], size[1], wide, window.left, window.width)[1]
        return (down @ wide @ across.T).to(x.dtype)


# ------------------------------------------------------------------------------ convolution
class PyramidConv2d(nn.Conv2d):
    """3x3 convolution of a feature map joined with coarser maps, which are never resized.

    The same parameters and results as `nn.Conv2d` on `cat([x, *resized maps], dim=1)`. Both the
    bilinear resize and the convolution are linear, so the filter's taps may be applied to the few
    pixels of a coarse map first, and their results be spread over the image afterwards, along one
    axis at a time. The largest layer of PPM, and that of UPerNet, takes half the work or less.
    """

    def forward(
        self, x: Tensor, coarser: Sequence[Tensor] = (), window: Window | None = None
    ) -> Tensor:
        """Convolution with zero padding, as large as x.

        Args:
            x: (N, C, H, W).
            coarser: (N, C_k, h_k, w_k) each; the input channels after those of x, in order. With
                none x holds all of them, as for `nn.Conv2d`.
            window: where x lies in the map that the coarser ones cover; None: it is that map.

        Returns:
            (N, out_channels, H, W).
        """
        if not coarser:
            return super().forward(x)
        C = x.shape[1]
        y = F.conv2d(x, self.weight[:, :C], self.bias, padding=1)
        return y + self._spread(coarser, self.weight[:, C:], y, window).to(y.dtype)

    @staticmethod
    def _spread(
        maps: Sequence[Tensor], weight: Tensor, like: Tensor, window: Window | None
    ) -> Tensor:
        """What the coarse maps add to the output, in float32 at least: (N, K, H, W).

        Args:
            maps: (N, C_k, h_k, w_k) each.
            weight: (K, sum of C_k, 3, 3).
            like: the output, (N, K, H, W).
            window: where in what the maps cover the output lies.
        """
        N, K, H, W = like.shape
        top, left, height, width = (0, 0, H, W) if window is None else astuple(window)
        parts = weight.split([x.shape[1] for x in maps], dim=1)
        pixels = [x.permute(0, 2, 3, 1) for x in maps]  # (N, h, w, C)
        total: Tensor | None = None
        # Row by row of the filter, so that what is held at a time stays small.
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


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """What is computed in here keeps its type."""
    if not torch.amp.is_autocast_available(device.type):  # such as the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _taps(n_in: int, n_out: int, like: Tensor, start: int = 0, whole: int | None = None) -> Tensor:
    """Bilinear resize of one axis as a matrix, under each of a 3-tap filter's taps.

    Args:
        n_in: length of the axis before.
        n_out: length of what is wanted of it after.
        like: gives type and device.
        start: where that begins.
        whole: length of the whole axis after; by default all of it is wanted.

    Returns:
        (3, n_out, n_in): entry [t, i] weighs the input for output start + i + t - 1; zeros where
        that lies outside the whole axis, which is the convolution's padding.
    """
    whole = n_out if whole is None else whole
    output = torch.arange(start - 1, start + n_out + 1, device=like.device, dtype=like.dtype)
    at = (output + 0.5) * (n_in / whole) - 0.5
    distance = at.clamp(0, n_in - 1)[:, None] - torch.arange(n_in, device=like.device)
    weight = (1 - distance.abs()).clamp(min=0)
    weight = weight * ((output >= 0) & (output < whole))[:, None]
    return torch.stack([weight[t : t + n_out] for t in range(3)])
