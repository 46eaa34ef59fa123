"""ResNets at output stride 32, 16 or 8, with a deep stem or with the paper's stem.

ResNet18, 50 and 101 have a stem of three 3x3 convolutions, as their ImageNet weights of the MIT
toolkit do. ResNet34 and 152, whose weights are torchvision's, have the paper's 7x7 convolution, and
so do `torchvision_resnet18`, `_resnet50` and `_resnet101`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import (
    Encoder,
    collect_outputs,
    dilate,
    init_weights,
    register_strides,
)
from mit_semseg.models.layers import conv_bn


def conv3x3(n_in: int, n_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(n_in: int, n_out: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 1, bias=False)


def shortcut(n_in: int, n_out: int, stride: int) -> nn.Sequential | None:
    """Projection of a block's input to the shape of its output; None if they are equal."""
    if stride == 1 and n_in == n_out:
        return None
    return conv_bn(n_in, n_out, 1, stride)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; `last_relu` False omits the ReLU after the sum."""

    expansion: ClassVar[int] = 1

    def __init__(self, n_in: int, width: int, stride: int = 1, last_relu: bool = True) -> None:
        super().__init__()
        self.last_relu = last_relu
        self.conv1 = conv3x3(n_in, width, stride)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        n_out = width * self.expansion
        self.downsample: nn.Module | None = shortcut(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = x + residual
        return self.relu(x) if self.last_relu else x


class Bottleneck(nn.Module):
    """Residual block: 1x1 to `width`, 3x3 with the stride, 1x1 to `expansion * width` channels.

    `last_relu` False omits the ReLU after the sum.
    """

    expansion: ClassVar[int] = 4
    groups: ClassVar[int] = 1

    def __init__(self, n_in: int, width: int, stride: int = 1, last_relu: bool = True) -> None:
        super().__init__()
        self.last_relu = last_relu
        n_out = width * self.expansion
        self.conv1 = conv1x1(n_in, width)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, self.groups)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = conv1x1(width, n_out)
        self.bn3 = BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = shortcut(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = x + residual
        return self.relu(x) if self.last_relu else x


def stage(
    block: type[BasicBlock] | type[Bottleneck], n_in: int, n_out: int, depth: int, stride: int
) -> nn.Sequential:
    """A sequence of blocks, the first of which has the stride."""
    width = n_out // block.expansion
    first = block(n_in, width, stride)
    return nn.Sequential(first, *(block(n_out, width) for _ in range(depth - 1)))


class ResNet(Encoder):
    """ResNet with a stem of three 3x3 convolutions.

    Paper: He et al. 2016, arXiv:1512.03385, table 1; stem as in Szegedy et al. 2016,
    arXiv:1512.00567; dilation as in Yu et al. 2017, arXiv:1705.09914, sec. 2.

    Deviations:
        - The stride of a bottleneck is in its 3x3 convolution, not in the first 1x1 convolution, as
          in torchvision and the published MIT toolkit.
        - A 3x3 convolution whose stride is removed has half the dilation of those after it (see
          `dilate`), as in the published MIT toolkit and the code of EncNet and DANet; in that of
          PSPNet and OCNet it has the full dilation.
        - Max pooling halves maps with even sides exactly; in the code of OCNet (`ceil_mode`) they
          get one more row and column.
    """

    strides: tuple[int, ...] = (4, 8, 16, 32)
    output_strides = (32, 16, 8)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        channels: tuple[int, ...],
        output_stride: int = 32,
    ) -> None:
        """Initialise the encoder.

        Args:
            block: class of the residual blocks.
            depths: number of blocks of each of the four stages.
            channels: output channels of each stage.
            output_stride: stride of the deepest map, 32, 16 or 8.
        """
        super().__init__()
        self.channels, self.strides = channels, self.strides_at(output_stride)
        inputs = (self._make_stem(), *channels[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            stage(block, n_in, n_out, depth, stride)
            for n_in, n_out, depth, stride in zip(
                inputs, channels, depths, (1, 2, 2, 2), strict=True
            )
        )
        dilate(self.layer3, 16 // self.strides[2])
        dilate(self.layer4, 32 // self.strides[3])
        init_weights(self)

    def _make_stem(self) -> int:
        """Adds the layers before the stages; returns their output channels."""
        self.conv1 = conv3x3(3, 64, stride=2)
        self.bn1 = BatchNorm2d(64)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(64, 64)
        self.bn2 = BatchNorm2d(64)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = conv3x3(64, 128)
        self.bn3 = BatchNorm2d(128)
        self.relu3 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        return 128

    def _stem(self, images: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        return self.maxpool(x)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return collect_outputs(stages, self._stem(images), range(4))


class PlainStemResNet(ResNet):
    """ResNet with the paper's stem, one 7x7 convolution, and torchvision's state dict names.

    Paper: He et al. 2016, arXiv:1512.03385, table 1.
    """

    def _make_stem(self) -> int:
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        return 64

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))


# Table 1 of the paper.
THIN, WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
RESNET18: dict[str, Any] = {"block": BasicBlock, "depths": (2, 2, 2, 2), "channels": THIN}
RESNET34: dict[str, Any] = {"block": BasicBlock, "depths": (3, 4, 6, 3), "channels": THIN}
RESNET50: dict[str, Any] = {"block": Bottleneck, "depths": (3, 4, 6, 3), "channels": WIDE}
RESNET101: dict[str, Any] = {"block": Bottleneck, "depths": (3, 4, 23, 3), "channels": WIDE}
RESNET152: dict[str, Any] = {"block": Bottleneck, "depths": (3, 8, 36, 3), "channels": WIDE}

register_strides("resnet18", ResNet, **RESNET18)
register_strides("resnet50", ResNet, **RESNET50)
register_strides("resnet101", ResNet, **RESNET101)
register_strides("resnet34", PlainStemResNet, **RESNET34)
register_strides("resnet152", PlainStemResNet, **RESNET152)
register_strides("torchvision_resnet18", PlainStemResNet, **RESNET18)
register_strides("torchvision_resnet50", PlainStemResNet, **RESNET50)
register_strides("torchvision_resnet101", PlainStemResNet, **RESNET101)
