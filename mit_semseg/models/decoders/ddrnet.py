"""DDRNet's heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights


class PreActivationHead(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, BatchNorm, ReLU, 1x1 classifier.

    Paper: Hong et al. 2021, arXiv:2101.06085, sec. III-D (the segmentation head).
    """

    def __init__(self, n_in: int, width: int, n_out: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, n_out, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.relu(self.bn1(x)))
        scores: Tensor = self.conv2(self.relu(self.bn2(x)))
        return scores


@DECODERS.register("ddrnet_23_slim", "ddrnet_23")
class DDRNet(Decoder):
    """A head on the sum of both branches, and an auxiliary one on the fine branch, at stride 8.

    The auxiliary loss has weight 0.4, as published. State dict names are those of the authors'
    code.

    Paper: Hong et al. 2021, arXiv:2101.06085, sec. III-D.
    """

    min_feature_maps = 2
    supported_encoders = ("ddrnet_23_slim", "ddrnet_23")
    auxiliary = (Auxiliary(weight=0.4),)

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        fine, both = channels[-2:]
        self.seghead_extra = PreActivationHead(fine, fine, num_class)
        self.final_layer = PreActivationHead(both, fine, num_class)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        fine, both = features[-2:]
        main = self.final_layer(both)
        return (main, self.seghead_extra(fine)) if self.training else (main,)
