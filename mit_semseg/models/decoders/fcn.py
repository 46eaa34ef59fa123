"""FCN-32s, 16s and 8s: a convolutional VGG classifier with skip connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.upsampling import factors, fit


def bilinear_upsampling(channels: int, factor: int) -> nn.Module:
    """Transposed convolution, initialised as bilinear interpolation of each channel."""
    if factor == 1:
        return nn.Identity()
    up = nn.ConvTranspose2d(channels, channels, 2 * factor, factor, padding=factor // 2, bias=False)
    side = (torch.arange(2 * factor) - factor + 0.5).abs()
    ramp = 1 - side / factor
    with torch.no_grad():
        up.weight.zero_()
        for c in range(channels):
            up.weight[c, c] = ramp[:, None] * ramp
    return up


class FCN(Decoder):
    """VGG's first two fully connected layers as convolutions, and scores of several maps.

    With `vgg16` these are pool5, pool4 and pool3, as published; any encoder works. Scores have the
    resolution of the finest map used. From there they are resized bilinearly like those of every
    decoder; the paper's last layer is fixed to bilinear interpolation.

    With `MODEL.weights_decoder torchvision:vgg16`, fc6 and fc7 are initialised with VGG16's
    weights, otherwise at random. Between maps of equal stride there is no upsampling.

    Paper: Long et al. 2015, arXiv:1411.4038, sec. 4; Shelhamer et al. 2016, arXiv:1605.06211,
    sec. 4.

    Raises:
        ValueError: a stride of the encoder is not a multiple of the one before.

    Deviations:
        - fc6 pads its input by 3 pixels; the paper pads the image by 100 and crops the scores.
        - All streams are trained together, not one after the other, and are not scaled by
          constants, which suit the input range of the published VGG16.
        - Transposed convolutions are initialised as bilinear interpolation and learned, as the
          paper states; in the authors' code they are fixed.
        - Score layers are initialised as in He et al. 2015, arXiv:1502.01852, not with zeros.
    """

    width: ClassVar[int] = 4096

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        finer = tuple(channels)[-self.min_feature_maps : -1]
        self.fc6 = nn.Conv2d(channels[-1], self.width, 7, padding=3)
        self.fc7 = nn.Conv2d(self.width, self.width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.conv_last = nn.Conv2d(self.width, num_class, 1)
        self.scores = nn.ModuleList(nn.Conv2d(n_in, num_class, 1) for n_in in reversed(finer))
        init_weights(self)
        # After `init_weights`, which would overwrite the bilinear weights.
        self.ups = nn.ModuleList(
            bilinear_upsampling(num_class, factor)
            for factor in reversed(factors(self.strides, self.min_feature_maps))
        )

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        *finer, x = features[-self.min_feature_maps :]
        for layer in (self.fc6, self.fc7):
            x = self.dropout(self.relu(layer(x)))
        x = self.conv_last(x)
        for up, score, feature in zip(self.ups, self.scores, reversed(finer), strict=True):
            y = score(feature)
            x = y + fit(up(x), y)
        return (x,)


@DECODERS.register("fcn32s")
class FCN32s(FCN):
    """Scores of the deepest map."""


@DECODERS.register("fcn16s")
class FCN16s(FCN):
    """The sum of the scores of the two deepest maps."""

    min_feature_maps = 2


@DECODERS.register("fcn8s")
class FCN8s(FCN):
    """The sum of the scores of the three deepest maps."""

    min_feature_maps = 3
