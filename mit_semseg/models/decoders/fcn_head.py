"""FCN head: C1 with dropout before the classifier, as in torchvision's FCN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS
from mit_semseg.models.decoders.c1 import C1
from mit_semseg.models.decoders.deepsup import DeepSup


class FCNAuxiliary(DeepSup):
    """Mixin that adds an auxiliary FCN head on the feature map before the last to a decoder."""

    quarter_of = -2
    dropout_kind = nn.Dropout


@DECODERS.register("fcn_head")
class FCNHead(C1):
    """3x3 conv-BN-ReLU to a quarter of the channels, dropout, then 1x1 to the classes.

    The decoder of torchvision's `fcn_resnet50` and `fcn_resnet101`. It has no skip connections and
    no learned upsampling; a dilated encoder replaces them.

    Paper: Long et al. 2015, arXiv:1411.4038, sec. 3.
    """

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        self.dropout = nn.Dropout(0.1)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        return (self.conv_last(self.dropout(self.cbr(features[-1]))),)


@DECODERS.register("fcn_head_deepsup")
class FCNHeadDeepSup(FCNAuxiliary, FCNHead):
    """FCN head with an auxiliary head, as torchvision's weights have.

    Paper: Long et al. 2015, arXiv:1411.4038, sec. 3.
    """
