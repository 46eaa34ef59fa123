"""BiSeNet: refinement of the context path, and its fusion with the spatial path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights
from mit_semseg.models.layers import PooledBatchNorm2d, conv_bn_relu, resize
from mit_semseg.models.pyramid import Tile


class AttentionRefinement(nn.Module):
    """3x3 convolution, then channel attention computed from the mean of each channel.

    Paper: Yu et al. 2018, arXiv:1808.00897, sec. 3.2, fig. 2 (b).
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(n_in, n_out)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(n_out, n_out, 1, bias=False),
            PooledBatchNorm2d(n_out),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.weigh(x)


class FeatureFusion(nn.Module):
    """Concatenation and 1x1 convolution of two maps, then channel attention with a residual.

    Paper: Yu et al. 2018, arXiv:1808.00897, sec. 3.3, fig. 2 (c).
    """

    def __init__(self, n_in: int, n_out: int, reduction: int = 1) -> None:
        super().__init__()
        self.join = conv_bn_relu(n_in, n_out, 1)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(n_out, n_out // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out // reduction, n_out, 1),
            nn.Sigmoid(),
        )

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        x = self.join(torch.cat([spatial, context], dim=1))
        return x + x * self.weigh(x)


def head(n_in: int, width: int, num_class: int) -> nn.Sequential:
    return nn.Sequential(conv_bn_relu(n_in, width), nn.Conv2d(width, num_class, 1))


@DECODERS.register("bisenet")
class BiSeNet(Decoder):
    """Attention refinement of the context at strides 32 and 16, fused with the spatial path.

    Scores are at stride 8. Auxiliary heads: one after each refinement, with weight 1 as published.

    If an image is computed in tiles (`models.tiles`), the global mean is that of the whole image,
    but channel attention is computed from the tile.

    Paper: Yu et al. 2018, arXiv:1808.00897, sec. 3.2 to 3.4. The channels, and the convolution
    after each upsampling, which the paper does not specify, are as in the authors' code.

    Deviations:
        - Context and scores are resized with `align_corners=False`; the authors' code has True.
        - The two convolutions of the attention on the fused channels have biases; in the authors'
          code they have none.
    """

    min_feature_maps = 3
    supported_encoders: ClassVar[tuple[str, ...]] = ("bisenet_resnet18",)
    auxiliary: ClassVar[tuple[Auxiliary, ...]] = (Auxiliary(weight=1.0), Auxiliary(weight=1.0))

    def __init__(
        self, channels: Sequence[int], num_class: int = 150, width: int = 128, **options: Any
    ) -> None:
        super().__init__(channels, num_class, **options)
        spatial, middle, deepest = channels[-3:]
        self.pool_scales = (1,)
        self.tail = nn.Sequential(
            nn.Conv2d(deepest, width, 1, bias=False),
            PooledBatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.refine_deepest = AttentionRefinement(deepest, width)
        self.smooth_deepest = conv_bn_relu(width, width)
        self.refine_middle = AttentionRefinement(middle, width)
        self.smooth_middle = conv_bn_relu(width, width)
        self.fuse = FeatureFusion(spatial + width, 2 * width)
        self.conv_last = head(2 * width, 64, num_class)
        self.conv_last_middle = head(width, 2 * width, num_class)
        self.conv_last_deepest = head(width, 2 * width, num_class)
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        spatial, middle, deepest = features[-3:]
        (mean,) = self.pools(deepest, tile)
        context = self.refine_deepest(deepest) + self.tail(mean)
        upper = self.smooth_deepest(resize(context, middle.shape[2:]))
        context = self.refine_middle(middle) + upper
        lower = self.smooth_middle(resize(context, spatial.shape[2:]))
        main = self.conv_last(self.fuse(spatial, lower))
        if not self.training:
            return (main,)
        return main, self.conv_last_middle(lower), self.conv_last_deepest(upper)
