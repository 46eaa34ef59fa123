"""Convolution of maps of several resolutions, at the finest, without resizing any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PyramidConv2d(nn.Conv2d):
    """3x3 convolution of a feature map joined with coarser maps, which are never resized.

    The same parameters and results as `nn.Conv2d` on `cat([x, *resized maps], dim=1)`. Both the
    bilinear resize and the convolution are linear, so the filter's taps may be applied to the few
    pixels of a coarse map first, and their results be spread over the image afterwards, along one
    axis at a time. The largest layer of PPM, and that of UPerNet, takes half the work or less.
    """

    def forward(self, x: Tensor, coarser: Sequence[Tensor] = ()) -> Tensor:
        """Convolution with zero padding, as large as x.

        Args:
            x: (N, C, H, W).
            coarser: (N, C_k, h_k, w_k) each; the input channels after those of x, in order. With
                none x holds all of them, as for `nn.Conv2d`.

        Returns:
            (N, out_channels, H, W).
        """
        if not coarser:
            return super().forward(x)
        C = x.shape[1]
        y = F.conv2d(x, self.weight[:, :C], self.bias, padding=1)
        return y + self._spread(coarser, self.weight[:, C:], y).to(y.dtype)

    @staticmethod
    def _spread(maps: Sequence[Tensor], weight: Tensor, like: Tensor) -> Tensor:
        """What the coarse maps add to the output, in float32 at least: (N, K, H, W).

        Args:
            maps: (N, C_k, h_k, w_k) each.
            weight: (K, sum of C_k, 3, 3).
            like: the output, (N, K, H, W).
        """
        N, K, H, W = like.shape
        parts = weight.split([x.shape[1] for x in maps], dim=1)
        pixels = [x.permute(0, 2, 3, 1) for x in maps]  # (N, h, w, C)
        total: Tensor | None = None
        # Row by row of the filter, so that what is held at a time stays small.
        for row in range(3):
            wide = []
            for x, part in zip(pixels, parts):
                filters = part[:, :, row].permute(2, 0, 1).flatten(0, 1)  # (3 * K, C)
                taps = F.linear(x, filters)
                with _without_autocast(x.device):
                    taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
                    taps = taps.unflatten(3, (3, K)).flatten(2, 3)  # (N, h, w * 3, K)
                    across = _taps(x.shape[2], W, taps).permute(1, 2, 0).flatten(1)  # (W, w * 3)
                    wide.append(across @ taps)  # (N, h, W, K)
            with _without_autocast(like.device):
                down = torch.cat([_taps(x.shape[1], H, wide[0])[row] for x in pixels], dim=1)
                added = down @ torch.cat(wide, dim=1).flatten(2)  # (N, H, W * K)
                total = added if total is None else total + added
        assert total is not None
        return total.unflatten(2, (W, K)).permute(0, 3, 1, 2)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):  # such as the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _taps(n_in: int, n_out: int, like: Tensor) -> Tensor:
    """Bilinear resize of one axis as a matrix, under each of a 3-tap filter's taps.

    Returns:
        (3, n_out, n_in): entry [t, i] weighs the input for output i + t - 1; zeros where that lies
        outside, which is the convolution's padding.
    """
    at = (torch.arange(n_out, device=like.device, dtype=like.dtype) + 0.5) * (n_in / n_out) - 0.5
    distance = at.clamp(0, n_in - 1)[:, None] - torch.arange(n_in, device=like.device)
    padded = F.pad((1 - distance.abs()).clamp(min=0), (0, 0, 1, 1))
    return torch.stack([padded[t : t + n_out] for t in range(3)])
