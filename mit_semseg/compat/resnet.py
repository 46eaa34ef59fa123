"""Published `models.resnet`: ResNets for image classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mit_semseg.compat.urls import initialized, load_url
from mit_semseg.lib.nn import SynchronizedBatchNorm2d
from mit_semseg.models.encoders import resnet
from mit_semseg.models.encoders.base import init_weights
from mit_semseg.weights import imagenet_weights

__all__ = [
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "ResNet",
    "conv3x3",
    "load_url",
    "model_urls",
    "resnet18",
    "resnet50",
    "resnet101",
]

BatchNorm2d = SynchronizedBatchNorm2d
# The layers of a ResNet before its classifier, in order.
FEATURES = (
    *(f"{kind}{k}" for k in (1, 2, 3) for kind in ("conv", "bn", "relu")),
    *("maxpool", "layer1", "layer2", "layer3", "layer4"),
)
model_urls = {
    name: imagenet_weights(name).urls[0] for name in ("resnet18", "resnet50", "resnet101")
}


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A padded 3x3 convolution without a bias."""
    return resnet.conv3x3(in_planes, out_planes, stride)


class _Block(nn.Module):
    """Mixin with the published constructor."""

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__(inplanes, planes, stride)
        self.downsample, self.stride = downsample, stride


class BasicBlock(_Block, resnet.BasicBlock):
    """Two 3x3 convolutions; `downsample` projects the input if its shape differs."""


class Bottleneck(_Block, resnet.Bottleneck):
    """1x1, 3x3 and 1x1 to four times `planes`; `downsample` as in `BasicBlock`."""


class ResNet(nn.Module):
    """A ResNet for image classification, with a stem of three 3x3 convolutions.

    `models.models.Resnet` or `ResnetDilated` makes an encoder of it; `ModelBuilder.build_encoder`
    builds the same network.

    Paper: He et al. 2016, arXiv:1512.03385, table 1; with adaptive pooling for any image size.

    Args:
        block: `block(inplanes, planes, stride, downsample=...)` with an attribute `expansion`.
        layers: number of blocks of each of the four stages.
        num_classes: number of classes.
        options: other keyword arguments of `block`.
    """

    planes: ClassVar[tuple[int, ...]] = (64, 128, 256, 512)

    def __init__(
        self, block: Any, layers: Sequence[int], num_classes: int = 1000, **options: Any
    ) -> None:
        super().__init__()
        stem = ((3, 64, 2), (64, 64, 1), (64, 128, 1))
        for k, (n_in, n_out, stride) in enumerate(stem, start=1):
            setattr(self, f"conv{k}", conv3x3(n_in, n_out, stride))
            setattr(self, f"bn{k}", BatchNorm2d(n_out))
            setattr(self, f"relu{k}", nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.inplanes = 128
        for k, (planes, count) in enumerate(zip(self.planes, layers, strict=True), start=1):
            stage = self._make_layer(block, planes, count, stride=1 if k == 1 else 2, **options)
            setattr(self, f"layer{k}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, num_classes)
        init_weights(self)

    def _make_layer(
        self, block: Any, planes: int, blocks: int, stride: int = 1, **options: Any
    ) -> nn.Sequential:
        n_in, n_out = self.inplanes, planes * block.expansion
        self.inplanes = n_out
        shortcut = resnet.shortcut(n_in, n_out, stride)
        first = block(n_in, planes, stride, downsample=shortcut, **options)
        return nn.Sequential(first, *(block(n_out, planes, **options) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, num_classes) scores."""
        for name in FEATURES:
            x = getattr(self, name)(x)
        scores: Tensor = self.fc(self.avgpool(x).flatten(1))
        return scores


def resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet18; `pretrained` loads the published ImageNet weights, downloaded once."""
    return initialized(ResNet(BasicBlock, [2, 2, 2, 2], **kwargs), "resnet18", pretrained)


def resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet50; `pretrained` as in `resnet18`."""
    return initialized(ResNet(Bottleneck, [3, 4, 6, 3], **kwargs), "resnet50", pretrained)


def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet101; `pretrained` as in `resnet18`."""
    return initialized(ResNet(Bottleneck, [3, 4, 23, 3], **kwargs), "resnet101", pretrained)
