"""Winograd convolution: 3x3 with fewer multiplications, for prediction on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.matrices import is_plain
from mit_semseg.models.layers import replace_modules
from mit_semseg.models.pyramid import PyramidConv2d, Tile, convolve_coarser

# With fewer channels, the transforms take more time than is saved.
_MIN_CHANNELS = 256
# Bytes of transformed input in memory at a time, limited for the cache.
_BLOCK = 32 << 20
# Maximum ratio of computed to needed pixels.
_MAX_TILED = 1.5
# F(2x2, 3x3) of the paper: filters become G g G^T. The entries of the other two matrices are 0, 1
# and -1; `_differences` and `_sums` apply them.
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def use_winograd(module: nn.Module) -> None:
    """Replaces wide 3x3 convolutions of a module that runs on a CPU, in place.

    Those with stride 1, one group, `padding == dilation` and at least 256 input and output
    channels; of a `PyramidConv2d`, the part that reads the finest map.

    Args:
        module: for prediction only; its weights must not change afterwards.
    """
    new: dict[nn.Module, nn.Module] = {}
    done = {layer.conv for layer in module.modules() if isinstance(layer, WinogradConv2d)}
    for layer in module.modules():
        if layer in done:
            continue
        if type(layer) is PyramidConv2d and _fits(layer, layer.fine_channels):
            new[layer] = WinogradPyramidConv2d(layer)
        elif type(layer) is nn.Conv2d and _fits(layer, layer.in_channels):
            new[layer] = WinogradConv2d(layer)
    replace_modules(module, new)


def _fits(conv: nn.Conv2d, channels: int) -> bool:
    return (
        min(channels, conv.out_channels) >= _MIN_CHANNELS
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.padding == conv.dilation
        and conv.dilation[0] == conv.dilation[1]
    )


class WinogradConv2d(nn.Module):
    """A 3x3 convolution by Winograd's minimal filtering, F(2x2, 3x3).

    It needs 4 multiplications per output pixel and pair of channels instead of 9, in 16 matrix
    products, and is 1.2 to 2.2 times as fast as oneDNN's kernels on a CPU, more so for wider
    layers. Results differ by rounding: in bfloat16 the mean error is about five times that of
    direct convolution.

    Paper: Lavin & Gray 2015, arXiv:1509.09308, sec. 4.1. A convolution with dilation d is an
    undilated one on each of d x d subgrids, which contain every d-th pixel.
    """

    def __init__(self, conv: nn.Conv2d, channels: int | None = None) -> None:
        """Transforms the filters of a convolution.

        Args:
            conv: the convolution, also used where this form cannot be: compiled or traced.
            channels: number of its input channels to use; None: all.
        """
        super().__init__()
        self.conv = conv
        self.register_buffer("filters", _transformed(conv.weight[:, :channels]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W)."""
        y: Tensor = self.convolve(x) if self.pays(x) else self.conv(x)
        return y

    def pays(self, x: Tensor) -> bool:
        """Whether x is a plain tensor and large enough compared with the tiles."""
        if not is_plain(x):
            return False
        side = 2 * int(self.conv.dilation[0])
        H, W = x.shape[2:]
        tiled = math.ceil(H / side) * math.ceil(W / side) * side**2
        return tiled <= _MAX_TILED * H * W

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution in this form, even if it does not pay."""
        y = _convolve(x, self.get_buffer("filters"), int(self.conv.dilation[0]))
        return y if self.conv.bias is None else y.add_(self.conv.bias[:, None, None])


class WinogradPyramidConv2d(WinogradConv2d):
    """`PyramidConv2d` that convolves the finest map as `WinogradConv2d`."""

    def __init__(self, conv: PyramidConv2d) -> None:
        super().__init__(conv, conv.fine_channels)

    def forward(  # type: ignore[override]
        self, x: Tensor, coarser: Sequence[Tensor] = (), tile: Tile | None = None
    ) -> Tensor:
        """As `PyramidConv2d.forward`."""
        if not self.pays(x):
            y: Tensor = self.conv(x, coarser, tile)
            return y
        y = self.convolve(x)
        weight = self.conv.weight[:, x.shape[1] :]
        return y + convolve_coarser(coarser, weight, y, tile).to(y.dtype) if coarser else y


@torch.no_grad()
def _transformed(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (16, C, K), in the same dtype."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    G = torch.tensor(_G).to(wide)
    filters = torch.einsum("ai,kcij,bj->abck", G, wide, G)
    return filters.flatten(0, 1).to(weight.dtype).contiguous()


def _convolve(x: Tensor, filters: Tensor, dilation: int) -> Tensor:
    """Convolution with padding `dilation`, (N, C, H, W) -> (N, K, H, W) in channels last.

    Args:
        x: the input.
        filters: (16, C, K), from `_transformed`.
        dilation: dilation in pixels.
    """
    N, C, H, W = x.shape
    d, K = dilation, filters.shape[2]
    # 2 x 2 pixels of each of the d x d subgrids are computed from 4 x 4.
    down, across = -(-H // (2 * d)), -(-W // (2 * d))
    bottom, right = d * (2 * down + 1) - H, d * (2 * across + 1) - W
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, d, right, d, bottom))
    padded = padded.unflatten(2, (-1, d)).unflatten(1, (-1, d))  # (N, h, d, w, d, C)
    out = x.new_empty(N, down, 2, d, across, 2, d, K)
    step = max(1, _BLOCK // (16 * N * across * d * d * C * x.element_size()))
    for start in range(0, down, step):
        count = min(step, down - start)
        tiles = x.new_empty(4, 4, N, count, d, across, d, C)
        rows = [padded[:, 2 * start + i :][:, : 2 * count : 2] for i in range(4)]
        for place, row in zip(tiles, _differences(rows)):
            columns = [row[:, :, :, j:][:, :, :, : 2 * across : 2] for j in range(4)]
            _differences(columns, list(place))
        products = torch.bmm(tiles.view(16, -1, C), filters).view(4, 4, N, count, d, across, d, K)
        for i, row in enumerate(_sums(list(products))):
            target = out[:, start : start + count, i]
            _sums(list(row), [target[:, :, :, :, 0], target[:, :, :, :, 1]])
    out = out.view(N, 2 * down * d, 2 * across * d, K)[:, :H, :W]
    return out.permute(0, 3, 1, 2)


def _differences(x: Sequence[Tensor], out: Sequence[Tensor | None] = (None,) * 4) -> list[Tensor]:
    """The product of B^T in the paper and four inputs."""
    return [
        torch.sub(x[0], x[2], out=out[0]),
        torch.add(x[1], x[2], out=out[1]),
        torch.sub(x[2], x[1], out=out[2]),
        torch.sub(x[1], x[3], out=out[3]),
    ]


def _sums(x: Sequence[Tensor], out: Sequence[Tensor | None] = (None, None)) -> list[Tensor]:
    """The product of A^T in the paper and four products."""
    return [
        torch.add(x[0] + x[1], x[2], out=out[0]),
        torch.sub(x[1] - x[2], x[3], out=out[1]),
    ]
