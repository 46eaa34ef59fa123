"""Depthwise convolution whose backward pass is as fast as its forward pass on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one filter a channel; the same parameters, state dict and results.

    oneDNN has no fast backward kernels for dilated or strided depthwise convolutions: the
    gradient of one dilated bfloat16 layer costs hundreds of its forward passes. Both gradients
    are therefore put in terms of kernels that are fast. Off the CPU, and when no gradient is
    wanted, this is `nn.Conv2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        fast = (
            x.device.type == "cpu"
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and self.bias is None
            and self.groups == self.in_channels == self.out_channels
            and self.padding_mode == "zeros"
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )
        if not fast:
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        stride, padding, dilation = (
            tuple(int(v) for v in pair) for pair in (self.stride, self.padding, self.dilation)
        )
        out: Tensor = _Depthwise.apply(x, weight, stride, padding, dilation)
        return out


class _Depthwise(torch.autograd.Function):
    """(N, C, H, W) with (C, 1, k, k) -> (N, C, H', W')."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        grad_x = grad_weight = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = _input_gradient(grad, weight, x.shape, stride, padding, dilation)
            if ctx.needs_input_grad[1]:
                grad_weight = _weight_gradient(grad, x, weight, stride, padding, dilation)
        return grad_x, grad_weight, None, None, None


def _input_gradient(
    grad: Tensor,
    weight: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The transposed convolution, as a plain one with the flipped filter.

    A strided gradient is first spread out with zeros between its entries.
    """
    channels, kernel = weight.shape[0], weight.shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if stride != (1, 1):
        spread = grad.new_zeros(
            shape[0], channels, *(n + 2 * p - r for n, p, r in zip(shape[2:], padding, reach))
        ).contiguous(memory_format=torch.channels_last)
        spread[:, :, :: stride[0], :: stride[1]] = grad
        grad = spread
    border = [r - p for r, p in zip(reach, padding)]
    return F.conv2d(grad, weight.flip(2, 3), None, 1, border, dilation, groups=channels)


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Correlation of input and output gradient.

    A convolution dilated by d is an ordinary one on each of the d x d grids of every d-th pixel:
    those grids become images of a larger batch, for which the fast kernel exists.
    """
    if dilation != (1, 1) and stride == (1, 1):
        height, width = (-(-n // d) * d for n, d in zip(grad.shape[2:], dilation))
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        grad = _grids(grad, (0, 0), (height, width), dilation)
        x = _grids(x, padding, (height + reach[0], width + reach[1]), dilation)
        padding, dilation = (0, 0), (1, 1)
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        x.shape[1],
        (False, True, False),
    )
    return grad_weight


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
    right, below = size[1] - W - before[1], size[0] - H - before[0]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, before[1], right, before[0], below))
    cells = padded.reshape(N, size[0] // step[0], step[0], size[1] // step[1], step[1], C)
    images = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).contiguous()
    return images.permute(0, 3, 1, 2)
