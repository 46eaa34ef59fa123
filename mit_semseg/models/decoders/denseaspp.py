"""DenseASPP: densely connected dilated convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu

DILATIONS = (3, 6, 12, 18, 24)


def atrous_layer(n_in: int, width: int, n_out: int, dilation: int) -> nn.Sequential:
    """BN-ReLU-1x1 to `width` channels, BN-ReLU-dilated 3x3 to `n_out`, dropout."""
    return nn.Sequential(
        BatchNorm2d(n_in),
        nn.ReLU(inplace=True),
        nn.Conv2d(n_in, width, 1, bias=False),
        BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, n_out, 3, padding=dilation, dilation=dilation),
        nn.Dropout2d(0.1),
    )


@DECODERS.register("denseaspp")
class DenseASPP(Decoder):
    """Five dilated 3x3 convolutions, densely connected, and a classifier on all their outputs.

    A 1x1 convolution halves the channels of the deepest map to c. Every layer reduces its input to
    c/2 channels and adds c/8. For DenseNet121, c, c/2 and c/8 are 512, 256 and 64.

    Paper: Yang et al. 2018, "DenseASPP for Semantic Segmentation in Street Scenes", CVPR, sec. 3.2
    and 3.4.

    Deviations:
        - Widths follow the paper's rule for every encoder; the authors' code has 128 and 64 for
          DenseNet121, 512 and 128 for 161, 336 and 168 for 169, 480 and 240 for 201.
        - The channels are halved here, with a BatchNorm and ReLU after the convolution as for any
          encoder, rather than in the encoder.
        - The first layer starts with BatchNorm and ReLU like the others; theirs starts with ReLU.
        - The 1x1 convolutions, which a BatchNorm follows, have no bias; theirs have.
        - BatchNorm's momentum is 0.1; theirs is 0.0003.
        - Dilations are the paper's, for output stride 8, at every stride; the authors' code
          upsamples maps of stride 16 first.
        - Scores are resized with `align_corners=False`; theirs with True.
    """

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        halved = max(channels[-1] // 2, 1)
        width, growth = max(halved // 2, 1), max(halved // 8, 1)
        self.reduce = conv_bn_relu(channels[-1], halved, 1)
        self.layers = nn.ModuleList(
            atrous_layer(halved + i * growth, width, growth, dilation)
            for i, dilation in enumerate(DILATIONS)
        )
        self.dropout = nn.Dropout2d(0.1)
        self.conv_last = nn.Conv2d(halved + len(DILATIONS) * growth, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        x = self.reduce(features[-1])
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return (self.conv_last(self.dropout(x)),)
