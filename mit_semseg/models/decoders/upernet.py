"""UPerNet: a feature pyramid network with pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu, resize
from mit_semseg.models.pyramid import PyramidConv2d, Tile, resize_within


@DECODERS.register("upernet")
class UPerNet(Decoder):
    """PPM on the deepest feature map, and a top-down feature pyramid over all maps of the encoder.

    The number, channels and strides of the maps are arbitrary.

    Paper: Xiao et al. 2018, arXiv:1807.10221, sec. 3.1.

    Deviations:
        - There is one head, for objects and surfaces; those for scenes, parts, materials and
          textures are not implemented.
        - The head is only a classifier, and pools are plain means over cells of whole pixels, as in
          the published MIT toolkit; the code of the paper has another 3x3 convolution in the head,
          and pools with precise RoI pooling.
    """

    min_feature_maps = 2
    fpn_dim = 512

    def __init__(
        self,
        channels: Sequence[int],
        num_class: int = 150,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        width: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(channels, num_class, **options)
        *lower, deepest = channels
        fpn_dim = self.fpn_dim
        self.pool_scales = tuple(pool_scales)
        self.ppm_conv = nn.ModuleList(conv_bn_relu(deepest, width, 1) for _ in pool_scales)
        self.ppm_last_conv = conv_bn_relu(deepest + len(pool_scales) * width, fpn_dim)
        self.fpn_in = nn.ModuleList(conv_bn_relu(n_in, fpn_dim, 1) for n_in in lower)
        # The nested Sequential, here and in conv_last, is required by published state dict names.
        self.fpn_out = nn.ModuleList(nn.Sequential(conv_bn_relu(fpn_dim, fpn_dim)) for _ in lower)
        join = PyramidConv2d(fpn_dim, (len(channels) - 1) * fpn_dim, fpn_dim)
        self.conv_last = nn.Sequential(
            nn.Sequential(join, BatchNorm2d(fpn_dim), nn.ReLU(inplace=True)),
            nn.Conv2d(fpn_dim, num_class, 1),
        )
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        finest, *coarser = self.levels(features, tile)
        fuse, classify = self.conv_last
        join, norm, relu = cast(nn.Sequential, fuse)
        return (classify(relu(norm(join(finest, coarser)))),)

    def levels(self, features: list[Tensor], tile: Tile | None) -> list[Tensor]:
        """The feature pyramid, (B, fpn_dim, h, w) each, finest first."""
        *lower, x = features
        pools = zip(self.ppm_conv, self.pools(x, tile), strict=True)
        # Unlike in PPM, a pooled map is resized before its convolution.
        context = [conv(resize_within(pool, x.shape[2:], tile)) for conv, pool in pools]
        top = self.ppm_last_conv(torch.cat([x, *context], dim=1))

        levels = [top]
        for lateral, lateral_in, smooth in zip(
            reversed(lower), reversed(self.fpn_in), reversed(self.fpn_out), strict=True
        ):
            side = lateral_in(lateral)
            top = side + resize(top, side.shape[2:])
            levels.append(smooth(top))
        return levels[::-1]


@DECODERS.register("upernet_lite")
class UPerNetLite(UPerNet):
    """UPerNet with half the channels in the pyramid."""

    fpn_dim = 256
