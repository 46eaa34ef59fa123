"""VGG16: five blocks of 3x3 convolutions, plain, with BatchNorm, and with pooling indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights

# Configuration D: width of each block, and its convolutions.
WIDTHS, DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)


class Features(nn.Sequential):
    """Convolutions and pools, counted through as torchvision does; gives what each pool does."""

    def __init__(self, normalized: bool, indices: bool) -> None:
        layers: list[nn.Module] = []
        n_in = 3
        for width, depth in zip(WIDTHS, DEPTHS, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(n_in, width, 3, padding=1))
                layers += [BatchNorm2d(width)] if normalized else []
                layers.append(nn.ReLU(inplace=True))
                n_in = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True, return_indices=indices))
        super().__init__(*layers)

    def forward(self, input: Tensor) -> list[Tensor | tuple[Tensor, Tensor]]:  # type: ignore[override]
        x, pooled = input, []
        for layer in self:
            y = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append(y)
            x = y[0] if isinstance(y, tuple) else y
        return pooled


class VGG(Encoder):
    """VGG16 (configuration D) without its classifier; maps are taken after each pooling.

    Paper: Simonyan and Zisserman 2015, arXiv:1409.1556, table 1. Names in the state dict are
    torchvision's.

    With TRAIN.activation_checkpointing all five blocks are computed again as one: it is the
    decoder's backward pass that has the memory to itself then.

    Deviations:
        - Pooling rounds sides up, not down, which only affects odd sides.
        - Weights are initialised as in He et al. 2015, arXiv:1502.01852; the paper trains a
          shallower network first.
    """

    channels: tuple[int, ...] = WIDTHS
    strides: tuple[int, ...] = (2, 4, 8, 16, 32)
    normalized: ClassVar[bool] = False
    indices: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.features = Features(self.normalized, self.indices)
        init_weights(self)

    def checkpoint_blocks(self) -> Sequence[nn.Module]:
        return [self.features]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return self.features(images)


@ENCODERS.register("vgg16")
class VGG16(VGG):
    """VGG16 as published."""


@ENCODERS.register("vgg16_bn")
class VGG16BN(VGG):
    """VGG16 with BatchNorm after each convolution.

    Paper: Simonyan and Zisserman 2015, arXiv:1409.1556, table 1; Ioffe and Szegedy 2015,
    arXiv:1502.03167, for the BatchNorm.
    """

    normalized = True


@ENCODERS.register("vgg16_bn_indices")
class VGG16BNIndices(VGG):
    """VGG16 with BatchNorm, whose pools remember where their maxima were.

    Paper: Badrinarayanan et al. 2017, arXiv:1511.00561, sec. 3.

    Feature maps: for each of the five pools, finest first, its indices (int64, in the flattened
    plane that was pooled, of the shape of what was pooled); then, last, what the fifth pool gives.
    An image with an odd side gets one more row or column of zeros, so that a decoder knows from
    the shape of the first indices how large the first plane was: twice as large. All other planes
    have the shape of the indices before.

    Deviations:
        - In evaluation BatchNorm uses its running statistics; the authors compute theirs in a pass
          over the training images after training.
    """

    channels = (*WIDTHS, WIDTHS[-1])
    strides = (2, 4, 8, 16, 32, 32)
    supported_decoders = ("segnet",)
    normalized = True
    indices = True

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        H, W = images.shape[-2:]
        pooled = self.features(F.pad(images, (0, W % 2, 0, H % 2)))
        return [indices for _, indices in pooled] + [pooled[-1][0]]
