"""BiSeNetV2's branches: wide and shallow for detail, narrow and deep for semantics."""

from __future__ import annotations

from torch import Tensor, cat, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights
from mit_semseg.models.layers import PooledBatchNorm2d, conv_bn, conv_bn_relu


def depthwise(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 depthwise convolution, with one or several filters for each channel, and BatchNorm."""
    conv = DepthwiseConv2d(n_in, n_out, 3, stride, padding=1, groups=n_in, bias=False)
    return nn.Sequential(conv, BatchNorm2d(n_out))


class Stem(nn.Module):
    """To a quarter of the sides: by strided convolutions, and by pooling; then both joined.

    Paper: Yu et al. 2021, arXiv:2004.02147, sec. 4.2, fig. 4 (a).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(3, width, stride=2)
        self.left = nn.Sequential(
            conv_bn_relu(width, width // 2, 1), conv_bn_relu(width // 2, width, stride=2)
        )
        self.right = nn.MaxPool2d(3, stride=2, padding=1)
        self.fuse = conv_bn_relu(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = self.fuse(cat([self.left(x), self.right(x)], 1))
        return y


class GatherExpansion(nn.Module):
    """A 3x3 convolution, depthwise ones on six times the channels, and a projection, added to x.

    Paper: Yu et al. 2021, arXiv:2004.02147, sec. 4.2, fig. 5 (b) and (c).
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1, expansion: int = 6) -> None:
        super().__init__()
        wide = expansion * n_in
        expand, shortcut = [depthwise(n_in, wide, stride)], []
        if stride > 1:
            expand.append(depthwise(wide, wide))
            shortcut = [depthwise(n_in, n_in, stride), conv_bn(n_in, n_out, 1)]
        self.main = nn.Sequential(
            conv_bn_relu(n_in, n_in), *expand, nn.ReLU(inplace=True), conv_bn(wide, n_out, 1)
        )
        self.shortcut = nn.Sequential(*shortcut)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.main(x) + self.shortcut(x))
        return y


class ContextEmbedding(nn.Module):
    """The mean of a map, projected, is added to it; then a 3x3 convolution.

    Paper: Yu et al. 2021, arXiv:2004.02147, sec. 4.2, fig. 4 (b).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            PooledBatchNorm2d(width),
            nn.Conv2d(width, width, 1, bias=False),
            PooledBatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.conv = conv_bn_relu(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x + self.mean(x))
        return y


@ENCODERS.register("bisenetv2")
class BiSeNetV2(Encoder):
    """The detail branch, the stages of the semantic branch for auxiliary heads, and its end.

    Paper: Yu et al. 2021, arXiv:2004.02147, sec. 4.1, 4.2 and table 1.

    A tile of an image (see `models.tiles`) has its own mean in the context embedding.
    """

    channels = (128, 16, 32, 64, 128, 128)
    strides = (8, 4, 8, 16, 32, 32)
    supported_decoders = ("bisenetv2",)  # others leave the detail branch untrained

    def __init__(self) -> None:
        super().__init__()
        self.detail = nn.Sequential(
            *(conv_bn_relu(3, 64, stride=2), conv_bn_relu(64, 64)),
            *(conv_bn_relu(64, 64, stride=2), conv_bn_relu(64, 64), conv_bn_relu(64, 64)),
            *(conv_bn_relu(64, 128, stride=2), conv_bn_relu(128, 128), conv_bn_relu(128, 128)),
        )
        self.stem = Stem(16)
        self.stage3 = nn.Sequential(GatherExpansion(16, 32, 2), GatherExpansion(32, 32))
        self.stage4 = nn.Sequential(GatherExpansion(32, 64, 2), GatherExpansion(64, 64))
        rest = (GatherExpansion(128, 128) for _ in range(3))
        self.stage5 = nn.Sequential(GatherExpansion(64, 128, 2), *rest)
        self.context = ContextEmbedding(128)
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        stem = self.stem(images)
        third = self.stage3(stem)
        fourth = self.stage4(third)
        fifth = self.stage5(fourth)
        return [self.detail(images), stem, third, fourth, fifth, self.context(fifth)]
