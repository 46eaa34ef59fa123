"""U-Net's expanding path, for any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.upsampling import factors, fit, up_convolution
from mit_semseg.models.layers import conv_bn_relu


@DECODERS.register("unet")
class UNet(Decoder):
    """At each level: an up-convolution, concatenation with the encoder's map, two 3x3 convolutions.

    Every map of the encoder is a level, and each level has the channels of that map. Scores have
    the resolution of the finest map.

    Paper: Ronneberger et al. 2015, arXiv:1505.04597, sec. 2. The up-convolution has kernel size and
    stride k if the strides differ by a factor of k; between maps of equal stride, as in dilated
    encoders, it is a 1x1 convolution.

    Raises:
        ValueError: a stride of the encoder is not a multiple of the one before.

    Deviations:
        - Convolutions are padded and followed by BatchNorm, and therefore have no bias.
        - No ReLU follows an up-convolution: the paper mentions none, the authors' network has one.
        - The loss is the configured one; the paper's gives pixels on borders between cells a larger
          weight (eq. 2).
    """

    min_feature_maps = 2
    bilinear: ClassVar[bool] = False

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        ups: list[nn.Module] = []
        blocks: list[nn.Module] = []
        n_in = channels[-1]
        steps = list(zip(pairwise(channels), factors(self.strides, len(channels)), strict=True))
        for i, ((skip, _), factor) in reversed(list(enumerate(steps))):
            ups.append(nn.Identity() if self.bilinear else up_convolution(n_in, skip, factor))
            up = n_in if self.bilinear else skip
            # Without up-convolutions, the block reduces the channels to those of the next level.
            width = channels[max(i - 1, 0)] if self.bilinear else skip
            blocks.append(nn.Sequential(conv_bn_relu(up + skip, width), conv_bn_relu(width, width)))
            n_in = width
        self.ups = nn.ModuleList(ups)
        self.blocks = nn.ModuleList(blocks)
        self.conv_last = nn.Conv2d(n_in, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        *skips, x = features
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips), strict=True):
            x = block(torch.cat([skip, fit(up(x), skip)], dim=1))
        return (self.conv_last(x),)


@DECODERS.register("unet_bilinear")
class UNetBilinear(UNet):
    """U-Net with bilinear resizing instead of up-convolutions.

    With the encoder `unet_bilinear` it has 13.4 million parameters (51.1 MiB).

    Deviations:
        - The paper has no such form: here the 3x3 convolutions reduce the channels, as its
          up-convolutions do.
    """

    bilinear = True
