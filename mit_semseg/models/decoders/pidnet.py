"""PIDNet's heads: two for classes, one for boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mit_semseg.losses import boundary, functional
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights
from mit_semseg.models.decoders.ddrnet import PreActivationHead


@DECODERS.register("pidnet_s", "pidnet_m")
class PIDNet(Decoder):
    """A head on the fused map, at stride 8; in training also on the detail and boundary branches.

    Auxiliary losses: classes on the detail branch, with weight 0.4; boundaries on the boundary
    branch, with weight 20; the main scores at predicted boundaries, with weight 1; as published.
    State dict names are those of the authors' code.

    Paper: Xu et al. 2023, arXiv:2206.02066, sec. 4.4, eq. 9 and 10.

    Deviations:
        - Boundaries of the label are its pixels within two pixels of another class; the authors'
          are found by Canny's detector and widened to about the same four pixels. Ignored pixels
          have none and do not count; in their code they count, and have some.
        - The loss at boundaries is plain cross entropy, whatever loss is configured; theirs is that
          of the main head, with hard pixels only (OHEM).
    """

    min_feature_maps = 3
    supported_encoders: ClassVar[tuple[str, ...]] = ("pidnet_s", "pidnet_m")
    auxiliary = (
        Auxiliary(weight=0.4),
        Auxiliary(weight=20.0, loss=boundary.boundary_bce, denominator=functional.denominator),
        Auxiliary(weight=1.0, loss=boundary.boundary_nll),
    )
    width: ClassVar[int] = 128

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        detail, edges, fused = channels[-3:]
        self.seghead_p = PreActivationHead(detail, self.width, num_class)
        self.seghead_d = PreActivationHead(edges, edges // 2, 1)
        self.final_layer = PreActivationHead(fused, self.width, num_class)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        detail, edges, fused = features[-3:]
        main = self.final_layer(fused)
        if not self.training:
            return (main,)
        boundaries = self.seghead_d(edges)
        both = torch.cat([boundaries.detach(), main], dim=1)
        return main, self.seghead_p(detail), boundaries, both


@DECODERS.register("pidnet_l")
class PIDNetL(PIDNet):
    """PIDNet-L, whose heads have twice the channels."""

    supported_encoders = ("pidnet_l",)
    width = 256
