"""ResNeXt50 and 101 (32 groups): plain, and dilated to output stride 16 or 8."""

from __future__ import annotations

from mit_semseg.models.encoders.base import ENCODERS
from mit_semseg.models.encoders.resnet import Bottleneck, PlainStemResNet, ResNet


class GroupedBottleneck(Bottleneck):
    """Bottleneck whose 3x3 convolution is twice as wide and works in 32 groups."""

    expansion = 2
    groups = 32


@ENCODERS.register("resnext101")
class ResNeXt101(ResNet):
    """ResNeXt101 32x4d at output stride 32.

    Paper: Xie et al. 2017, arXiv:1611.05431, table 1; with the deep stem of `ResNet`.

    Deviations:
        - Without ImageNet weights grouped convolutions begin with torchvision's standard deviation,
          which counts all output channels; the published MIT toolkit counts those of one group, so
          that its weights begin larger by the root of 32.
    """

    block, depths = GroupedBottleneck, (3, 4, 23, 3)
    channels = (256, 512, 1024, 2048)


@ENCODERS.register("resnext101dilated", "resnext101_dilated8")
class ResNeXt101Dilated8(ResNeXt101):
    """ResNeXt101 at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("resnext101_dilated16")
class ResNeXt101Dilated16(ResNeXt101):
    """ResNeXt101 at output stride 16."""

    strides = (4, 8, 16, 16)


@ENCODERS.register("resnext50")
class ResNeXt50(PlainStemResNet):
    """ResNeXt50 32x4d at output stride 32.

    Paper: Xie et al. 2017, arXiv:1611.05431, table 1; the stem, too, is the paper's, since only
    torchvision publishes weights of it.
    """

    block, depths = GroupedBottleneck, (3, 4, 6, 3)
    channels = (256, 512, 1024, 2048)


@ENCODERS.register("resnext50dilated", "resnext50_dilated8")
class ResNeXt50Dilated8(ResNeXt50):
    """ResNeXt50 32x4d at output stride 8."""

    strides = (4, 8, 8, 8)


@ENCODERS.register("resnext50_dilated16")
class ResNeXt50Dilated16(ResNeXt50):
    """ResNeXt50 32x4d at output stride 16."""

    strides = (4, 8, 16, 16)
