"""SegFormer's head: one linear layer for each feature map, and two for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu, resize


@DECODERS.register("segformer")
class SegFormer(Decoder):
    """Projects every feature map to one width, joins them at the finest, fuses and classifies.

    The width is 256, as of SegFormer-B0 and B1.

    Paper: Xie et al. 2021, arXiv:2105.15203, sec. 3.2, eq. 4.
    """

    min_feature_maps = 2
    width: ClassVar[int] = 256

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        # A linear layer on the channels of a map is a 1x1 convolution.
        self.project = nn.ModuleList(nn.Conv2d(n_in, self.width, 1) for n_in in channels)
        self.fuse = conv_bn_relu(len(channels) * self.width, self.width, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_last = nn.Conv2d(self.width, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        size = features[0].shape[2:]
        maps = [resize(layer(x), size) for layer, x in zip(self.project, features, strict=True)]
        x = self.fuse(torch.cat(maps[::-1], dim=1))  # deepest first, as in the authors' code
        return (self.conv_last(self.dropout(x)),)


@DECODERS.register("segformer_wide")
class SegFormerWide(SegFormer):
    """The same with width 768, as of SegFormer-B2 to B5."""

    width = 768
