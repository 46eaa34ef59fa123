"""PP-LiteSeg's head: a small pyramid, then fusions that get narrower as maps get finer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights
from mit_semseg.models.decoders.ppm import pool_branch
from mit_semseg.models.layers import conv_bn, conv_bn_relu
from mit_semseg.models.pyramid import Tile, resize_within


class UnifiedAttentionFusion(nn.Module):
    """Of a fine and a coarse map, pixel by pixel, the shares that their means and maxima say.

    Paper: Peng et al. 2022, arXiv:2204.02681, sec. 3.2, eq. 1 and 3 (spatial attention).
    """

    def __init__(self, fine: int, coarse: int, n_out: int) -> None:
        super().__init__()
        self.project = conv_bn_relu(fine, coarse)
        self.attention = nn.Sequential(conv_bn_relu(4, 2), *conv_bn(2, 1))
        self.fuse = conv_bn_relu(coarse, n_out)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        fine = self.project(fine)
        coarse = resize_within(coarse, fine.shape[2:])
        stats = [f(dim=1, keepdim=True) for x in (fine, coarse) for f in (x.mean, x.amax)]
        share = self.attention(torch.cat(stats, dim=1)).sigmoid()
        y: Tensor = self.fuse(share * fine + (1 - share) * coarse)
        return y


def head(n_in: int, width: int, num_class: int) -> nn.Sequential:
    return nn.Sequential(conv_bn_relu(n_in, width), nn.Conv2d(width, num_class, 1))


@DECODERS.register("ppliteseg_t")
class PPLiteSegT(Decoder):
    """Pools of 1, 2 and 4 cells a side are added up, then fused with the maps, deepest first.

    Auxiliary heads: on the fusions with the two deeper maps, weight 1 as in the authors' code,
    whose widths of heads these are.

    Paper: Peng et al. 2022, arXiv:2204.02681, sec. 3 and 4.1: PP-LiteSeg-T on `stdc1`.
    """

    min_feature_maps = 3
    auxiliary = (Auxiliary(weight=1.0), Auxiliary(weight=1.0))
    widths: ClassVar[tuple[int, int, int]] = (32, 64, 128)  # of the fusions, finest first
    head_widths: ClassVar[tuple[int, int, int]] = (32, 64, 64)

    def __init__(
        self, channels: Sequence[int], num_class: int = 150, width: int = 128, **options: Any
    ) -> None:
        super().__init__(channels, num_class, **options)
        self.pool_scales = (1, 2, 4)
        self.ppm = nn.ModuleList(pool_branch(s, channels[-1], width) for s in self.pool_scales)
        self.context = conv_bn_relu(width, width)
        coarse = (*self.widths[1:], width)
        self.fusions = nn.ModuleList(
            UnifiedAttentionFusion(*sides) for sides in zip(channels[-3:], coarse, self.widths)
        )
        fine, middle, deep = zip(self.widths, self.head_widths)
        self.conv_last = head(*fine, num_class)
        self.conv_last_middle = head(*middle, num_class)
        self.conv_last_deep = head(*deep, num_class)
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        fine, middle, deep = features[-3:]
        pools = zip(self.ppm, self.pools(deep, tile), strict=True)
        size = deep.shape[2:]
        x = self.context(sum(resize_within(branch(pool), size, tile) for branch, pool in pools))
        deep = self.fusions[2](deep, x)
        middle = self.fusions[1](middle, deep)
        main = self.conv_last(self.fusions[0](fine, middle))
        if not self.training:
            return (main,)
        return main, self.conv_last_middle(middle), self.conv_last_deep(deep)


@DECODERS.register("ppliteseg_b")
class PPLiteSegB(PPLiteSegT):
    """PP-LiteSeg-B on `stdc2`: wider fusions."""

    widths = (64, 96, 128)
    head_widths = (64, 64, 64)
