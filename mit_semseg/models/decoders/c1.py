"""C1: one 3x3 convolution and a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.deepsup import DeepSup
from mit_semseg.models.layers import conv_bn_relu


@DECODERS.register("c1", "c1_bilinear")
class C1(Decoder):
    """3x3 conv-BN-ReLU to a quarter of the channels, then 1x1 to the classes.

    The simplest head of the published MIT toolkit. It has no paper; it is the auxiliary head of
    Zhao et al. 2017, arXiv:1612.01105, sec. 3.3.
    """

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        width = max(channels[-1] // 4, 1)
        self.cbr = conv_bn_relu(channels[-1], width)
        self.conv_last = nn.Conv2d(width, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        return (self.conv_last(self.cbr(features[-1])),)


@DECODERS.register("c1_deepsup", "c1_bilinear_deepsup")
class C1DeepSup(DeepSup, C1):
    """C1 with an auxiliary head, also C1, on the feature map before the last."""
