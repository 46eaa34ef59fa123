"""Published `models.resnext`: ResNeXt101 for image classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mit_semseg.compat.resnet import BatchNorm2d, ResNet, conv3x3, load_url
from mit_semseg.compat.urls import initialized
from mit_semseg.models.encoders import resnet
from mit_semseg.weights import imagenet_weights

__all__ = [
    "BatchNorm2d",
    "GroupBottleneck",
    "ResNeXt",
    "conv3x3",
    "load_url",
    "model_urls",
    "resnext101",
]

model_urls = {"resnext101": imagenet_weights("resnext101").urls[0]}


class GroupBottleneck(resnet.Bottleneck):
    """1x1, grouped 3x3, and 1x1 to twice `planes`; `downsample` as in `resnet.BasicBlock`."""

    expansion = 2

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        groups: int = 1,
        downsample: nn.Module | None = None,
    ) -> None:
        super().__init__(inplanes, planes, stride)
        self.conv2 = resnet.conv3x3(planes, planes, stride, groups)
        self.downsample, self.stride = downsample, stride


class ResNeXt(ResNet):
    """A ResNeXt for image classification, with a stem of three 3x3 convolutions.

    Paper: Xie et al. 2017, arXiv:1611.05431, table 1.

    Args:
        block: `block(inplanes, planes, stride, groups=..., downsample=...)` with an attribute
            `expansion`.
        layers: number of blocks of each of the four stages.
        groups: groups of the 3x3 convolutions.
        num_classes: number of classes.
    """

    planes = (128, 256, 512, 1024)

    def __init__(
        self, block: Any, layers: Sequence[int], groups: int = 32, num_classes: int = 1000
    ) -> None:
        super().__init__(block, layers, num_classes, groups=groups)


def resnext101(pretrained: bool = False, **kwargs: Any) -> ResNeXt:
    """ResNeXt101 32x4d; `pretrained` loads the published ImageNet weights, downloaded once."""
    return initialized(ResNeXt(GroupBottleneck, [3, 4, 23, 3], **kwargs), "resnext101", pretrained)
