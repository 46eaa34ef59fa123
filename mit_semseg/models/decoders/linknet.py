"""LinkNet: light decoder blocks, with the encoder's maps added as skip connections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.upsampling import factors, fit, full_convolution
from mit_semseg.models.layers import conv_bn_relu

EPS = 1e-3  # of BatchNorm, as in the authors' code


def full_conv_bn_relu(n_in: int, n_out: int, factor: int, eps: float = EPS) -> nn.Sequential:
    conv = full_convolution(n_in, n_out, factor)
    return nn.Sequential(conv, BatchNorm2d(n_out, eps), nn.ReLU(inplace=True))


def block(n_in: int, n_out: int, factor: int) -> nn.Sequential:
    """1x1 to a quarter of the channels, full convolution, 1x1."""
    width = max(n_in // 4, 1)
    return nn.Sequential(
        conv_bn_relu(n_in, width, 1, eps=EPS),
        full_conv_bn_relu(width, width, factor),
        conv_bn_relu(width, n_out, 1, eps=EPS),
    )


@DECODERS.register("linknet")
class LinkNet(Decoder):
    """A block for each map of the encoder, then two full convolutions to the size of the image.

    With `resnet18`, levels and channels are the paper's. With other encoders, each block upsamples
    by the ratio of the strides, and the last two full convolutions do not exceed the image.

    Paper: Chaurasia and Culurciello 2017, arXiv:1707.03718, sec. 3. BatchNorm has eps 1e-3 (1e-5
    after the first of the last two full convolutions), as in the authors' code.

    Raises:
        ValueError: a stride of the encoder is not a multiple of the one before.

    Deviations:
        - The encoder `resnet18` has three 3x3 convolutions in its stem instead of one 7x7: 11.7
          million parameters instead of 11.5, which `torchvision_resnet18` has.
        - The last block has no link: the pooled stem, which the paper adds to its output, is not a
          map that encoders emit.
        - Convolutions before a BatchNorm have no bias, which BatchNorm would cancel; in the
          authors' code all have one.
    """

    min_feature_maps = 2
    width = 32  # channels between the last two full convolutions

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        steps = list(zip(pairwise(channels), factors(self.strides, len(channels)), strict=True))
        self.blocks = nn.ModuleList(
            block(n_in, n_out, factor) for (n_out, n_in), factor in reversed(steps)
        )
        self.blocks.append(block(channels[0], channels[0], 1))
        left = self.strides[0] if self.strides else 4
        first = 2 if left % 2 == 0 else 1
        second = 2 if left % 4 == 0 else 1
        self.up = full_conv_bn_relu(channels[0], self.width, first, eps=1e-5)  # as the authors'
        self.conv = conv_bn_relu(self.width, self.width, eps=EPS)
        self.conv_last = nn.ConvTranspose2d(self.width, num_class, second, second)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        *links, x = features
        *blocks, last = self.blocks
        for step, link in zip(blocks, reversed(links), strict=True):
            x = link + fit(step(x), link)
        return (self.conv_last(self.conv(self.up(last(x)))),)
