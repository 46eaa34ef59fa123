"""BiSeNetV2's head: both branches aggregated, and an auxiliary head on each semantic stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.layers import conv_bn, conv_bn_relu, resize


def separable(n_in: int, n_out: int) -> nn.Sequential:
    """3x3 depthwise convolution, BatchNorm, 1x1 convolution."""
    conv = DepthwiseConv2d(n_in, n_in, 3, padding=1, groups=n_in, bias=False)
    return nn.Sequential(conv, BatchNorm2d(n_in), nn.Conv2d(n_in, n_out, 1, bias=False))


def head(n_in: int, width: int, num_class: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn_relu(n_in, width), nn.Dropout2d(0.1), nn.Conv2d(width, num_class, 1)
    )


class BilateralGuidedAggregation(nn.Module):
    """Each branch is weighed by the other, at its own resolution; then both are added up.

    Paper: Yu et al. 2021, arXiv:2004.02147, sec. 4.3, fig. 6.
    """

    def __init__(self, detail: int, semantic: int) -> None:
        super().__init__()
        width = detail
        self.detail = separable(detail, width)
        self.detail_down = conv_bn(detail, width, stride=2)
        self.semantic = separable(semantic, width)
        self.semantic_up = conv_bn(semantic, width)
        self.fuse = conv_bn(width, width)

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        small = F.avg_pool2d(self.detail_down(detail), 3, stride=2, padding=1)
        size = detail.shape[2:]
        fine = self.detail(detail) * resize(self.semantic_up(semantic), size).sigmoid()
        coarse = resize(small, semantic.shape[2:]) * self.semantic(semantic).sigmoid()
        y: Tensor = self.fuse(fine + resize(coarse, size))
        return y


@DECODERS.register("bisenetv2")
class BiSeNetV2(Decoder):
    """Scores of both branches, at stride 8.

    Auxiliary heads: on the four stages of the semantic branch, weight 1 as published.

    Paper: Yu et al. 2021, arXiv:2004.02147, sec. 4.3 and 4.4. The paper leaves the widths of the
    heads open: 1024 of the main one and 128 are those of the implementation that is used most,
    github.com/CoinCheung/BiSeNet.
    """

    min_feature_maps = 6
    supported_encoders = ("bisenetv2",)
    auxiliary = (Auxiliary(weight=1.0),) * 4

    def __init__(
        self, channels: Sequence[int], num_class: int = 150, width: int = 1024, **options: Any
    ) -> None:
        super().__init__(channels, num_class, **options)
        detail, *stages, semantic = channels[-6:]
        self.aggregate = BilateralGuidedAggregation(detail, semantic)
        self.conv_last = head(detail, width, num_class)
        self.conv_last_stages = nn.ModuleList(head(n_in, 128, num_class) for n_in in stages)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        detail, *stages, semantic = features[-6:]
        main = self.conv_last(self.aggregate(detail, semantic))
        if not self.training:
            return (main,)
        return (main, *(score(x) for score, x in zip(self.conv_last_stages, stages, strict=True)))
