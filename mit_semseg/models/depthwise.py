"""Depthwise convolution that avoids slow kernels, on the CPU and on GPUs."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution; (rows, columns) each."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def extent(self, kernel: torch.Size) -> tuple[int, int]:
        """Distance between the first and last element of the dilated kernel, in pixels."""
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, kernel))
        return rows, columns


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one filter per channel; the same parameters, state dict and results.

    oneDNN has no fast backward kernels for dilated or strided depthwise convolutions, nor for
    kernels larger than 3x3: the gradient of one dilated bfloat16 layer takes as long as hundreds of
    its forward passes. So on the CPU both gradients are computed with other, fast kernels. On a GPU
    dilated convolutions are computed in contiguous memory. On other devices, and on the CPU without
    gradients, this is `nn.Conv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and self.groups == self.in_channels and self.dilation != (1, 1):
            return contiguous_conv2d(self, x)
        if not self._uses_own_gradient(x):
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

    def _uses_own_gradient(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.ndim != 4 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        geometry = self._geometry()
        extent = geometry.extent(self.weight.shape[2:])
        return self.groups == self.in_channels == self.out_channels and all(
            p <= e for p, e in zip(geometry.padding, extent)
        )


class DepthwiseConv2dSame(DepthwiseConv2d):
    """`DepthwiseConv2d` with TensorFlow's "SAME" padding: output sides are ceil(side / stride).

    If the padding is odd, there is one more pixel on the right and bottom. `padding` of the layer
    must be 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        geometry = self._geometry()
        extents = geometry.extent(self.weight.shape[2:])
        borders: list[int] = []
        for side, stride, extent in zip(x.shape[2:], geometry.stride, extents):
            missing = max((-(-side // stride) - 1) * stride + extent + 1 - side, 0)
            borders = [missing // 2, missing - missing // 2, *borders]
        return super().forward(F.pad(x, borders) if any(borders) else x)


def contiguous_conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A depthwise convolution in contiguous memory; the result has the memory format of x.

    In channels last, cuDNN uses its direct kernel for grouped convolutions, which takes a
    millisecond for a dilated one on an H200; for contiguous tensors torch uses its own depthwise
    kernel. Input and weight must both be contiguous; the strides of a weight with one input
    channel are ambiguous, so it is rebuilt.
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
    """The transposed convolution, as a plain one with the flipped kernel.

    With a stride, torch's float32 kernel is fast if it knows the memory format of x.
    """
    stride, padding, dilation = geometry
    if stride != (1, 1):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        like_x = torch.empty_like(x, dtype=dtype)  # only its shape and strides are used
        wide = _convolution_backward(grad.to(dtype), like_x, weight.to(dtype), geometry, "input")
        return wide.to(weight.dtype)
    border = [e - p for e, p in zip(geometry.extent(weight.shape[2:]), padding)]
    return F.conv2d(grad, weight.flip(2, 3), None, 1, border, dilation, groups=x.shape[1])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Correlation of the input and the output gradient.

    A convolution with dilation d is an undilated one on each of d x d subgrids, which contain
    every d-th pixel. The subgrids become images of a larger batch, for which there is a fast
    kernel. A kernel larger than 3x3 is composed of parts of 3x3.
    """
    stride, padding, dilation = geometry
    if dilation != (1, 1) and stride == (1, 1):
        height, width = (-(-n // d) * d for n, d in zip(grad.shape[2:], dilation))
        extent = geometry.extent(weight.shape[2:])
        grad = _subgrids(grad, (0, 0), (height, width), dilation)
        x = _subgrids(x, padding, (height + extent[0], width + extent[1]), dilation)
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
    """torch's gradient with respect to "input" or "weight"."""
    mask = (want == "input", want == "weight", False)
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, False, (0, 0), weight.shape[0], mask
    )
    out: Tensor = gradients[0 if want == "input" else 1]
    return out


def _subgrids(
    x: Tensor, before: tuple[int, int], size: tuple[int, int], step: tuple[int, int]
) -> Tensor:
    """The subgrids of every `step`-th pixel of the zero-padded x, as images of a batch.

    Args:
        x: (N, C, H, W).
        before: zeros above and to the left.
        size: height and width after padding, multiples of `step`.
        step: distance between neighbouring pixels of a subgrid, (rows, columns).

    Returns:
        (N * step[0] * step[1], C, size[0] / step[0], size[1] / step[1]), channels_last.
    """
    N, C, H, W = x.shape
    rows, columns = size[0] // step[0], size[1] // step[1]
    images = x.new_zeros(N, step[0], step[1], rows, columns, C)
    pixels = x.permute(0, 2, 3, 1)  # (N, H, W, C): the channels of a pixel are contiguous
    for i in range(step[0]):
        for j in range(step[1]):
            # First pixel of x on this subgrid, and its position there.
            y, x0 = (i - before[0]) % step[0], (j - before[1]) % step[1]
            grid = pixels[:, y :: step[0], x0 :: step[1]]
            top, left = (y + before[0]) // step[0], (x0 + before[1]) // step[1]
            images[:, i, j, top : top + grid.shape[1], left : left + grid.shape[2]] = grid
    return images.flatten(0, 2).permute(0, 3, 1, 2)
