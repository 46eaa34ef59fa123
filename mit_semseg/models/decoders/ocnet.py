"""OCNet: object context by attention between pixels; base, pyramid and ASP variants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models.attention import attend_maps
from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.deepsup import DeepSup
from mit_semseg.models.layers import conv_bn_relu


class ObjectContext(nn.Module):
    """Self-attention between the pixels of each block of the map.

    Paper: Yuan et al. 2018, arXiv:1809.00916, sec. 3.2, eq. 1 and 2: queries and keys share one
    projection, scores are divided by the square root of its width.

    Args:
        n_in: input channels.
        n_out: output channels.
        width: channels of keys and values.
        grid: number of blocks along each side of the map.
    """

    def __init__(self, n_in: int, n_out: int, width: int, grid: int = 1) -> None:
        super().__init__()
        self.grid = grid
        self.key = conv_bn_relu(n_in, width, 1)
        self.value = nn.Conv2d(n_in, width, 1)
        self.project = nn.Conv2d(width, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key(x), self.value(x)
        heights, widths = (self._lengths(length) for length in x.shape[2:])
        keys, values = (
            [block for row in t.split(heights, 2) for block in row.split(widths, 3)]
            for t in (key, value)
        )
        context = self._attend(keys, values)
        rows = [context[i : i + len(widths)] for i in range(0, len(context), len(widths))]
        return self.project(torch.cat([torch.cat(row, dim=3) for row in rows], dim=2))

    def _lengths(self, length: int) -> list[int]:
        """Lengths of the blocks along one axis, as equal as possible; at most one per pixel."""
        cuts = sorted({i * length // self.grid for i in range(self.grid + 1)})
        return [b - a for a, b in pairwise(cuts)]

    @staticmethod
    def _attend(keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Attention in all blocks; those of equal size are batched."""
        by_size: dict[torch.Size, list[int]] = {}
        for i, key in enumerate(keys):
            by_size.setdefault(key.shape, []).append(i)
        context = list(values)
        for indices in by_size.values():
            key, value = (torch.cat([t[i] for i in indices]) for t in (keys, values))
            found = attend_maps(key, key, value, scale=key.shape[1] ** -0.5)
            for i, part in zip(indices, found.chunk(len(indices)), strict=True):
                context[i] = part
        return context


class _OCNet(Decoder):
    """An object context module, from the subclass's `_context`, and a classifier.

    Memory is linear in the number of pixels (`models.attention`). If an image is computed in tiles
    (`models.tiles`), attention is computed within each tile.

    Deviations:
        - Scores are resized with `align_corners=False`; the authors' code has True.
        - BatchNorm and ReLU follow a convolution, as in the authors' later code; in their first
          code they are one layer (InPlaceABN) with a leaky ReLU of slope 0.01.
        - Convolutions before a BatchNorm have no bias, which BatchNorm would cancel; theirs have
          one outside the atrous pyramid.
        - The last projection of an attention has He initialisation, so that all layers before it
          learn from the first step on; theirs is initialised with zeros.
    """

    def __init__(
        self, channels: Sequence[int], num_class: int = 150, width: int = 512, **options: Any
    ) -> None:
        super().__init__(channels, num_class, **options)
        self.width = width
        self.context = self._context(channels[-1], width)
        self.conv_last = nn.Conv2d(width, num_class, 1)
        init_weights(self)

    def _context(self, n_in: int, width: int) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must implement _context")

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        return (self.conv_last(self.context(features[-1])),)


class OCNetAuxiliary(DeepSup):
    """Auxiliary head with the channels of the main one, and the authors' dropout."""

    dropout_kind = nn.Dropout2d
    dropout_rate = 0.05
    width: int  # set by _OCNet

    def deepsup_width(self) -> int:
        return self.width


class BaseContext(nn.Module):
    """Concatenation of a map and its object context."""

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.reduce = conv_bn_relu(n_in, width)
        self.attention = ObjectContext(width, width, width // 2)
        self.join = nn.Sequential(conv_bn_relu(2 * width, width, 1), nn.Dropout2d(0.05))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        return self.join(torch.cat([self.attention(x), x], dim=1))


@DECODERS.register("ocnet_base", "ocnet")
class OCNetBase(OCNetAuxiliary, _OCNet):
    """Attention between all pixels, concatenated with the map.

    Paper: Yuan et al. 2018, arXiv:1809.00916, sec. 3.3 (Base-OC).
    """

    def _context(self, n_in: int, width: int) -> nn.Module:
        return BaseContext(n_in, width)


class PyramidContext(nn.Module):
    """Concatenation of a map with more channels and object contexts within several grids."""

    def __init__(self, n_in: int, width: int, grids: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.reduce = conv_bn_relu(n_in, width)
        self.attention = nn.ModuleList(
            ObjectContext(width, width, width // 2, grid) for grid in grids
        )
        joined = len(grids) * width
        self.widen = conv_bn_relu(width, joined, 1)
        self.join = nn.Sequential(conv_bn_relu(2 * joined, width, 1), nn.Dropout2d(0.05))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        contexts = [attention(x) for attention in self.attention]
        return self.join(torch.cat([*contexts, self.widen(x)], dim=1))


@DECODERS.register("ocnet_pyramid")
class OCNetPyramid(OCNetAuxiliary, _OCNet):
    """Attention within 1x1, 2x2, 3x3 and 6x6 blocks of the map, concatenated with it.

    Paper: Yuan et al. 2018, arXiv:1809.00916, sec. 3.3 (Pyramid-OC).

    Deviations:
        - Values have 256 channels, as in the base form; 512 in the authors' code.
        - Blocks have sizes as equal as possible; theirs leave the remainder to the last block.
        - ReLU follows the first convolution and that of the auxiliary head, as in the base form;
          their code of this form has no activation there.
    """

    def _context(self, n_in: int, width: int) -> nn.Module:
        return PyramidContext(n_in, width)


class AtrousContext(nn.Module):
    """Concatenation of object context, a 1x1 and three dilated convolutions."""

    def __init__(self, n_in: int, width: int, dilations: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        self.reduce = conv_bn_relu(n_in, width)
        self.attention = ObjectContext(width, width, width // 2)
        self.project = conv_bn_relu(width, width, 1)
        self.local = conv_bn_relu(n_in, width, 1)
        self.atrous = nn.ModuleList(
            conv_bn_relu(n_in, width, dilation=dilation) for dilation in dilations
        )
        joined = (2 + len(dilations)) * width
        self.join = nn.Sequential(conv_bn_relu(joined, width, 1), nn.Dropout2d(0.1))

    def forward(self, x: Tensor) -> Tensor:
        context = self.project(self.attention(self.reduce(x)))
        branches = [context, self.local(x), *(branch(x) for branch in self.atrous)]
        return self.join(torch.cat(branches, dim=1))


@DECODERS.register("ocnet_asp")
class OCNetASP(OCNetAuxiliary, _OCNet):
    """Atrous spatial pyramid pooling, with object context instead of image pooling.

    Paper: Yuan et al. 2018, arXiv:1809.00916, sec. 3.3 (ASP-OC), with five branches of 512 channels
    on the encoder's map, as in the authors' code of 2018.

    Deviations:
        - In the authors' code of 2019 branches have 256 channels, and read the 512 channels of a
          3x3 convolution.
        - Queries, keys and values are computed for all pixels; in all of their versions for 2x2 max
          pools, with the context upsampled afterwards.
        - Values have half the channels of a branch, as keys do and as in the authors' last code
          (openseg.pytorch); in that of 2018 and 2019 they have all of them.
        - Dilations are the paper's, for output stride 8, at every stride.
    """

    dropout_rate = 0.1

    def _context(self, n_in: int, width: int) -> nn.Module:
        return AtrousContext(n_in, width)
