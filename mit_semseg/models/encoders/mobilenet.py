"""MobileNetV2 (width 1.0) without its last 1x1 convolution, at output stride 32, 16 or 8."""

from __future__ import annotations

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.encoders.base import (
    Encoder,
    collect_outputs,
    dilate,
    init_weights,
    register_strides,
)

# Expansion, output channels, blocks, stride of the first block: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def conv_bn(
    n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.Module]:
    kind = DepthwiseConv2d if groups == n_in == n_out else nn.Conv2d
    conv = kind(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, BatchNorm2d(n_out)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; residual if the shapes are equal."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: float) -> None:
        super().__init__()
        hidden = round(n_in * expansion)
        expand = [*conv_bn(n_in, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            *conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(inplace=True),
            *conv_bn(hidden, n_out, 1),
        )
        self.residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(Encoder):
    """MobileNetV2.

    Paper: Sandler et al. 2018, arXiv:1801.04381, table 2; the last 1x1 convolution, to 1280
    channels, belongs to the classifier and is left out. Strides are replaced by dilation as in
    Yu et al. 2017, arXiv:1705.09914, sec. 2; the paper's own segmentation model (sec. 6.3) also
    has output stride 16.

    Deviations:
        - BatchNorm's eps is 1e-5, as in torchvision and the published MIT toolkit, whose weights
          fit; the authors' code (TF-slim) adds 1e-3. `tfslim:` weights are converted.
        - Strided convolutions pad all sides equally; the authors' pad even sides at the right and
          bottom only, which shifts their receptive fields by one pixel.
    """

    channels: tuple[int, ...] = (24, 32, 64, 160, 320)
    strides: tuple[int, ...] = (4, 8, 16, 32, 32)
    output_strides = (32, 16, 8)
    out_indices = (2, 4, 7, 14, 17)  # of the feature maps, in `features`
    # The first depthwise filters compute differences of nearly equal values. Of the labels that
    # bfloat16 changes, three quarters change because of these layers.
    fp32_layers = ("features.0", "features.1")

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__()
        self.strides = self.strides_at(output_stride)
        blocks: list[nn.Module] = [nn.Sequential(*conv_bn(3, 32, 3, 2), nn.ReLU6(inplace=True))]
        n_in = 32
        for expansion, n_out, depth, stride in STAGES:
            for i in range(depth):
                blocks.append(InvertedResidual(n_in, n_out, stride if i == 0 else 1, expansion))
                n_in = n_out
        self.features = nn.Sequential(*blocks)
        for first, last, natural, stride in (
            (7, 13, 16, self.strides[2]),
            (14, 17, 32, self.strides[3]),
        ):
            for block in self.features[first : last + 1]:
                dilate(block, natural // stride)
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return collect_outputs(self.features, images, self.out_indices)


register_strides("mobilenetv2", MobileNetV2)
