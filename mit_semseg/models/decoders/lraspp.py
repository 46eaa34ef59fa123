"""LR-ASPP: the light head of MobileNetV3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu, resize
from mit_semseg.models.pyramid import Tile


def low_level(strides: Sequence[int] | None, count: int) -> int:
    """Index of the map that gives the detail: the deepest of stride 8 or less, above the last."""
    if strides is None:
        return count - 2
    fine = [i for i, stride in enumerate(strides) if stride <= 8 and stride < strides[-1]]
    return fine[-1] if fine else 0


@DECODERS.register("lraspp")
class LRASPP(Decoder):
    """The deepest map, its channels weighed by their means, with a map of stride 8.

    The deepest map is reduced to 128 channels and multiplied by weights in [0, 1] that depend on
    its means; scores of it and of the deepest map of stride 8 or less are added at the resolution
    of the latter.

    Paper: Howard et al. 2019, arXiv:1905.02244, sec. 6.4 and fig. 10.

    Deviations:
        - The weights are of the whole map, as in torchvision, whose weights this takes; the paper
          pools 49x49 pixels with strides 16 and 20, and resizes the weights to the map.
        - Of MobileNetV3 the map of stride 8 is the output of its first block at that stride, as in
          torchvision.
    """

    min_feature_maps = 2
    pool_scales = (1,)

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        self.low_level = low_level(self.strides, len(self.channels))
        self.cbr = conv_bn_relu(channels[-1], 128, 1)
        self.scale = nn.Sequential(nn.Conv2d(channels[-1], 128, 1, bias=False), nn.Sigmoid())
        self.conv_last = nn.Conv2d(128, num_class, 1)
        self.conv_last_low = nn.Conv2d(channels[self.low_level], num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        (mean,) = self.pools(features[-1], tile)
        low = features[self.low_level]
        deep = self.cbr(features[-1]) * self.scale(mean)
        return (self.conv_last_low(low) + self.conv_last(resize(deep, low.shape[-2:])),)
