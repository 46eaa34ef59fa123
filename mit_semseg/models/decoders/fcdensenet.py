"""FC-DenseNet's upsampling path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.upsampling import fit, full_convolution
from mit_semseg.models.encoders.fcdensenet import (
    DenseBlock,
    FCDenseNet56Encoder,
    FCDenseNet67Encoder,
    FCDenseNet103Encoder,
    FCDenseNetEncoder,
)


class FCDenseNet(Decoder):
    """Transitions up and dense blocks, with the encoder's maps as skip connections.

    A transition up reads only the outputs of the layers of the block before, not its input, which
    limits the number of channels. Scores have the resolution of the image.

    Paper: Jégou et al. 2017, arXiv:1611.09326, sec. 3.2, tables 1 and 2. BatchNorm has eps 1e-4, as
    in the encoder.

    Attributes:
        encoder: class of the encoder, whose depths and growth rate this decoder mirrors.

    Deviations:
        - The transposed convolution of a transition up is centred: it is padded and exactly doubles
          the sides. The authors' is unpadded, and the extra row and column are cropped at the end.
          So output pixels that two input pixels contribute to are the odd ones here and the even
          ones there, which mirrors the filters.
        - An upsampled map that is one pixel larger than its skip connection, which happens if sides
          are not multiples of 32, is resized, not cropped.
        - The transposed convolutions and the classifier are initialised with He's normal
          distribution, not with his uniform one.
    """

    min_feature_maps = 6
    encoder: ClassVar[type[FCDenseNetEncoder]]

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        *skips, added = channels
        *depths, _ = self.encoder.depths
        growth = self.encoder.growth
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for skip, depth in zip(reversed(skips), reversed(depths), strict=True):
            self.ups.append(full_convolution(added, added, 2, bias=True))
            self.blocks.append(DenseBlock(added + skip, depth, growth))
            whole, added = added + skip + depth * growth, depth * growth
        self.conv_last = nn.Conv2d(whole, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        *skips, added = features
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips), strict=True):
            x = torch.cat([skip, fit(up(added), skip)], dim=1)
            added = block(x)
        return (self.conv_last(torch.cat([x, added], dim=1)),)


@DECODERS.register("fcdensenet56")
class FCDenseNet56(FCDenseNet):
    """Decoder for the encoder of the same name."""

    supported_encoders = ("fcdensenet56",)
    encoder = FCDenseNet56Encoder


@DECODERS.register("fcdensenet67")
class FCDenseNet67(FCDenseNet):
    """Decoder for the encoder of the same name."""

    supported_encoders = ("fcdensenet67",)
    encoder = FCDenseNet67Encoder


@DECODERS.register("fcdensenet103")
class FCDenseNet103(FCDenseNet):
    """Decoder for the encoder of the same name."""

    supported_encoders = ("fcdensenet103",)
    encoder = FCDenseNet103Encoder
