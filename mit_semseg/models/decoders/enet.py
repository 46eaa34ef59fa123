"""ENet's decoder: unpooling with the encoder's indices, and bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.upsampling import full_convolution, unpool
from mit_semseg.models.encoders.enet import Bottleneck, batch_norm, extension

DROP = 0.1


class Upsampling(nn.Module):
    """A bottleneck that doubles the sides; the main branch is a 1x1 convolution, unpooled."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        width = n_out // 4
        self.main = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), batch_norm(n_out))
        project = nn.Conv2d(n_in, width, 1, bias=False)
        double = full_convolution(width, width, 2)
        self.extension = extension([project, double], n_out, DROP)
        self.prelu = nn.PReLU(n_out)

    def forward(self, x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
        H, W = size
        # If a side of the target is odd, the last row or column of the doubled map is cropped.
        return self.prelu(unpool(self.main(x), indices, size) + self.extension(x)[..., :H, :W])


@DECODERS.register("enet")
class ENet(Decoder):
    """Stages 4 and 5 and the full convolution, at the resolution of the image.

    Reads the feature maps of the encoder `enet`, which include pooling indices. If the sides of an
    image are not multiples of 4, scores exceed it by up to 3 pixels, which `SegmentationModule`
    crops.

    Paper: Paszke et al. 2016, arXiv:1606.02147, sec. 3, table 1. Encoder and decoder have 0.36
    million parameters for 11 classes; in the paper 0.37. BatchNorm has eps 1e-3, as in the authors'
    code.

    Deviations:
        - Blocks have PReLUs and end in dropout of 0.1, as the paper states for all blocks; those of
          the authors' decoder have ReLUs and no dropout.
        - Convolutions before a BatchNorm have no bias, which BatchNorm would cancel; in the
          authors' code 3x3 convolutions have one.
    """

    min_feature_maps = 3
    supported_encoders = ("enet",)

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        fine, coarse, deepest = tuple(channels)[-3:]
        self.up4 = Upsampling(deepest, coarse)
        self.stage4 = nn.Sequential(Bottleneck(coarse, DROP), Bottleneck(coarse, DROP))
        self.up5 = Upsampling(coarse, fine)
        self.stage5 = nn.Sequential(Bottleneck(fine, DROP))
        self.conv_last = nn.ConvTranspose2d(fine, num_class, 2, 2)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        first, second, x = features
        h, w = first.shape[-2:]
        x = self.stage4(self.up4(x, second, (h, w)))
        x = self.stage5(self.up5(x, first, (2 * h, 2 * w)))
        return (self.conv_last(x),)
