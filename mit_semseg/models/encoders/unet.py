"""U-Net's contracting path."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights
from mit_semseg.models.layers import conv_bn_relu


def double_conv(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(*conv_bn_relu(n_in, n_out), *conv_bn_relu(n_out, n_out))


@ENCODERS.register("unet")
class UNetEncoder(Encoder):
    """Five levels of two 3x3 convolutions, with 2x2 max pooling between them.

    Paper: Ronneberger et al. 2015, arXiv:1505.04597, sec. 2.

    Deviations:
        - Convolutions are padded, so that maps keep their size and skip connections need no
          cropping.
        - Each is followed by BatchNorm and has no bias.
        - There is no dropout at the end.
        - Pooling rounds sides up, not down.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)
    strides = (1, 2, 4, 8, 16)

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *self.channels[:-1])
        self.levels = nn.ModuleList(
            double_conv(n_in, n_out) for n_in, n_out in zip(inputs, self.channels, strict=True)
        )
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        first, *deeper = self.levels
        maps = [first(images)]
        for level in deeper:
            maps.append(level(F.max_pool2d(maps[-1], 2, ceil_mode=True)))
        return maps


@ENCODERS.register("unet_bilinear")
class UNetBilinearEncoder(UNetEncoder):
    """U-Net's encoder with half the channels in the deepest level, for bilinear upsampling.

    Bilinear upsampling does not halve the channels, unlike an up-convolution, so the deepest level
    has as many as its skip connection.
    """

    channels = (64, 128, 256, 512, 512)
