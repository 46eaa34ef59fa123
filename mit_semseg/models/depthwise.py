"""Depthwise convolution by way of kernels that are fast, on the CPU and on a GPU."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Geometry(NamedTuple):
    """How a filter moves over an image; (rows, columns) each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def reach(self, kernel: torch.Size) -> tuple[int, int]:
        """Distance from a filter's first to its last entry, in pixels."""
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, kernel))
        return rows, columns


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one filter a channel; the same parameters, state dict and results.

    oneDNN has no fast backward kernels for dilated or strided depthwise convolutions, nor for
    filters larger than 3x3: the gradient of one dilated bfloat16 layer costs hundreds of its
    forward passes. Both gradients are therefore put in terms of kernels that are fast. On a GPU
    dilated ones are computed in contiguous memory. Elsewhere, and on the CPU when no gradient is
    wanted, this is `nn.Conv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and self.groups == self.in_channels and self.dilation != (1, 1):
            return planar_conv2d(self, x)
        if not self._worth_it(x):
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        out: Tensor = _Depthwise.apply(x, weight, bias, self._geometry())
        return out

    def _geometry(self) -> Geometry:
        pairs = (tuple(map(int, pair)) for pair in (self.stride, self.padding, self.dilation))
        return Geometry(*pairs)  # type: ignore[arg-type]

    def _worth_it(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.ndim != 4 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        geometry = self._geometry()
        reach = geometry.reach(self.weight.shape[2:])
        return self.groups == self.in_channels == self.out_channels and all(
            p <= r for p, r in zip(geometry.padding, reach)
        )


class DepthwiseConv2dSame(DepthwiseConv2d):
    """With the padding "SAME" of TensorFlow: just enough for sides / stride, rounded up.

    Where that is an odd number of pixels, there is one more at the right and bottom. `padding` of
    the layer is 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        geometry = self._geometry()
        reaches = geometry.reach(self.weight.shape[2:])
        borders: list[int] = []
        for side, stride, reach in zip(x.shape[2:], geometry.stride, reaches):
            missing = max((-(-side // stride) - 1) * stride + reach + 1 - side, 0)
            borders = [missing // 2, missing - missing // 2, *borders]
        return super().forward(F.pad(x, borders) if any(borders) else x)


def planar_conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A depthwise convolution in contiguous memory; the result is laid out as x is.

    Channels last, cuDNN takes its direct kernel for grouped convolutions, a millisecond a call for
    dilated ones on an H200; contiguous, torch takes its own depthwise kernel. Both the map and the
    filters have to be so: a filter of one channel may be taken for either layout by its strides.
    """
    weight = layer.weight.flatten().view(layer.weight.shape)
    y = layer._conv_forward(x.contiguous(), weight, layer.bias)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last) if last else y


class _Depthwise(torch.autograd.Function):
    """(N, C, H, W) with (C, 1, k, k) and (C,) or None -> (N, C, H', W')."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, weight, bias, *geometry, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = _input_gradient(grad, x, weight, ctx.geometry)
            if ctx.needs_input_grad[1]:
                grad_weight = _weight_gradient(grad, x, weight, ctx.geometry)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The transposed convolution, as a plain one with the flipped filter.

    Where it is strided, torch's own kernel for float32 is the fast one, if it is told the layout.
    """
    stride, padding, dilation = geometry
    if stride != (1, 1):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        like_x = torch.empty_like(x, dtype=dtype)  # its shape and layout are read
        wide = _convolution_backward(grad.to(dtype), like_x, weight.to(dtype), geometry, "input")
        return wide.to(weight.dtype)
    border = [r - p for r, p in zip(geometry.reach(weight.shape[2:]), padding)]
    return F.conv2d(grad, weight.flip(2, 3), None, 1, border, dilation, groups=x.shape[1])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Correlation of input and output gradient.

    A convolution dilated by d is an ordinary one on each of the d x d grids of every d-th pixel:
    those grids become images of a larger batch, for which the fast kernel exists. A filter larger
    than 3x3 is put together from parts of 3x3.
    """
    stride, padding, dilation = geometry
    if dilation != (1, 1) and stride == (1, 1):
        height, width = (-(-n // d) * d for n, d in zip(grad.shape[2:], dilation))
        reach = geometry.reach(weight.shape[2:])
        grad = _grids(grad, (0, 0), (height, width), dilation)
        x = _grids(x, padding, (height + reach[0], width + reach[1]), dilation)
        geometry = Geometry(stride, padding=(0, 0), dilation=(1, 1))
    if max(weight.shape[2:]) <= 3 or geometry.dilation != (1, 1):
        return _convolution_backward(grad, x, weight, geometry, "weight")
    x = F.pad(x, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2)
    parts = [
        [slice(i, i + min(k, 3)) for i in (*range(0, k - 3, 3), max(k - 3, 0))]
        for k in weight.shape[2:]
    ]
    result = torch.empty_like(weight)
    geometry = Geometry(stride, padding=(0, 0), dilation=(1, 1))
    for rows, columns in itertools.product(*parts):
        seen = [
            slice(part.start, part.stop + s * (n - 1))
            for part, s, n in zip((rows, columns), stride, grad.shape[2:])
        ]
        part = weight[:, :, rows, columns]
        result[:, :, rows, columns] = _convolution_backward(
            grad, x[:, :, seen[0], seen[1]], part, geometry, "weight"
        )
    return result


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, want: str
) -> Tensor:
    """torch's own gradient with respect to "input" or "weight"."""
    mask = (want == "input", want == "weight", False)
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, False, (0, 0), weight.shape[0], mask
    )
    out: Tensor = gradients[0 if want == "input" else 1]
    return out


def _grids(
    x: Tensor, before: tuple[int, int], size: tuple[int, int], step: tuple[int, int]
) -> Tensor:
    """Every `step`-th pixel of the zero-padded x as images of their own.

    Args:
        x: (N, C, H, W).
        before: zeros above and to the left.
        size: height and width after padding, multiples of `step`.
        step: distance (rows, columns) of the pixels of one grid.

    Returns:
        (N * step[0] * step[1], C, size[0] / step[0], size[1] / step[1]), channels_last.
    """
    N, C, H, W = x.shape
    rows, columns = size[0] // step[0], size[1] // step[1]
    images = x.new_zeros(N, step[0], step[1], rows, columns, C)
    pixels = x.permute(0, 2, 3, 1)  # (N, H, W, C): a pixel's channels are copied in one piece
    for i in range(step[0]):
        for j in range(step[1]):
            # First pixel of x on this grid, and where it stands on it.
            y, x0 = (i - before[0]) % step[0], (j - before[1]) % step[1]
            grid = pixels[:, y :: step[0], x0 :: step[1]]
            top, left = (y + before[0]) // step[0], (x0 + before[1]) // step[1]
            images[:, i, j, top : top + grid.shape[1], left : left + grid.shape[2]] = grid
    return images.flatten(0, 2).permute(0, 3, 1, 2)
