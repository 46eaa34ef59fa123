"""DeepLabv3+: ASPP, and a decoder with low-level features at stride 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.deeplabv3 import ASPP, aspp_rates
from mit_semseg.models.layers import conv_bn_relu, resize
from mit_semseg.models.pyramid import Tile


def low_level(strides: Sequence[int] | None) -> int:
    """Index of the low-level features: the deepest map of stride 4 or less, else the finest."""
    if strides is None:
        return 0
    fine = [i for i, stride in enumerate(strides[:-1]) if stride <= 4]
    return fine[-1] if fine else 0


@DECODERS.register("deeplabv3plus")
class DeepLabV3Plus(Decoder):
    """ASPP, concatenated with low-level features (48 channels), two 3x3 convolutions, a classifier.

    The low-level features are the encoder's deepest map of stride 4 or less, or else its finest;
    scores have their stride.

    Paper: Chen et al. 2018, arXiv:1802.02611, sec. 3.1 and 4.1. ASPP ends in dropout of 0.1 as in
    the authors' code; the paper does not mention it.

    Deviations:
        - Convolutions are ordinary, as in the paper's own ResNet variant, not separable (sec. 3.2),
          also with Xception and MobileNetV2.
        - Low-level features are a map that an encoder emits for every decoder. In MobileNetV2 that
          is the first block with 24 channels; the authors' code reads the 144 channels of the
          depthwise convolution in the second. In a ResNet it is the first stage; theirs reads the
          last convolution of the stage's second block, before the shortcut is added. In Xception it
          is theirs.
        - ResNets have no multi-grid.
        - Features and scores are resized with `align_corners=False`; the authors' code has True.
        - BatchNorm's momentum is 0.1; in the authors' decoder it is 0.0003.
    """

    min_feature_maps = 2
    pool_scales = (1,)

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        self.low_level = low_level(self.strides)
        self.aspp = ASPP(channels[-1], aspp_rates(self.strides), drop=0.1)
        self.low = conv_bn_relu(channels[self.low_level], 48, 1)
        self.fuse = nn.Sequential(conv_bn_relu(48 + 256, 256), conv_bn_relu(256, 256))
        self.conv_last = nn.Conv2d(256, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        (mean,) = self.pools(features[-1], tile)
        low = self.low(features[self.low_level])
        deep = resize(self.aspp(features[-1], mean), low.shape[-2:])
        return (self.conv_last(self.fuse(torch.cat([low, deep], dim=1))),)
