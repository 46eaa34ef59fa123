"""Hamburger: global context as a matrix factorisation of the feature map, between two layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.layers import resize
from mit_semseg.models.pyramid import without_autocast


class NonnegativeFactorisation(nn.Module):
    """A map, not negative, as the product of few bases and the share each pixel has of them.

    Bases and shares are found by multiplicative updates, through which gradients flow.

    Paper: Geng et al. 2021, arXiv:2109.04553, sec. 2.2 (NMF).
    """

    bases: Tensor

    def __init__(self, width: int, rank: int = 16) -> None:
        super().__init__()
        # Numbers that look random, the same at every start and on the meta device.
        noise = (torch.arange(width * rank, dtype=torch.float64).sin() * 43758.5453) % 1
        bases = F.normalize(noise.view(width, rank), dim=0).float()
        self.register_buffer("bases", bases, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> what is kept of it, of the same shape."""
        steps = 6 if self.training else 7
        with without_autocast(x.device):
            pixels = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)  # (B, D, N)
            bases = self.bases.to(pixels.dtype).expand(len(x), -1, -1)  # (B, D, R)
            shares = (pixels.mT @ bases).softmax(dim=2)  # (B, N, R)
            for _ in range(steps):
                shares = self._shares(pixels, bases, shares)
                wanted, given = pixels @ shares, bases @ (shares.mT @ shares)
                bases = bases * wanted / (given + 1e-6)
            shares = self._shares(pixels, bases, shares)
            return (bases @ shares.mT).view(x.shape).to(x.dtype)

    @staticmethod
    def _shares(pixels: Tensor, bases: Tensor, shares: Tensor) -> Tensor:
        wanted, given = pixels.mT @ bases, shares @ (bases.mT @ bases)
        return shares * wanted / (given + 1e-6)


def conv_gn(n_in: int, n_out: int) -> nn.Sequential:
    """1x1 convolution and GroupNorm."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.GroupNorm(32, n_out))


@DECODERS.register("hamburger")
class Hamburger(Decoder):
    """The last three maps, joined at the finest of them, with the context of a factorisation.

    The width is 256, as of SegNeXt-T and S.

    Paper: Guo et al. 2022, arXiv:2209.08575, sec. 3.2, fig. 3 (c); Geng et al. 2021,
    arXiv:2109.04553. The rank is 16, as in the code of SegNeXt's authors.

    A tile of an image (see `models.tiles`) is factorised by itself.

    Deviations:
        - The bases begin with the same numbers in every pass; in the authors' code with random
          ones, so that two predictions differ.
    """

    min_feature_maps = 3
    width: ClassVar[int] = 256

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        width = self.width
        self.squeeze = conv_gn(sum(channels[-3:]), width)
        self.ham_in = nn.Conv2d(width, width, 1)
        self.ham = NonnegativeFactorisation(width)
        self.ham_out = conv_gn(width, width)
        self.align = conv_gn(width, width)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_last = nn.Conv2d(width, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        size = features[-3].shape[2:]
        x = torch.cat([resize(x, size) for x in features[-3:]], dim=1)
        x = self.squeeze(x).relu()
        x = (x + self.ham_out(self.ham(self.ham_in(x).relu()))).relu()
        x = self.align(x).relu()
        return (self.conv_last(self.dropout(x)),)


@DECODERS.register("hamburger_b")
class HamburgerB(Hamburger):
    """The same with width 512, as of SegNeXt-B."""

    width = 512


@DECODERS.register("hamburger_l")
class HamburgerL(Hamburger):
    """The same with width 1024, as of SegNeXt-L."""

    width = 1024
