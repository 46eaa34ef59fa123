"""DDRNet's encoder: a branch at stride 8 and a deep branch, with two bilateral fusions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, Variant, init_weights
from mit_semseg.models.encoders.resnet import BasicBlock
from mit_semseg.models.encoders.resnet import Bottleneck as WideBottleneck
from mit_semseg.models.layers import PooledBatchNorm2d, conv_bn, resize


class Bottleneck(WideBottleneck):
    """1x1, 3x3, 1x1 to twice the width, without a ReLU after the sum."""

    expansion = 2

    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__(n_in, width, stride, last_relu=False)


def basic_blocks(n_in: int, n_out: int, depth: int, stride: int = 1) -> nn.Sequential:
    """Basic blocks; the first has the stride, and the last has no ReLU after its sum."""
    first = BasicBlock(n_in, n_out, stride)
    rest = (BasicBlock(n_out, n_out, last_relu=i < depth - 1) for i in range(1, depth))
    return nn.Sequential(first, *rest)


def quarter_stem(width: int) -> nn.Sequential:
    """Two strided 3x3 convolutions with biases, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for n_in in (3, width):
        conv = nn.Conv2d(n_in, width, 3, stride=2, padding=1)
        layers += [conv, BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def bn_relu_conv(n_in: int, n_out: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return [PooledBatchNorm2d(n_in), nn.ReLU(inplace=True), conv]


class PyramidPooling(nn.Module):
    """Base class of DAPPM and of PIDNet's PAPPM: five scales of a map, and a projection.

    `scale0` reads the map; the others read average pools of 5x5, 9x9 and 17x17 pixels with strides
    2, 4 and 8, including zero padding, and the mean of the whole map.
    """

    def __init__(self, n_in: int, width: int, n_out: int) -> None:
        super().__init__()
        self.scale0 = nn.Sequential(*bn_relu_conv(n_in, width))
        self.scale1, self.scale2, self.scale3 = (
            nn.Sequential(nn.AvgPool2d(2 * s + 1, s, s), *bn_relu_conv(n_in, width))
            for s in (2, 4, 8)
        )
        self.scale4 = nn.Sequential(nn.AdaptiveAvgPool2d(1), *bn_relu_conv(n_in, width))
        self.compression = nn.Sequential(*bn_relu_conv(5 * width, n_out))
        self.shortcut = nn.Sequential(*bn_relu_conv(n_in, n_out))

    def scales(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> five maps (B, width, H, W), from fine to coarse."""
        pools = (self.scale1, self.scale2, self.scale3, self.scale4)
        return [self.scale0(x), *(resize(pool(x), x.shape[2:]) for pool in pools)]


class DAPPM(PyramidPooling):
    """Deep aggregation pyramid pooling: each scale is added to the result of the finer one.

    Paper: Hong et al. 2021, arXiv:2101.06085, sec. III-C and fig. 5.
    """

    def __init__(self, n_in: int, width: int, n_out: int) -> None:
        super().__init__(n_in, width, n_out)
        self.process1, self.process2, self.process3, self.process4 = (
            nn.Sequential(*bn_relu_conv(width, width, 3)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.scales(x)
        maps = [first]
        processes = (self.process1, self.process2, self.process3, self.process4)
        for process, scale in zip(processes, others, strict=True):
            maps.append(process(scale + maps[-1]))
        y: Tensor = self.compression(torch.cat(maps, dim=1))
        return y + self.shortcut(x)


class DDRNet(Encoder):
    """Two feature maps of stride 8: the fine branch after the first fusion, and the final sum.

    It is the network without its two heads, which are the decoder of the same name. State dict
    names are those of the authors' code, whose files can be loaded into both. The first map is for
    the auxiliary head. If an image is computed in tiles (`models.tiles`), the pyramid averages over
    each tile.

    Paper: Hong et al. 2021, arXiv:2101.06085, sec. III; channels as in table 1.
    """

    strides = (8, 8)
    supported_decoders = ("ddrnet_23_slim", "ddrnet_23")  # others would not use the first map

    def __init__(self, channels: tuple[int, int], depth: int = 2, pool_width: int = 128) -> None:
        super().__init__()
        self.channels = channels
        fine = channels[0]
        width = fine // 2
        self.conv1 = quarter_stem(width)
        self.layer1 = basic_blocks(width, width, depth)
        self.layer2 = basic_blocks(width, 2 * width, depth, stride=2)
        self.layer3 = basic_blocks(2 * width, 4 * width, depth, stride=2)
        self.layer4 = basic_blocks(4 * width, 8 * width, depth, stride=2)
        self.layer5 = nn.Sequential(Bottleneck(8 * width, 8 * width, stride=2))
        self.layer3_ = basic_blocks(fine, fine, 2)
        self.layer4_ = basic_blocks(fine, fine, 2)
        self.layer5_ = nn.Sequential(Bottleneck(fine, fine))
        self.compression3 = conv_bn(4 * width, fine, 1)
        self.compression4 = conv_bn(8 * width, fine, 1)
        self.down3 = conv_bn(fine, 4 * width, stride=2)
        self.down4 = nn.Sequential(
            *conv_bn(fine, 4 * width, stride=2),
            nn.ReLU(inplace=True),
            *conv_bn(4 * width, 8 * width, stride=2),
        )
        self.spp = DAPPM(16 * width, pool_width, channels[1])
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x = self.layer2(self.layer1(self.conv1(images)).relu()).relu()
        size = x.shape[2:]
        deep, fine = self.layer3(x), self.layer3_(x)
        first = fine + resize(self.compression3(deep.relu()), size)
        deep = (deep + self.down3(fine.relu())).relu()
        deep, fine = self.layer4(deep), self.layer4_(first.relu())
        second = fine + resize(self.compression4(deep.relu()), size)
        deep = (deep + self.down4(fine.relu())).relu()
        context = self.spp(self.layer5(deep))
        return [first, resize(context, size) + self.layer5_(second.relu())]


ENCODERS.register("ddrnet_23_slim")(Variant(DDRNet, channels=(64, 128)))
ENCODERS.register("ddrnet_23")(Variant(DDRNet, channels=(128, 256)))
