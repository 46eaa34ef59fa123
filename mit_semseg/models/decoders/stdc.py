"""STDC-Seg: BiSeNet's head without a spatial path, whose task a detail loss takes over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mit_semseg.losses import boundary, functional
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, init_weights
from mit_semseg.models.decoders.bisenet import BiSeNet, FeatureFusion, head
from mit_semseg.models.pyramid import Tile


@DECODERS.register("stdc")
class STDC(BiSeNet):
    """Context of the two deepest maps, fused with the map before them, of stride 8.

    Auxiliary heads: on the context after each refinement, weight 1 as published; and one that finds
    details on the map of stride 8, with the binary cross entropy and Dice of `losses.boundary`.

    Paper: Fan et al. 2021, arXiv:2104.13188, sec. 3.2 and 3.3. Widths of heads are as in the
    authors' code.

    Deviations:
        - In the detail of a label, ignored pixels and what is beyond the image have no edge, and
          ignored pixels do not count; in the authors' code both have edges and count.
        - The weights that join the details of three scales are those they begin with in the
          authors' code, where they are parameters without a gradient.
    """

    supported_encoders = ()
    auxiliary = (
        *BiSeNet.auxiliary,
        Auxiliary(weight=1.0, loss=boundary.detail, denominator=functional.denominator),
    )

    def __init__(
        self, channels: Sequence[int], num_class: int = 150, width: int = 128, **options: Any
    ) -> None:
        super().__init__(channels, num_class, width, **options)
        fused = 2 * width
        self.fuse = FeatureFusion(channels[-3] + width, fused, reduction=4)
        self.conv_last = head(fused, 256, num_class)
        self.conv_last_middle = head(width, 64, num_class)
        self.conv_last_deepest = head(width, 64, num_class)
        self.detail = head(channels[-3], 64, 1)
        init_weights(self)

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        heads = super().logits(features, tile)
        return (*heads, self.detail(features[-3])) if self.training else heads
