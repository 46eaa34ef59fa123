"""PPM: the pyramid pooling module of PSPNet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d
from mit_semseg.models.decoders.base import (
    DECODERS,
    Decoder,
    conv_bn_relu,
    init_weights,
)


class PooledBatchNorm2d(SynchronizedBatchNorm2d):
    """BatchNorm that survives a single value per channel, as 1x1 pooling of one sample gives.

    One value has no variance. Where no other replica or process adds any, training then
    normalises with the running statistics, as evaluation does, and leaves them as they are; the
    weight and bias still learn.
    """

    def forward(self, input: Tensor) -> Tensor:
        B, _, H, W = input.shape
        alone = self._replica is None and self._live_group() is None
        if self.training and B * H * W == 1 and alone:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


class PyramidConv2d(nn.Conv2d):
    """3x3 convolution of a feature map joined with pooled maps, which are never resized.

    The same parameters and results as `nn.Conv2d` on `cat([x, *resized pools], dim=1)`. Both the
    bilinear resize and the convolution are linear, so the filter's taps may be applied to the few
    pixels of a pool first and their results be spread over the image afterwards, along one axis
    at a time. In PPM that saves almost half the work of the decoder's largest layer.
    """

    def forward(self, x: Tensor, pooled: Sequence[Tensor] = ()) -> Tensor:
        """Convolution with zero padding, as large as x.

        Args:
            x: (N, C, H, W).
            pooled: (N, C_k, s_k, s_k) each; the input channels after those of x, in order. With
                none x holds all of them, as for `nn.Conv2d`.

        Returns:
            (N, out_channels, H, W).
        """
        if not pooled:
            return super().forward(x)
        _, C, H, W = x.shape
        y = F.conv2d(x, self.weight[:, :C], self.bias, padding=1)
        parts = self.weight[:, C:].split([pool.shape[1] for pool in pooled], dim=1)
        columns = [self._columns(pool, part, W) for pool, part in zip(pooled, parts)]
        with _without_autocast(y.device):
            rows = torch.cat([_taps(pool.shape[2], H, columns[0]) for pool in pooled], dim=2)
            # (3, H, i) with (N, i, 3, W, K), over the filter's rows and those of all the pools.
            context = torch.einsum("ehi,niewk->nkhw", rows, torch.cat(columns, dim=1))
        return y + context.to(y.dtype)

    @staticmethod
    def _columns(pool: Tensor, weight: Tensor, W: int) -> Tensor:
        """Every row of a pool at the image's width, under each row of the filter, (N, s, 3, W, K).

        In float32 at least: what is rounded here is added up often.
        """
        K, C, _, _ = weight.shape
        # Of a channels_last filter this is a view, not a copy.
        filters = weight.permute(0, 2, 3, 1).reshape(9 * K, C)
        taps = F.linear(pool.permute(0, 2, 3, 1), filters)  # (N, s, s, 9 * K)
        with _without_autocast(pool.device):
            taps = taps.unflatten(3, (K, 3, 3)).to(torch.promote_types(taps.dtype, torch.float32))
            return torch.einsum("fwj,nijkef->niewk", _taps(pool.shape[3], W, taps), taps)


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


@DECODERS.register("ppm", "ppm_bilinear")
class PPM(Decoder):
    """Average pools at several sizes, joined with the feature map.

    Paper: Zhao et al. 2017, arXiv:1612.01105, sec. 3.2.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_class: int = 150,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        width: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(channels, num_class, **options)
        n_in = channels[-1]
        self.ppm = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(scale),
                nn.Conv2d(n_in, width, 1, bias=False),
                PooledBatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            for scale in pool_scales
        )
        joined = n_in + len(pool_scales) * width
        self.conv_last = nn.Sequential(
            PyramidConv2d(joined, width, 3, padding=1, bias=False),
            SynchronizedBatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_class, 1),
        )
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        x = features[-1]
        join, *layers = self.conv_last
        y = join(x, [pool(x) for pool in self.ppm])
        for layer in layers:
            y = layer(y)
        return (y,)


@DECODERS.register("ppm_deepsup", "ppm_bilinear_deepsup")
class PPMDeepSup(PPM):
    """PPM with a convolutional head on the feature map before the last, in training.

    Paper: Zhao et al. 2017, arXiv:1612.01105, sec. 3.3 (the auxiliary loss).
    """

    needs = 2
    auxiliary = True

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        width = channels[-1] // 4
        self.cbr_deepsup = conv_bn_relu(channels[-2], width)
        self.dropout_deepsup = nn.Dropout2d(0.1)
        self.conv_last_deepsup = nn.Conv2d(width, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        heads = super().logits(features)
        if self.training:
            x = self.dropout_deepsup(self.cbr_deepsup(features[-2]))
            heads += (self.conv_last_deepsup(x),)
        return heads
