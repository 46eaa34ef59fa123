"""ResNeXt50 and 101 (32x4d) at output stride 32, 16 or 8."""

from __future__ import annotations

from mit_semseg.models.encoders.base import register_strides
from mit_semseg.models.encoders.resnet import WIDE, Bottleneck, PlainStemResNet, ResNet


class GroupedBottleneck(Bottleneck):
    """Bottleneck whose 3x3 convolution is twice as wide and has 32 groups."""

    expansion = 2
    groups = 32


class ResNeXt101(ResNet):
    """ResNeXt101 32x4d.

    Paper: Xie et al. 2017, arXiv:1611.05431, table 1; with the deep stem of `ResNet`.

    Deviations:
        - Without ImageNet weights, grouped convolutions are initialised with torchvision's standard
          deviation, which counts all output channels; the published MIT toolkit counts those of one
          group, so its initial weights are larger by the square root of 32.
    """

    channels = WIDE

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__(GroupedBottleneck, (3, 4, 23, 3), WIDE, output_stride)


class ResNeXt50(PlainStemResNet):
    """ResNeXt50 32x4d.

    Paper: Xie et al. 2017, arXiv:1611.05431, table 1; also with the paper's stem, as its ImageNet
    weights are torchvision's.
    """

    channels = WIDE

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__(GroupedBottleneck, (3, 4, 6, 3), WIDE, output_stride)


register_strides("resnext101", ResNeXt101)
register_strides("resnext50", ResNeXt50)
