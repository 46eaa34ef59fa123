"""DenseNet121, 161, 169 and 201 at output stride 32, 16 or 8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import (
    Encoder,
    dilate,
    init_weights,
    register_strides,
)


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 (4 * growth channels), BN-ReLU-3x3 (growth); concatenated with the input."""

    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = BatchNorm2d(n_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(n_in, 4 * growth, 1, bias=False)
        self.norm2 = BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(y)))], dim=1)


class DenseBlock(nn.Sequential):
    """Layers, each of which reads the outputs of all layers before it."""

    def __init__(self, n_in: int, depth: int, growth: int) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"denselayer{i + 1}", DenseLayer(n_in + i * growth, growth))


class Transition(nn.Module):
    """BN-ReLU, whose output is a feature map, 1x1 to half the channels, 2x2 average pooling."""

    def __init__(self, n_in: int, pools: bool) -> None:
        super().__init__()
        self.norm = BatchNorm2d(n_in)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(n_in, n_in // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if pools else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.norm(x))
        return x, self.pool(self.conv(x))


class DenseNet(Encoder):
    """DenseNet.

    Feature maps: the output of each block, after the BatchNorm and ReLU that follow it.

    Paper: Huang et al. 2017, arXiv:1608.06993, sec. 3, table 1 (DenseNet-BC); dilation as in Yang
    et al. 2018, "DenseASPP", CVPR, sec. 3.4: transitions do not pool, and the 3x3 convolutions of
    the blocks after them have dilation 2 and 4. State dict names are those of torchvision.

    Deviations:
        - Pooling in the transitions keeps the last row and column of maps with odd sides.
    """

    strides: tuple[int, ...] = (4, 8, 16, 32)
    output_strides = (32, 16, 8)

    def __init__(
        self,
        depths: tuple[int, ...],
        channels: tuple[int, ...],
        stem: int = 64,
        growth: int = 32,
        output_stride: int = 32,
    ) -> None:
        """Initialise the encoder.

        Args:
            depths: number of layers of each of the four blocks.
            channels: output channels of each block, including those of its input.
            stem: output channels of the first convolution.
            growth: growth rate: channels added by each layer.
            output_stride: stride of the deepest map, 32, 16 or 8.
        """
        super().__init__()
        self.channels, self.strides = channels, self.strides_at(output_stride)
        self.features = nn.Sequential()
        add = self.features.add_module
        add("conv0", nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False))
        add("norm0", BatchNorm2d(stem))
        add("relu0", nn.ReLU(inplace=True))
        add("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        n_in, natural = stem, 4
        for i, (depth, n_out, stride) in enumerate(
            zip(depths, channels, self.strides, strict=True), start=1
        ):
            block = DenseBlock(n_in, depth, growth)
            dilate(block, natural // stride)
            add(f"denseblock{i}", block)
            if i < len(depths):
                add(f"transition{i}", Transition(n_out, pools=self.strides[i] > stride))
                n_in, natural = n_out // 2, natural * 2
        add("norm5", BatchNorm2d(n_out))
        add("relu5", nn.ReLU(inplace=True))
        init_weights(self)

    def checkpoint_blocks(self) -> list[nn.Module]:
        """The dense blocks; to checkpoint single layers would store more than it saves."""
        return [block for block in self.features if isinstance(block, DenseBlock)]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for layer in self.features:
            if isinstance(layer, Transition):
                features, x = layer(x)
                maps.append(features)
            else:
                x = layer(x)
        return [*maps, x]


register_strides("densenet121", DenseNet, depths=(6, 12, 24, 16), channels=(256, 512, 1024, 1024))
register_strides(
    "densenet161",
    DenseNet,
    depths=(6, 12, 36, 24),
    channels=(384, 768, 2112, 2208),
    stem=96,
    growth=48,
)
register_strides("densenet169", DenseNet, depths=(6, 12, 32, 32), channels=(256, 512, 1280, 1664))
register_strides("densenet201", DenseNet, depths=(6, 12, 48, 32), channels=(256, 512, 1792, 1920))
