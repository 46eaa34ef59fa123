"""STDC: blocks whose convolutions get fewer channels step by step, and are all concatenated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.encoders.base import (
    ENCODERS,
    Encoder,
    Variant,
    collect_outputs,
    init_weights,
)
from mit_semseg.models.layers import conv_bn_relu


class ShortTermDenseConcatenate(nn.Module):
    """A 1x1 convolution and three 3x3 ones with 1/2, 1/4, 1/8 and 1/8 of the output channels.

    A stride is that of a depthwise convolution before the second one, and of an average pool of
    what the first one contributes.

    Paper: Fan et al. 2021, arXiv:2104.13188, sec. 3.1, fig. 3.
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        half, quarter, eighth = n_out // 2, n_out // 4, n_out // 8
        self.first = conv_bn_relu(n_in, half, 1)
        self.down: nn.Module = nn.Identity()
        self.pool: nn.Module = nn.Identity()
        if stride > 1:
            conv = DepthwiseConv2d(half, half, 3, stride, padding=1, groups=half, bias=False)
            self.down = nn.Sequential(conv, BatchNorm2d(half))
            self.pool = nn.AvgPool2d(3, stride, padding=1)
        self.rest = nn.ModuleList(
            conv_bn_relu(*widths)
            for widths in ((half, quarter), (quarter, eighth), (eighth, eighth))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        maps, x = [self.pool(x)], self.down(x)
        for conv in self.rest:
            x = conv(x)
            maps.append(x)
        return torch.cat(maps, dim=1)


class STDC(Encoder):
    """Two strided convolutions, then three stages; maps of stride 8, 16 and 32.

    Paper: Fan et al. 2021, arXiv:2104.13188, sec. 3.1, table 2.
    """

    channels = (256, 512, 1024)
    strides = (8, 16, 32)

    def __init__(self, depths: tuple[int, int, int]) -> None:
        """Build it.

        Args:
            depths: blocks of each stage.
        """
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 32, stride=2), conv_bn_relu(32, 64, stride=2))
        self.stages = nn.ModuleList()
        for n_in, n_out, depth in zip((64, *self.channels), self.channels, depths):
            rest = (ShortTermDenseConcatenate(n_out, n_out) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(ShortTermDenseConcatenate(n_in, n_out, 2), *rest))
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return collect_outputs(self.stages, self.stem(images), range(3))


ENCODERS.register("stdc1")(Variant(STDC, depths=(2, 2, 2)))
ENCODERS.register("stdc2")(Variant(STDC, depths=(4, 5, 3)))
