"""VGG16: plain, with BatchNorm, and with pooling indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights

# Configuration D: channels and number of convolutions of each block.
WIDTHS, DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)


class Features(nn.Sequential):
    """Convolutions and pools, numbered as in torchvision; returns the output of each pool."""

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
    """VGG16 (configuration D) without its classifier; feature maps are the outputs of the pools.

    Paper: Simonyan and Zisserman 2015, arXiv:1409.1556, table 1. State dict names are those of
    torchvision.

    With TRAIN.activation_checkpointing all five blocks are recomputed together, so that none of
    their activations are stored during the decoder's backward pass.

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
    """VGG16 with BatchNorm that also returns its pooling indices.

    Paper: Badrinarayanan et al. 2017, arXiv:1511.00561, sec. 3.

    Feature maps: the indices of each of the five pools, finest first (int64, into the flattened
    input plane of the pool, with the shape of its output), and the output of the fifth pool. The
    image is padded with zeros to even sides, so that the sizes of these planes are known: twice
    the first indices, and for the others the shape of the indices before.

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
