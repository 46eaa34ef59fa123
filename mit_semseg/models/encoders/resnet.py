"""ResNets, plain and dilated to output stride 16 or 8, with a deep stem or with the paper's.

ResNet18, 50 and 101 have the stem of three 3x3 convolutions that their published weights were
trained with. Of ResNet34 and 152 only torchvision publishes weights, and they have its stem, the
paper's one 7x7 convolution; so have `torchvision_resnet18`, `_resnet50` and `_resnet101`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, dilate, init_weights


def conv3x3(n_in: int, n_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 1, stride, bias=False)


def shortcut(n_in: int, n_out: int, stride: int) -> nn.Sequential | None:
    """Projection of the input of a block onto its output, where their shapes differ."""
    if stride == 1 and n_in == n_out:
        return None
    return nn.Sequential(conv1x1(n_in, n_out, stride), BatchNorm2d(n_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion: ClassVar[int] = 1

    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
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
        return self.relu(x + residual)


class Bottleneck(nn.Module):
    """1x1 to the width, 3x3 (with the stride), 1x1 to `expansion` times the width."""

    expansion: ClassVar[int] = 4
    groups: ClassVar[int] = 1

    def __init__(self, n_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
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
        return self.relu(x + residual)


class ResNet(Encoder):
    """ResNet whose stem is three 3x3 convolutions; `strides` says how far it is dilated.

    Paper: He et al. 2016, arXiv:1512.03385, table 1; stem of Szegedy et al. 2016, arXiv:1512.00567;
    dilation of Yu et al. 2017, arXiv:1705.09914, sec. 2.

    Deviations:
        - The stride of a bottleneck is in its 3x3 convolution, not in the first 1x1, as in
          torchvision and the published MIT toolkit.
        - A 3x3 convolution that loses its stride is dilated by half of what those after it are (see
          `dilate`), as in the published MIT toolkit and the code of EncNet and DANet; that of
          PSPNet and OCNet dilates it in full.
        - Max pooling halves maps of even sides exactly; in the code of OCNet (`ceil_mode`) they get
          one more row and column.
    """

    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)
    block: ClassVar[type[BasicBlock] | type[Bottleneck]]
    depths: ClassVar[tuple[int, ...]]

    def __init__(self) -> None:
        super().__init__()
        inputs = (self._make_stem(), *self.channels[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._stage(n_in, n_out, depth, stride)
            for n_in, n_out, depth, stride in zip(
                inputs, self.channels, self.depths, (1, 2, 2, 2), strict=True
            )
        )
        dilate(self.layer3, 16 // self.strides[2])
        dilate(self.layer4, 32 // self.strides[3])
        init_weights(self)

    def _make_stem(self) -> int:
        """Adds the layers before the stages; returns the channels that they give."""
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

    def _stage(self, n_in: int, n_out: int, depth: int, stride: int) -> nn.Sequential:
        width = n_out // self.block.expansion
        first = self.block(n_in, width, stride)
        return nn.Sequential(first, *(self.block(n_out, width) for _ in range(depth - 1)))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x, maps = self._stem(images), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class PlainStemResNet(ResNet):
    """ResNet that begins with one 7x7 convolution, under torchvision's names.

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


@ENCODERS.register("resnet18")
class ResNet18(ResNet):
    """ResNet18 at output stride 32."""

    block, depths = BasicBlock, (2, 2, 2, 2)
    channels = (64, 128, 256, 512)


@ENCODERS.register("resnet18dilated", "resnet18_dilated8")
class ResNet18Dilated8(ResNet18):
    """ResNet18 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("resnet18_dilated16")
class ResNet18Dilated16(ResNet18):
    """ResNet18 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("resnet50")
class ResNet50(ResNet):
    """ResNet50 at output stride 32."""

    block, depths = Bottleneck, (3, 4, 6, 3)
    channels = (256, 512, 1024, 2048)


@ENCODERS.register("resnet50dilated", "resnet50_dilated8")
class ResNet50Dilated8(ResNet50):
    """ResNet50 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("resnet50_dilated16")
class ResNet50Dilated16(ResNet50):
    """ResNet50 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("resnet101")
class ResNet101(ResNet):
    """ResNet101 at output stride 32."""

    block, depths = Bottleneck, (3, 4, 23, 3)
    channels = (256, 512, 1024, 2048)


@ENCODERS.register("resnet101dilated", "resnet101_dilated8")
class ResNet101Dilated8(ResNet101):
    """ResNet101 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("resnet101_dilated16")
class ResNet101Dilated16(ResNet101):
    """ResNet101 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("resnet34")
class ResNet34(PlainStemResNet):
    """ResNet34 at output stride 32, with the stem of the paper."""

    block, depths = BasicBlock, (3, 4, 6, 3)
    channels = (64, 128, 256, 512)


@ENCODERS.register("resnet34dilated", "resnet34_dilated8")
class ResNet34Dilated8(ResNet34):
    """ResNet34 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("resnet34_dilated16")
class ResNet34Dilated16(ResNet34):
    """ResNet34 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("resnet152")
class ResNet152(PlainStemResNet):
    """ResNet152 at output stride 32, with the stem of the paper."""

    block, depths = Bottleneck, (3, 8, 36, 3)
    channels = (256, 512, 1024, 2048)


@ENCODERS.register("resnet152dilated", "resnet152_dilated8")
class ResNet152Dilated8(ResNet152):
    """ResNet152 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("resnet152_dilated16")
class ResNet152Dilated16(ResNet152):
    """ResNet152 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("torchvision_resnet18")
class TorchvisionResNet18(PlainStemResNet):
    """Torchvision's ResNet18 at output stride 32."""

    block, depths = BasicBlock, (2, 2, 2, 2)
    channels = (64, 128, 256, 512)


@ENCODERS.register("torchvision_resnet18dilated", "torchvision_resnet18_dilated8")
class TorchvisionResNet18Dilated8(TorchvisionResNet18):
    """Torchvision's ResNet18 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("torchvision_resnet18_dilated16")
class TorchvisionResNet18Dilated16(TorchvisionResNet18):
    """Torchvision's ResNet18 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("torchvision_resnet50")
class TorchvisionResNet50(PlainStemResNet):
    """Torchvision's ResNet50 at output stride 32."""

    block, depths = Bottleneck, (3, 4, 6, 3)
    channels = (256, 512, 1024, 2048)


@ENCODERS.register("torchvision_resnet50dilated", "torchvision_resnet50_dilated8")
class TorchvisionResNet50Dilated8(TorchvisionResNet50):
    """Torchvision's ResNet50 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("torchvision_resnet50_dilated16")
class TorchvisionResNet50Dilated16(TorchvisionResNet50):
    """Torchvision's ResNet50 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("torchvision_resnet101")
class TorchvisionResNet101(PlainStemResNet):
    """Torchvision's ResNet101 at output stride 32."""

    block, depths = Bottleneck, (3, 4, 23, 3)
    channels = (256, 512, 1024, 2048)


@ENCODERS.register("torchvision_resnet101dilated", "torchvision_resnet101_dilated8")
class TorchvisionResNet101Dilated8(TorchvisionResNet101):
    """Torchvision's ResNet101 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("torchvision_resnet101_dilated16")
class TorchvisionResNet101Dilated16(TorchvisionResNet101):
    """Torchvision's ResNet101 at output stride 16."""

    strides = (4, 8, 16, 16)
