"""`models.mobilenet` as published: MobileNetV2 with the classifier of ImageNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mit_semseg.compat.resnet import BatchNorm2d, load_url
from mit_semseg.compat.urls import initialized
from mit_semseg.models.encoders import mobilenet
from mit_semseg.models.encoders.base import init_weights
from mit_semseg.weights import imagenet_weights

__all__ = [
    "BatchNorm2d",
    "InvertedResidual",
    "MobileNetV2",
    "conv_1x1_bn",
    "conv_bn",
    "load_url",
    "mobilenetv2",
    "model_urls",
]

model_urls = {"mobilenetv2": imagenet_weights("mobilenetv2").urls[0]}


def conv_bn(inp: int, oup: int, stride: int) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU6."""
    return nn.Sequential(*mobilenet.conv_bn(inp, oup, 3, stride), nn.ReLU6(inplace=True))


def conv_1x1_bn(inp: int, oup: int) -> nn.Sequential:
    """1x1 convolution, BatchNorm, ReLU6."""
    return nn.Sequential(*mobilenet.conv_bn(inp, oup, 1), nn.ReLU6(inplace=True))


class InvertedResidual(mobilenet.InvertedResidual):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection.

    Raises:
        ValueError: the stride is neither 1 nor 2.
    """

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: float) -> None:
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}; it must be 1 or 2")
        super().__init__(inp, oup, stride, expand_ratio)
        self.stride, self.use_res_connect = stride, self.residual


class MobileNetV2(nn.Module):
    """MobileNetV2 for image classification.

    `models.models.MobileNetV2Dilated` makes an encoder of it; `ModelBuilder.build_encoder` builds
    the same network.

    Paper: Sandler et al. 2018, arXiv:1801.04381, table 2.

    Args:
        n_class: number of classes.
        input_size: side of the images in pixels; only checked.
        width_mult: factor of the channels.

    Raises:
        ValueError: `input_size` is not a multiple of 32.
    """

    def __init__(self, n_class: int = 1000, input_size: int = 224, width_mult: float = 1.0) -> None:
        super().__init__()
        if input_size % 32:
            raise ValueError(f"input_size is {input_size}; it must be a multiple of 32")
        n_in = int(32 * width_mult)
        self.last_channel = int(1280 * width_mult) if width_mult > 1 else 1280
        blocks: list[nn.Module] = [conv_bn(3, n_in, 2)]
        for expansion, channels, depth, stride in mobilenet.STAGES:
            n_out = int(channels * width_mult)
            for i in range(depth):
                blocks.append(InvertedResidual(n_in, n_out, stride if i == 0 else 1, expansion))
                n_in = n_out
        self.features = nn.Sequential(*blocks, conv_1x1_bn(n_in, self.last_channel))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.last_channel, n_class))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, n_class) scores."""
        scores: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return scores


def mobilenetv2(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2; `pretrained` loads the published ImageNet weights, downloaded once."""
    return initialized(MobileNetV2(n_class=1000, **kwargs), "mobilenetv2", pretrained)
