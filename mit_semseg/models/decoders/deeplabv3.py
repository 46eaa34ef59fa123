"""DeepLabv3: atrous spatial pyramid pooling on the deepest feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.fcn_head import FCNAuxiliary
from mit_semseg.models.decoders.ppm import pool_branch
from mit_semseg.models.layers import conv_bn_relu
from mit_semseg.models.pyramid import Tile

# Dilations at output stride 16.
RATES = (6, 12, 18)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1 and dilated 3x3 convolutions, and image pooling.

    Paper: Chen et al. 2017, arXiv:1706.05587, sec. 3.3 and fig. 5. State dict names are those of
    torchvision.
    """

    def __init__(
        self, n_in: int, rates: Sequence[int], width: int = 256, drop: float = 0.5
    ) -> None:
        """Initialise the branches.

        Args:
            n_in: input channels.
            rates: dilation of each 3x3 convolution.
            width: output channels of each branch and of the module.
            drop: dropout probability at the end.
        """
        super().__init__()
        dilated = [conv_bn_relu(n_in, width, dilation=rate) for rate in rates]
        image = pool_branch(1, n_in, width)
        self.convs = nn.ModuleList([conv_bn_relu(n_in, width, 1), *dilated, image])
        self.project = nn.Sequential(
            *conv_bn_relu(len(self.convs) * width, width, 1), nn.Dropout(drop)
        )

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """Concatenates the branches and projects them.

        Args:
            x: (N, n_in, H, W).
            mean: (N, n_in, 1, 1), the mean over the whole image, of which x may be a tile.

        Returns:
            (N, width, H, W).
        """
        *local, image = self.convs
        # The last branch starts with average pooling, which does not change the mean. To resize a
        # single value is to repeat it.
        maps = [branch(x) for branch in local]
        maps.append(image(mean).expand(-1, -1, *x.shape[-2:]))
        return self.project(torch.cat(maps, dim=1))


def aspp_rates(strides: Sequence[int] | None) -> tuple[int, ...]:
    """Dilations 6, 12 and 18 at output stride 16, and in inverse proportion at others."""
    stride = 16 if strides is None else strides[-1]
    return tuple(max(rate * 16 // stride, 1) for rate in RATES)


@DECODERS.register("deeplabv3")
class DeepLabV3(Decoder):
    """ASPP, a 3x3 convolution and a classifier.

    Paper: Chen et al. 2017, arXiv:1706.05587, sec. 3.3: dilations are 6, 12 and 18 at output stride
    16, twice as much at 8, half at 32.

    Deviations:
        - A 3x3 convolution precedes the classifier, and ASPP ends in dropout of 0.5, as in
          torchvision, whose weights this takes. The authors' code has no such convolution, and
          dropout of 0.1.
        - There is no multi-grid: an encoder's last stage has one dilation (table 5 of the paper:
          1.2 % mIoU less).
        - Scores are resized with `align_corners=False`; the authors' code has True.
        - BatchNorm's momentum is 0.1; in the authors' ASPP it is 0.0003.
    """

    pool_scales = (1,)

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        self.aspp = ASPP(channels[-1], self.rates())
        self.cbr = conv_bn_relu(256, 256)
        self.conv_last = nn.Conv2d(256, num_class, 1)
        init_weights(self)

    def rates(self) -> tuple[int, ...]:
        """Dilations of ASPP."""
        return aspp_rates(self.strides)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        (mean,) = self.pools(features[-1], tile)
        return (self.conv_last(self.cbr(self.aspp(features[-1], mean))),)


@DECODERS.register("deeplabv3_deepsup")
class DeepLabV3DeepSup(FCNAuxiliary, DeepLabV3):
    """DeepLabv3 with an auxiliary head, as torchvision's weights have.

    Paper: Chen et al. 2017, arXiv:1706.05587, sec. 3.3.
    """


@DECODERS.register("deeplabv3_wide_deepsup")
class DeepLabV3WideDeepSup(DeepLabV3DeepSup):
    """DeepLabv3 with dilations 12, 24 and 36 at any output stride.

    torchvision's `deeplabv3_mobilenet_v3_large` has them at output stride 16.

    Paper: Chen et al. 2017, arXiv:1706.05587, sec. 3.3.
    """

    def rates(self) -> tuple[int, ...]:
        return 12, 24, 36
