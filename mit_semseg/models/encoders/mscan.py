"""MSCAN: attention that is made of depthwise strip convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, Variant
from mit_semseg.models.layers import ChannelNorm


def depthwise(width: int, kernel: tuple[int, int]) -> nn.Conv2d:
    rows, columns = kernel
    return nn.Conv2d(width, width, kernel, padding=(rows // 2, columns // 2), groups=width)


class MultiScaleConvAttention(nn.Module):
    """Weighs a map by what depthwise strips of 7, 11 and 21 pixels see around each pixel.

    Paper: Guo et al. 2022, arXiv:2209.08575, sec. 3.1, eq. 1 and 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = depthwise(width, (5, 5))
        self.conv0_1, self.conv0_2 = depthwise(width, (1, 7)), depthwise(width, (7, 1))
        self.conv1_1, self.conv1_2 = depthwise(width, (1, 11)), depthwise(width, (11, 1))
        self.conv2_1, self.conv2_2 = depthwise(width, (1, 21)), depthwise(width, (21, 1))
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.conv0(x)
        weights = near + self.conv0_2(self.conv0_1(near))
        weights = weights + self.conv1_2(self.conv1_1(near))
        weights = weights + self.conv2_2(self.conv2_1(near))
        return x * self.conv3(weights)


class Attention(nn.Module):
    """The attention between two 1x1 convolutions, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(width, width, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = MultiScaleConvAttention(width)
        self.proj_2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))
        return x + y


class DepthwiseConvolution(nn.Module):
    """A 3x3 one, under the name that the authors' has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = depthwise(width, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dwconv(x)
        return y


class FeedForward(nn.Module):
    """1x1 convolution, 3x3 depthwise, GELU, 1x1 convolution."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.dwconv = DepthwiseConvolution(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.dwconv(self.fc1(x))))
        return y


class Block(nn.Module):
    """Attention and a feed-forward network, each after BatchNorm, scaled, and added."""

    def __init__(self, width: int, ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = BatchNorm2d(width)
        self.attn = Attention(width)
        self.norm2 = BatchNorm2d(width)
        self.mlp = FeedForward(width, ratio * width)
        from torchvision.ops import StochasticDepth  # slow to import

        self.drop_path = StochasticDepth(drop_path, "row")
        self.layer_scale_1 = nn.Parameter(torch.full((width,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        y: Tensor = self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))
        return x + self.drop_path(y)


class Stem(nn.Module):
    """Two strided 3x3 convolutions with BatchNorm, and a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.proj = nn.Sequential(
            nn.Conv2d(3, half, 3, stride=2, padding=1),
            BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, width, 3, stride=2, padding=1),
            BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


class Downsampling(nn.Module):
    """A strided 3x3 convolution with BatchNorm."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(n_in, n_out, 3, stride=2, padding=1)
        self.norm = BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.proj(x))
        return y


class MSCAN(Encoder):
    """Four stages of convolutional attention; layers have the names of the authors' code.

    Paper: Guo et al. 2022, arXiv:2209.08575, sec. 3.1, tables 1 and 2. Convolutions are initialised
    as in the authors' code: He's normal distribution by fan-out, of each group.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        channels: tuple[int, int, int, int],
        depths: tuple[int, int, int, int],
        drop_path: float = 0.1,
    ) -> None:
        """Build it.

        Args:
            channels: of the stages.
            depths: blocks of each.
            drop_path: probability that a sample passes by the last block in training; of the blocks
                before it less, down to 0.
        """
        super().__init__()
        self.channels = channels
        rates = iter(drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))
        inputs = (3, *channels)
        for i, (width, depth, ratio) in enumerate(zip(channels, depths, (8, 8, 4, 4)), 1):
            embed = Stem(width) if i == 1 else Downsampling(inputs[i - 1], width)
            blocks = nn.Sequential(*(Block(width, ratio, next(rates)) for _ in range(depth)))
            self.add_module(f"patch_embed{i}", embed)
            self.add_module(f"block{i}", blocks)
            self.add_module(f"norm{i}", ChannelNorm(width))
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
                nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # all have one

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x, maps = images, []
        for i in range(1, 5):
            for name in ("patch_embed", "block", "norm"):
                x = self.get_submodule(f"{name}{i}")(x)
            x = x.contiguous()
            maps.append(x)
        return maps


SMALL, WIDE = (32, 64, 160, 256), (64, 128, 320, 512)
ENCODERS.register("mscan_t")(Variant(MSCAN, channels=SMALL, depths=(3, 3, 5, 2)))
ENCODERS.register("mscan_s")(Variant(MSCAN, channels=WIDE, depths=(2, 2, 4, 2)))
ENCODERS.register("mscan_b")(Variant(MSCAN, channels=WIDE, depths=(3, 3, 12, 3)))
ENCODERS.register("mscan_l")(Variant(MSCAN, channels=WIDE, depths=(3, 5, 27, 3), drop_path=0.3))
