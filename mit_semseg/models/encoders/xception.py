"""Xception65: DeepLab's modified aligned Xception at output stride 16."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights


def batch_norm(width: int) -> nn.Module:
    return SynchronizedBatchNorm2d(width, eps=1e-3)


class Separable(nn.Sequential):
    """3x3 depthwise, BatchNorm, 1x1, BatchNorm; ReLU first, or after both BatchNorms."""

    def __init__(
        self, n_in: int, n_out: int, stride: int = 1, dilation: int = 1, relu_first: bool = True
    ) -> None:
        relu = nn.Identity() if relu_first else nn.ReLU(inplace=True)
        super().__init__()
        # Not in place, as the shortcut reads the same input.
        self.relu_first = nn.ReLU() if relu_first else nn.Identity()
        self.depthwise = DepthwiseConv2d(
            n_in, n_in, 3, stride, dilation, dilation, groups=n_in, bias=False
        )
        self.bn_depthwise = batch_norm(n_in)
        self.relu_depthwise = relu
        self.pointwise = nn.Conv2d(n_in, n_out, 1, bias=False)
        self.bn_pointwise = batch_norm(n_out)
        self.relu_pointwise = relu


class Block(nn.Module):
    """Three separable convolutions, the last with the stride, and a shortcut."""

    def __init__(self, n_in: int, widths: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        first, second, n_out = widths
        self.convs = nn.Sequential(
            Separable(n_in, first), Separable(first, second), Separable(second, n_out, stride)
        )
        same = stride == 1 and n_in == n_out
        conv = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(conv, batch_norm(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.with_inner(x)[1]

    def with_inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the strided convolution, and the output of the block."""
        inner = self.convs[:2](x)
        return inner, self.convs[2](inner) + self.shortcut(x)


@ENCODERS.register("xception65")
class Xception65(Encoder):
    """Modified aligned Xception with 65 layers, at output stride 16.

    Feature maps: the input of the strided convolution of the second entry block (stride 4, the
    low-level features of DeepLabv3+), and the outputs of that block, of the middle flow, and of
    the last layer.

    Paper: Chen et al. 2018, arXiv:1802.02611, sec. 3.2 and fig. 4, after Chollet 2017,
    arXiv:1610.02357; the last stride is replaced by dilation 2 as in sec. 4. BatchNorm has eps
    1e-3, as in the authors' code.

    Deviations:
        - The paper adds "batch normalization and ReLU after each 3x3 depthwise convolution". As in
          the authors' code, that ReLU is in the last three convolutions only; all others have it
          before the depthwise convolution, so that what is added to the shortcuts can be negative.
        - BatchNorm has momentum 0.1. The authors' code has 0.0003, for a network initialised with
          ImageNet weights. There are none of it here: after 1,000 steps three quarters of the
          statistics would still be the initial ones.
    """

    channels = (256, 256, 728, 2048)
    strides = (4, 8, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = batch_norm(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn2 = batch_norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.entry1 = Block(64, (128, 128, 128), stride=2)
        self.entry2 = Block(128, (256, 256, 256), stride=2)
        self.entry3 = Block(256, (728, 728, 728), stride=2)
        self.middle = nn.Sequential(*(Block(728, (728, 728, 728)) for _ in range(16)))
        self.exit = Block(728, (728, 1024, 1024))  # not dilated, unlike the layers after it
        self.last = nn.Sequential(
            Separable(1024, 1536, dilation=2, relu_first=False),
            Separable(1536, 1536, dilation=2, relu_first=False),
            Separable(1536, 2048, dilation=2, relu_first=False),
        )
        init_weights(self)

    def checkpoint_blocks(self) -> list[nn.Module]:
        """All blocks except `entry2`, one of whose inner maps is a feature map."""
        return [self.entry1, self.entry3, *self.middle, self.exit, *self.last]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        low, x8 = self.entry2.with_inner(self.entry1(x))
        x16 = self.middle(self.entry3(x8))
        return [low, x8, x16, self.last(self.exit(x16))]
