"""PPM: the pyramid pooling module of PSPNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d
from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.deepsup import DeepSup
from mit_semseg.models.layers import PooledBatchNorm2d
from mit_semseg.models.pyramid import PyramidConv2d, Tile


def pool_branch(scale: int, n_in: int, n_out: int) -> nn.Sequential:
    """Average pooling to scale x scale, 1x1 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(scale),
        nn.Conv2d(n_in, n_out, 1, bias=False),
        PooledBatchNorm2d(n_out),
        nn.ReLU(inplace=True),
    )


@DECODERS.register("ppm", "ppm_bilinear")
class PPM(Decoder):
    """Average pools of several sizes, concatenated with the deepest feature map.

    Paper: Zhao et al. 2017, arXiv:1612.01105, sec. 3.2.

    Deviations:
        - Each pool has 512 output channels whatever the width of the encoder, as in the published
          MIT toolkit; the paper has a quarter of that width.
        - Pools and scores are resized with `align_corners=False`, as in the published MIT toolkit;
          the code of PSPNet's authors has True.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_class: int = 150,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        width: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(channels, num_class, **options)
        n_in = channels[-1]
        self.pool_scales = tuple(pool_scales)
        self.ppm = nn.ModuleList(pool_branch(scale, n_in, width) for scale in pool_scales)
        self.conv_last = nn.Sequential(
            PyramidConv2d(n_in, len(pool_scales) * width, width),
            SynchronizedBatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_class, 1),
        )
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        x = features[-1]
        join, *layers = self.conv_last
        # Each branch starts with the same pooling, which does not change a pooled map.
        pools = zip(self.ppm, self.pools(x, tile), strict=True)
        y = join(x, [branch(pool) for branch, pool in pools], tile)
        for layer in layers:
            y = layer(y)
        return (y,)


@DECODERS.register("ppm_deepsup", "ppm_bilinear_deepsup")
class PPMDeepSup(DeepSup, PPM):
    """PPM with an auxiliary convolutional head on the feature map before the last.

    Deviations:
        - That head has a quarter of the channels of the last map, 512 on a ResNet50, as in the
          published MIT toolkit; the code of PSPNet's authors has a quarter of those of the map it
          reads, 256.
    """

    dropout_kind = nn.Dropout2d
