"""Linear: a classifier of the concatenated feature maps, which tells what an encoder knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import resize


@DECODERS.register("linear")
class Linear(Decoder):
    """BatchNorm and a 1x1 convolution on all feature maps, joined at the finest.

    For features that are not trained: `TRAIN.freeze encoder`.

    Paper: Oquab et al. 2023, arXiv:2304.07193, sec. 7.4 (linear evaluation of DINOv2 on semantic
    segmentation; with the last four layers of a ViT its form "+ms", without several scales).
    """

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        joined = sum(channels)
        self.norm = BatchNorm2d(joined)
        self.conv_last = nn.Conv2d(joined, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        size = features[0].shape[2:]
        x = torch.cat([resize(x, size) for x in features], dim=1)
        return (self.conv_last(self.norm(x)),)
