"""PIDNet's encoder: branches for detail, context and boundaries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, Variant, init_weights
from mit_semseg.models.encoders.ddrnet import (
    DAPPM,
    Bottleneck,
    PyramidPooling,
    basic_blocks,
    bn_relu_conv,
    quarter_stem,
)
from mit_semseg.models.encoders.resnet import BasicBlock
from mit_semseg.models.layers import conv_bn, resize


class PAPPM(PyramidPooling):
    """Parallel aggregation pyramid pooling: DAPPM with scales that are processed in parallel.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.2 and fig. 7.
    """

    def __init__(self, n_in: int, width: int, n_out: int) -> None:
        super().__init__(n_in, width, n_out)
        self.scale_process = nn.Sequential(*bn_relu_conv(4 * width, 4 * width, 3, groups=4))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.scales(x)
        processed = self.scale_process(torch.cat([scale + first for scale in others], dim=1))
        y: Tensor = self.compression(torch.cat([first, processed], dim=1))
        return y + self.shortcut(x)


class PixelAttentionGuidedFusion(nn.Module):
    """Pag: mean of a fine and a coarse map, weighted by their similarity at each pixel.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.1, eq. 5 and 6.
    """

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.f_x = conv_bn(n_in, width, 1)
        self.f_y = conv_bn(n_in, width, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        size = fine.shape[2:]
        similarity = (self.f_x(fine) * resize(self.f_y(coarse), size)).sum(1, keepdim=True)
        weight = similarity.sigmoid()
        return (1 - weight) * fine + weight * resize(coarse, size)


class BoundaryAttentionGuidedFusion(nn.Module):
    """Bag: detail at boundaries, context elsewhere, then a 3x3 convolution.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.3, eq. 7.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv = nn.Sequential(BatchNorm2d(width), nn.ReLU(inplace=True), conv)

    def forward(self, detail: Tensor, context: Tensor, boundary: Tensor) -> Tensor:
        weight = boundary.sigmoid()
        y: Tensor = self.conv(weight * detail + (1 - weight) * context)
        return y


class LightFusion(nn.Module):
    """Light-Bag: boundary-attention-guided fusion with two 1x1 convolutions.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.3, eq. 8.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_p = conv_bn(width, width, 1)
        self.conv_i = conv_bn(width, width, 1)

    def forward(self, detail: Tensor, context: Tensor, boundary: Tensor) -> Tensor:
        weight = boundary.sigmoid()
        y: Tensor = self.conv_p((1 - weight) * context + detail)
        return y + self.conv_i(context + weight * detail)


class PIDNet(Encoder):
    """Three feature maps of stride 8: detail branch, boundary branch, and fusion of all branches.

    It is the network without its three heads, which are the decoder of the same name. State dict
    names are those of the authors' code, whose files can be loaded into both. The first two maps
    are for the auxiliary heads. If an image is computed in tiles (`models.tiles`), the pyramid
    averages over each tile.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4 and table 7; as in the authors' code, the maps
    for the auxiliary heads are taken after the ReLU.
    """

    strides = (8, 8, 8)
    supported_decoders = (
        "pidnet_s",
        "pidnet_m",
        "pidnet_l",
    )  # others would not train the boundary branch

    def __init__(
        self,
        channels: tuple[int, int, int],
        depths: tuple[int, int] = (2, 3),
        pool_width: int = 96,
        large: bool = False,
    ) -> None:
        """Initialise the encoder.

        Args:
            channels: channels of the maps, (2 C, 2 C, 4 C) with C of the paper.
            depths: m and n of the paper, numbers of blocks of the first two and the later stages.
            pool_width: channels of each scale of the pyramid.
            large: use the boundary branch, pyramid and fusion of PIDNet-L.
        """
        super().__init__()
        self.channels = channels
        wide, width, (m, n) = channels[0], channels[0] // 2, depths
        self.conv1 = quarter_stem(width)
        self.layer1 = basic_blocks(width, width, m)
        self.layer2 = basic_blocks(width, wide, m, stride=2)
        self.layer3 = basic_blocks(wide, 4 * width, n, stride=2)
        self.layer4 = basic_blocks(4 * width, 8 * width, n, stride=2)
        self.layer5 = nn.Sequential(
            Bottleneck(8 * width, 8 * width, stride=2), Bottleneck(16 * width, 8 * width)
        )
        self.compression3 = conv_bn(4 * width, wide, 1)
        self.compression4 = conv_bn(8 * width, wide, 1)
        self.pag3 = PixelAttentionGuidedFusion(wide, width)
        self.pag4 = PixelAttentionGuidedFusion(wide, width)
        self.layer3_ = basic_blocks(wide, wide, m)
        self.layer4_ = basic_blocks(wide, wide, m)
        self.layer5_ = nn.Sequential(Bottleneck(wide, wide))
        narrow = wide if large else width
        self.layer3_d = BasicBlock(wide, narrow, last_relu=False)
        self.layer4_d = (
            BasicBlock(wide, wide, last_relu=False)
            if large
            else nn.Sequential(Bottleneck(width, width))
        )
        self.layer5_d = nn.Sequential(Bottleneck(wide, wide))
        self.diff3 = conv_bn(4 * width, narrow)
        self.diff4 = conv_bn(8 * width, wide)
        pyramid = DAPPM if large else PAPPM
        self.spp = pyramid(16 * width, pool_width, channels[2])
        fusion = BoundaryAttentionGuidedFusion if large else LightFusion
        self.dfm = fusion(channels[2])
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x = self.layer2(self.layer1(self.conv1(images)).relu()).relu()
        size = x.shape[2:]
        context = self.layer3(x).relu()
        detail = self.pag3(self.layer3_(x), self.compression3(context)).relu()
        boundary = (self.layer3_d(x) + resize(self.diff3(context), size)).relu()
        context = self.layer4(context).relu()
        second = self.pag4(self.layer4_(detail), self.compression4(context)).relu()
        boundary = (self.layer4_d(boundary) + resize(self.diff4(context), size)).relu()
        context = resize(self.spp(self.layer5(context)), size)
        fused = self.dfm(self.layer5_(second), context, self.layer5_d(boundary))
        return [detail, boundary, fused]


ENCODERS.register("pidnet_s")(Variant(PIDNet, channels=(64, 64, 128)))
ENCODERS.register("pidnet_m")(Variant(PIDNet, channels=(128, 128, 256)))
ENCODERS.register("pidnet_l")(
    Variant(PIDNet, channels=(128, 128, 256), depths=(3, 4), pool_width=112, large=True)
)
