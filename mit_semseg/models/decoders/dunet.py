"""DUNet: features fused at the coarsest resolution, and learned upsampling (DUpsampling)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu, resize

# The learned temperature is clamped, as it must not reach 0.
_MIN_TEMPERATURE = 0.01


@DECODERS.register("dunet")
class DUNet(Decoder):
    """Fuses all maps at the size of the deepest one, then maps each pixel to a block of scores.

    The scores of a block of stride x stride pixels are a matrix W times the 64 features of one
    pixel, so scores have the size of the image at any stride of the encoder. They are divided by a
    learned temperature. If `strides` is not given, blocks have 8 x 8 pixels.

    Paper: Tian et al. 2019, arXiv:1903.02120, sec. 3.1 (DUpsampling), 3.2 (temperature) and 3.3
    (fusion at the coarsest resolution). Shallower maps are reduced to 48 channels, as in
    DeepLabv3+; dropout of 0.1.

    Deviations:
        - W is the weight of a 1x1 convolution with He initialisation, learned with the network; the
          paper initialises it with the W that best reconstructs blocks of the training labels from
          64 numbers, but a decoder is built without seeing labels. The matrix P, which only
          compresses labels, is not needed then.
        - There is no atrous spatial pyramid before it.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_class: int = 150,
        strides: Sequence[int] | None = None,
        width: int = 256,
        code: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(channels, num_class, strides, **options)
        *shallower, deepest = channels
        self.block = strides[-1] if strides else 8
        self.reduce = nn.ModuleList(conv_bn_relu(n_in, 48, 1) for n_in in shallower)
        self.fuse = nn.Sequential(
            conv_bn_relu(deepest + 48 * len(shallower), width),
            conv_bn_relu(width, width),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, code, 1),
        )
        self.conv_last = nn.Conv2d(code, num_class * self.block**2, 1, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        *shallower, deepest = features
        size = deepest.shape[2:]
        joined = [layer(resize(x, size)) for layer, x in zip(self.reduce, shallower)]
        code = self.fuse(torch.cat([deepest, *joined], dim=1))
        # W is linear, so the temperature divides its small input, not the scores.
        blocks = self.conv_last(code / self.temperature.clamp(min=_MIN_TEMPERATURE))
        return (pixel_shuffle(blocks, self.block),)
