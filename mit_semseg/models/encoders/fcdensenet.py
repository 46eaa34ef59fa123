"""FC-DenseNet's downsampling path of dense blocks."""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights

STEM, DROP = 48, 0.2


def layer(n_in: int, n_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        BatchNorm2d(n_in, eps=1e-4),
        nn.ReLU(inplace=True),
        nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2),
        nn.Dropout(DROP),
    )


class DenseBlock(nn.Module):
    """Layers that read the input and all layers before; returns the outputs of the layers only."""

    def __init__(self, n_in: int, depth: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(n_in + i * growth, growth, 3) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for step in self.layers:
            maps.append(step(torch.cat(maps, dim=1)))
        return torch.cat(maps[1:], dim=1)


def widths(depths: tuple[int, ...], growth: int) -> tuple[int, ...]:
    """Channels of the skip connections, and of the bottleneck's output."""
    *down, bottleneck = (depth * growth for depth in depths)
    return (*list(accumulate(down, initial=STEM))[1:], bottleneck)


class FCDenseNetEncoder(Encoder):
    """Five dense blocks, each followed by a transition down, and the bottleneck.

    Feature maps: the concatenated input and output of each block, which are the skip connections,
    and the output of the bottleneck.

    Paper: Jégou et al. 2017, arXiv:1611.09326, sec. 3, tables 1 and 2. BatchNorm has eps 1e-4, the
    default of Lasagne, which the authors used.

    Attributes:
        depths: number of layers of each block, the bottleneck last.
        growth: growth rate: channels added by each layer.

    Deviations:
        - In evaluation BatchNorm uses its running statistics; the authors' code normalises each
          batch by its own statistics in validation and test, too, so that a prediction depends on
          the other images of the batch.
        - Pooling rounds sides up, not down.
        - Weights are initialised with He's normal distribution by fan-out, not with his uniform
          one.
    """

    strides = (1, 2, 4, 8, 16, 32)
    depths: ClassVar[tuple[int, ...]]
    growth: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        *skips, _ = self.channels
        self.stem = nn.Conv2d(3, STEM, 3, padding=1)
        self.blocks = nn.ModuleList(
            DenseBlock(n_in, depth, self.growth)
            for n_in, depth in zip((STEM, *skips), self.depths, strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Sequential(*layer(n, n, 1), nn.MaxPool2d(2, ceil_mode=True)) for n in skips
        )
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        *blocks, bottleneck = self.blocks
        x, maps = self.stem(images), []
        for block, down in zip(blocks, self.downs, strict=True):
            maps.append(torch.cat([x, block(x)], dim=1))
            x = down(maps[-1])
        return [*maps, bottleneck(x)]


@ENCODERS.register("fcdensenet56")
class FCDenseNet56Encoder(FCDenseNetEncoder):
    """56 layers: 4 in each block."""

    depths, growth = (4,) * 6, 12
    channels = widths(depths, growth)


@ENCODERS.register("fcdensenet67")
class FCDenseNet67Encoder(FCDenseNetEncoder):
    """67 layers: 5 in each block."""

    depths, growth = (5,) * 6, 16
    channels = widths(depths, growth)


@ENCODERS.register("fcdensenet103")
class FCDenseNet103Encoder(FCDenseNetEncoder):
    """103 layers: 4, 5, 7, 10 and 12 in the blocks, 15 in the bottleneck."""

    depths, growth = (4, 5, 7, 10, 12, 15), 16
    channels = widths(depths, growth)
