"""ENet's encoder: early downsampling, bottlenecks, and the indices of two pooling layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights


def batch_norm(channels: int) -> nn.Module:
    return BatchNorm2d(channels, eps=1e-3)


def bn_prelu(channels: int) -> list[nn.Module]:
    return [batch_norm(channels), nn.PReLU(channels)]


Convolution = nn.Conv2d | nn.ConvTranspose2d


def extension(convs: Sequence[Convolution], n_out: int, drop: float) -> nn.Sequential:
    """The residual branch: convolutions, each with BatchNorm and PReLU, and a 1x1 expansion."""
    layers: list[nn.Module] = []
    for conv in convs:
        layers += [conv, *bn_prelu(conv.out_channels)]
    expand = nn.Conv2d(convs[-1].out_channels, n_out, 1, bias=False)
    return nn.Sequential(*layers, expand, batch_norm(n_out), nn.Dropout2d(drop))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3 or 5x1 and 1x5, 1x1; added to the input."""

    def __init__(
        self, channels: int, drop: float, dilation: int = 1, asymmetric: bool = False
    ) -> None:
        super().__init__()
        width = channels // 4
        kernels = [(5, 1), (1, 5)] if asymmetric else [(3, 3)]
        convs = [
            nn.Conv2d(
                width,
                width,
                (h, w),
                padding=(h // 2 * dilation, w // 2 * dilation),
                dilation=dilation,
                bias=False,
            )
            for h, w in kernels
        ]
        project = nn.Conv2d(channels, width, 1, bias=False)
        self.extension = extension([project, *convs], channels, drop)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(x + self.extension(x))


class Downsampling(nn.Module):
    """A bottleneck that halves the sides; the main branch is max pooling, padded with channels.

    The bottleneck has a quarter of the output channels, as in the authors' code; the paper does
    not specify it.
    """

    def __init__(self, n_in: int, n_out: int, drop: float) -> None:
        super().__init__()
        width = n_out // 4
        conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        project = nn.Conv2d(n_in, width, 2, stride=2, bias=False)
        self.extension = extension([project, conv], n_out, drop)
        self.prelu = nn.PReLU(n_out)
        self.added = n_out - n_in

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the indices of the maxima in the flattened (H, W) plane of `x`."""
        H, W = x.shape[-2:]
        main, indices = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        main = F.pad(main, (0, 0, 0, 0, 0, self.added))
        return self.prelu(main + self.extension(F.pad(x, (0, W % 2, 0, H % 2)))), indices


def stage() -> nn.Sequential:
    """The eight bottlenecks of stage 2 or 3."""
    return nn.Sequential(
        Bottleneck(128, 0.1),
        Bottleneck(128, 0.1, dilation=2),
        Bottleneck(128, 0.1, asymmetric=True),
        Bottleneck(128, 0.1, dilation=4),
        Bottleneck(128, 0.1),
        Bottleneck(128, 0.1, dilation=8),
        Bottleneck(128, 0.1, asymmetric=True),
        Bottleneck(128, 0.1, dilation=16),
    )


@ENCODERS.register("enet")
class ENetEncoder(Encoder):
    """The initial block and stages 1 to 3.

    Feature maps: the pooling indices of stages 1 and 2 (int64, into the flattened input plane of
    the pooling layer, with the shape of its output), and the output of stage 3. The image is
    padded with zeros to multiples of 4, so that the sizes of these planes are known: twice the
    first indices, and the shape of the first indices.

    Paper: Paszke et al. 2016, arXiv:1606.02147, sec. 3, table 1. BatchNorm has eps 1e-3, as in
    the authors' code.

    Deviations:
        - Encoder and decoder are trained together; the paper trains the encoder first, on labels at
          its own resolution (sec. 5.1).
        - Convolutions before a BatchNorm have no bias, which BatchNorm would cancel; the paper
          states this for projections only, and the authors' code gives most of the others a bias.
        - BatchNorm and PReLU also follow the first of the two asymmetric convolutions, as in the
          paper; the authors' code has nothing there.
        - Pooling rounds sides up, not down.
    """

    channels = (16, 64, 128)
    strides = (4, 8, 8)
    supported_decoders = ("enet",)

    def __init__(self) -> None:
        super().__init__()
        self.initial = nn.Conv2d(3, 13, 3, stride=2, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.initial_act = nn.Sequential(*bn_prelu(16))
        self.down1 = Downsampling(16, 64, 0.01)
        self.stage1 = nn.Sequential(*(Bottleneck(64, 0.01) for _ in range(4)))
        self.down2 = Downsampling(64, 128, 0.1)
        self.stage2 = stage()
        self.stage3 = stage()
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        H, W = images.shape[-2:]
        images = F.pad(images, (0, -W % 4, 0, -H % 4))
        # Pools three channels, or the first of fewer; others, such as depth, are only convolved.
        few = images.shape[1] < 3
        pooled = self.pool(images[:, :1].expand(-1, 3, -1, -1) if few else images[:, :3])
        x = self.initial_act(torch.cat([self.initial(images), pooled], dim=1))
        x, first = self.down1(x)
        x, second = self.down2(self.stage1(x))
        return [first, second, self.stage3(self.stage2(x))]
