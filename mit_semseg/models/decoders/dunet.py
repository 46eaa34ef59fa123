"""DUNet: features joined at the coarsest resolution, and upsampling that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu, resize

# The temperature is learned, and must not reach 0.
_COLDEST = 0.01


@DECODERS.register("dunet")
class DUNet(Decoder):
    """All maps at the size of the deepest one, then one linear map from a pixel to its block.

    The scores of a block of stride x stride pixels are a matrix W times the 64 features of the
    one pixel of the deepest map that stands for it, so scores have the size of the image, whatever
    the encoder's stride. They are divided by a temperature, which is learned.

    Paper: Tian et al. 2019, arXiv:1903.02120, sec. 3.1 (DUpsampling), 3.2 (the temperature) and 3.3
    (joining features at the coarsest resolution). Shallower maps are reduced to 48 channels, as in
    DeepLabv3+; dropout of 0.1.

    Without `strides` a block is of 8 x 8 pixels.

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
        # W is linear: divided are the few numbers that it is applied to, not the scores.
        blocks = self.conv_last(code / self.temperature.clamp(min=_COLDEST))
        return (pixel_shuffle(blocks, self.block),)
