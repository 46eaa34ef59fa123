"""MobileNetV3-Large up to its last 1x1 convolution, at output stride 32 or 16."""

from __future__ import annotations

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.encoders.base import Encoder, collect_outputs, init_weights, register_strides

# Kernel, hidden channels, output channels, squeeze-and-excitation, hard swish, stride: table 1 of
# the paper. From block 12 on the stride is 32.
BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


def conv_bn(
    n_in: int,
    n_out: int,
    kernel: int,
    *activation: nn.Module,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    kind = DepthwiseConv2d if groups == n_in == n_out else nn.Conv2d
    padding = kernel // 2 * dilation
    conv = kind(n_in, n_out, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, SynchronizedBatchNorm2d(n_out, eps=1e-3, momentum=0.01), *activation)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor in [0, 1], computed from the means of all channels."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        # A quarter, rounded to a multiple of 8, but not to less than 0.9 of it.
        width = max(8, (n_in // 4 + 4) // 8 * 8)
        width += 8 if width < 0.9 * (n_in // 4) else 0
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(n_in, width, 1)
        self.activation = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(width, n_in, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return x * self.scale_activation(scale)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise, squeeze-and-excitation, 1x1 projection; residual if possible."""

    def __init__(
        self,
        n_in: int,
        kernel: int,
        hidden: int,
        n_out: int,
        excite: bool,
        swish: bool,
        stride: int,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        relu = nn.Hardswish() if swish else nn.ReLU(inplace=True)
        expand = [conv_bn(n_in, hidden, 1, relu)] if hidden != n_in else []
        self.block = nn.Sequential(
            *expand,
            conv_bn(hidden, hidden, kernel, relu, stride=stride, dilation=dilation, groups=hidden),
            *([SqueezeExcitation(hidden)] if excite else []),
            conv_bn(hidden, n_out, 1),
        )
        self.residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3Large(Encoder):
    """MobileNetV3-Large (width 1.0), with torchvision's state dict names.

    Feature maps: the last one of stride 4, the first of stride 8, which torchvision's auxiliary
    head reads, and the deepest. If an image is computed in tiles, squeeze-and-excitation averages
    over each tile.

    Paper: Howard et al. 2019, arXiv:1905.02244, table 1, up to the last 1x1 convolution. BatchNorm
    has eps 1e-3 and momentum 0.01.

    Deviations:
        - At output stride 16 the block that had the stride is dilated by 2, like those after it, as
          in torchvision.
        - No layer is halved in width; sec. 6.4 of the paper halves those of the last stage for
          segmentation, but torchvision's weights have the full width.
    """

    channels = (24, 40, 960)
    strides: tuple[int, ...] = (4, 8, 32)
    output_strides = (32, 16)
    out_indices = (3, 4, 16)  # of the feature maps, in `features`

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__()
        self.strides = self.strides_at(output_stride)
        layers: list[nn.Module] = [conv_bn(3, 16, 3, nn.Hardswish(), stride=2)]
        n_in = 16
        for i, (kernel, hidden, n_out, excite, swish, stride) in enumerate(BLOCKS):
            dilation = 32 // output_stride if i >= 12 else 1
            stride = stride if dilation == 1 else 1
            layers.append(
                InvertedResidual(n_in, kernel, hidden, n_out, excite, swish, stride, dilation)
            )
            n_in = n_out
        layers.append(conv_bn(n_in, self.channels[-1], 1, nn.Hardswish()))
        self.features = nn.Sequential(*layers)
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return collect_outputs(self.features, images, self.out_indices)


register_strides("mobilenetv3_large", MobileNetV3Large)
