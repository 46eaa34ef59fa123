"""ICNet: cascade feature fusion of branches at three resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights
from mit_semseg.models.layers import conv_bn, conv_bn_relu, resize
from mit_semseg.models.pyramid import Tile, resize_within


class CascadeFusion(nn.Module):
    """The sum of a coarse map, resized and convolved, and of a projected finer map.

    Paper: Zhao et al. 2018, arXiv:1704.08545, sec. 3.3 and fig. 3.
    """

    def __init__(self, coarse: int, fine: int, width: int) -> None:
        super().__init__()
        self.coarse = conv_bn(coarse, width, dilation=2)
        self.fine = conv_bn(fine, width, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        """The resized coarse map, for its auxiliary head, and the fused map."""
        coarse = resize(coarse, fine.shape[2:])
        return coarse, self.relu(self.coarse(coarse) + self.fine(fine))


@DECODERS.register("icnet")
class ICNet(Decoder):
    """Pyramid pooling on the quarter-size branch, then two fusions with the finer branches.

    Scores are at stride 4. Auxiliary heads: on the coarse inputs of the second and of the first
    fusion, with the published weights 0.4 and 0.16.

    Paper: Zhao et al. 2018, arXiv:1704.08545, sec. 3.2 to 3.4 (loss: eq. 1). As in the published
    model, pools are added to their input, not concatenated with it.

    Deviations:
        - Auxiliary scores are resized to the label; the paper resizes the label to 1/16 and 1/8 of
          the image.
        - Maps and scores are resized with `align_corners=False`; the published model has True.
        - Pooling cells are as large as needed to cover the map; those of the published model are
          larger where there are 3 or 6 along a side, and overlap.
        - BatchNorm's momentum is 0.1; in the published model it is 0.05.
    """

    min_feature_maps = 3
    supported_encoders = ("icnet_resnet50",)
    auxiliary = (Auxiliary(weight=0.4), Auxiliary(weight=0.16))

    def __init__(
        self, channels: Sequence[int], num_class: int = 150, width: int = 128, **options: Any
    ) -> None:
        super().__init__(channels, num_class, **options)
        full, half, quarter = channels[-3:]
        self.pool_scales = (1, 2, 3, 6)
        self.reduce = conv_bn_relu(quarter, 2 * width, 1)
        self.fuse_half = CascadeFusion(2 * width, half, width)
        self.fuse_full = CascadeFusion(width, full, width)
        self.conv_last = nn.Conv2d(width, num_class, 1)
        self.conv_last_half = nn.Conv2d(width, num_class, 1)
        self.conv_last_quarter = nn.Conv2d(2 * width, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        full, half, quarter = features[-3:]
        for pool in self.pools(quarter, tile):
            quarter = quarter + resize_within(pool, quarter.shape[2:], tile)
        coarse, fused_half = self.fuse_half(self.reduce(quarter), half)
        middle, fused_full = self.fuse_full(fused_half, full)
        H, W = full.shape[2:]
        # The 1x1 convolution commutes with the resize, and there are fewer classes than channels.
        main = resize(self.conv_last(fused_full), (2 * H, 2 * W))
        if not self.training:
            return (main,)
        return main, self.conv_last_half(middle), self.conv_last_quarter(coarse)
