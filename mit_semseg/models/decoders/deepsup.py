"""Deep supervision: an auxiliary head on the feature map before the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mit_semseg.models.decoders.base import Auxiliary, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu
from mit_semseg.models.pyramid import Tile


class DeepSup(Decoder):
    """Mixin that adds an auxiliary C1 head on the feature map before the last to a decoder.

    Use it as the first base class: `class X(DeepSup, Y)`.

    Paper: Zhao et al. 2017, arXiv:1612.01105, sec. 3.3 (the auxiliary loss).

    Attributes:
        quarter_of: index of a feature map: the head's 3x3 convolution outputs a quarter of its
            channels. -1 as published; torchvision uses the map that the head reads, -2.
        dropout_kind, dropout_rate: class and probability of the dropout before the classifier.
    """

    min_feature_maps = 2
    auxiliary: ClassVar[tuple[Auxiliary, ...]] = (Auxiliary(),)
    quarter_of: ClassVar[int] = -1
    dropout_kind: ClassVar[type[nn.Module]] = nn.Identity
    dropout_rate: ClassVar[float] = 0.1

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        width = self.deepsup_width()
        self.cbr_deepsup = conv_bn_relu(channels[-2], width)
        self.dropout_deepsup = self.dropout_kind(self.dropout_rate)
        self.conv_last_deepsup = nn.Conv2d(width, num_class, 1)
        init_weights(self)

    def deepsup_width(self) -> int:
        """Channels between the head's two convolutions."""
        return max(self.channels[self.quarter_of] // 4, 1)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        # Only decoders with `pool_scales` accept a tile.
        arguments = (features,) if tile is None else (features, tile)
        heads = super().logits(*arguments)
        return (*heads, self.auxiliary_logits(features)) if self.training else heads

    def auxiliary_logits(self, features: list[Tensor]) -> Tensor:
        """Scores of the auxiliary head, (B, num_class, h, w), at the size of the map it reads."""
        x: Tensor = self.dropout_deepsup(self.cbr_deepsup(features[-2]))
        scores: Tensor = self.conv_last_deepsup(x)
        return scores
