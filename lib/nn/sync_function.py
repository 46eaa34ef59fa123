"""Autograd functions of synchronised batch normalisation.

A layer consists of three nodes, so that replicas exchange only a few vectors of C values in either
direction, and every node makes a single pass over the activations:

    x --> LocalMoments --token--> Normalize --> y
               \\                  /
                `--> MergeMoments-'            (one node for all replicas)

Forward: mean and variance of each replica; their merge; normalisation. Backward: `Normalize`
returns the sums of g and of g * (x - mean) of its replica, `MergeMoments` converts them to means
over all replicas and processes, `LocalMoments` computes the input gradient. The "gradients" between
these nodes are these sums and means; only the three nodes together are the derivative. No node
blocks in backward, so one thread can run the backward pass of all replicas, as on the CPU.

Moments are merged as in Chan, Golub & LeVeque 1979 (STAN-CS-79-773), with sums around the mean,
because E[x^2] - E[x]^2 suffers from cancellation.

Nothing here synchronises with the device. The host knows the sizes of replicas; the counts of the
ranks of a process group stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Statistics:
    """Statistics of the whole batch for the replicas on one device, for one call of a layer.

    Args:
        moments: mean and biased variance of the whole batch, (2, C).
        count: values per channel in the whole batch, 0-dim float64; on the CPU if the host knows
            it, so that kernels use it as a number, otherwise on the device of the moments.
        eps: added to `var` under the square root; positive.
        clamp: the variance is max(var, eps), not var + eps.

    Attributes:
        mean: mean of the whole batch, (C,).
        biased_var: biased variance of the whole batch, (C,).
        var: `biased_var`; with `clamp` its excess over eps, so that var + eps = max(var, eps).
        free: where the variance was not clamped, (C,) bool; None: everywhere.
        invstd: 1 / sqrt(var + eps), (C,).
        weight: weight of the layer, in the dtype of the mean; set by `Normalize` for backward.
    """

    def __init__(self, moments: Tensor, count: Tensor, eps: float, clamp: bool) -> None:
        self.mean, self.biased_var = moments.unbind(0)
        self.count = count
        self.var = self.biased_var
        self.eps = eps
        self.free: Tensor | None = None
        if clamp:
            # A clamped variance is constant: it has no gradient.
            self.free = self.var >= eps
            self.var = (self.var - eps).clamp(min=0)
        self.invstd = torch.rsqrt(self.var + self.eps)
        self.weight: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """Factor of the centred values, (C,)."""
        return self.invstd if self.weight is None else self.invstd * self.weight

    @property
    def unbiased_var(self) -> Tensor:
        """The variance for the running statistics, (C,)."""
        return self.biased_var * (self.count / (self.count - 1))


def local_moments(x: Tensor) -> Tensor:
    """Mean and biased variance per channel, (2, C); float32 for half precisions."""
    channels = x.shape[1]
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not x.numel():
        return x.new_zeros(2, channels, dtype=torch.float32 if half else x.dtype)
    # The results have the dtype of the running statistics, which are otherwise unused.
    dummy = x.new_zeros(channels, dtype=torch.float32) if half else None
    return torch.stack(torch.batch_norm_update_stats(x, dummy, dummy, 0.0))


def merge_replicas(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Mean and biased variance of concatenated batches, (2, C) each, of sizes that are known."""
    merged, total = parts[0], counts[0]
    for part, count in zip(parts[1:], counts[1:], strict=True):
        total += count
        weight = count / max(1, total)
        difference = part[0] - merged[0]
        # Means and variances are averaged with the same weights; a difference of the means adds to
        # the variance. Not a matrix product, which autocast would compute in half precision.
        merged = torch.lerp(merged, part, weight)
        merged[1].addcmul_(difference, difference, value=weight * (1 - weight))
    return merged


def merge_ranks(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of concatenated batches whose sizes are on the device.

    Args:
        gathered: (N, 2 C + 1) float64: means, variances and number of values of each batch.

    Returns:
        (moments (2, C), 0-dim number of values), both float64.
    """
    count = gathered[:, -1].sum()
    means, variances = gathered[:, :-1].unflatten(1, (2, -1)).unbind(1)
    weights = (gathered[:, -1] / count.clamp(min=1)).unsqueeze(1)
    # Relative to the first mean, so that the mean of equal means is exact.
    mean = means[0] + ((means - means[0]) * weights).sum(0)
    variance = ((variances + (means - mean).square()) * weights).sum(0)
    return torch.stack([mean, variance]), count


class LocalMoments(Function):
    """x -> (x, its moments); backward computes the gradient of x from the merged means."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Statistics]) -> tuple[Tensor, Tensor]:
        """`found` is filled with the merged statistics before backward."""
        ctx.found = found
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.view_as(x), local_moments(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, means: Tensor | None) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if means is None:
            return None, None  # no replica's output was used
        g = torch.zeros_like(x) if g is None else g
        return _input_gradient(g, x, means, ctx.found[0]), None


class MergeMoments(Function):
    """Merges the moments of all replicas; backward merges the sums of their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: Sequence[int],
        group: dist.ProcessGroup | None,
        eps: float,
        clamp: bool,
        found: list[Statistics],
        *moments: Tensor,
    ) -> tuple[Tensor, ...]:
        """Fills `found` with the statistics for each replica, shared by those on one device.

        Raises:
            ValueError: all batches together have fewer than two values per channel.
        """
        home = moments[0].device
        merged = merge_replicas([part.to(home) for part in moments], counts)
        total = sum(counts)
        count = torch.full((), total, dtype=torch.float64, device="cpu")
        if group is not None:
            merged, count = _merge_processes(merged, total, group)
            # The total can be too small only if this process's part is: synchronise only then.
            if total <= 1:
                total = int(count)
        if total <= 1:
            raise ValueError("Expected more than 1 value per channel when training")
        on_device = {
            device: Statistics(
                merged.to(device),
                count if count.device.type == "cpu" else count.to(device),
                eps,
                clamp,
            )
            for device in dict.fromkeys(part.device for part in moments)
        }
        found.extend(on_device[part.device] for part in moments)
        ctx.group, ctx.count = group, count
        ctx.devices = [part.device for part in moments]
        ctx.set_materialize_grads(False)
        # Only the graph is wanted of these: the numbers are in `found`.
        return tuple(torch.empty_like(part) for part in moments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *sums: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = [part.to(ctx.devices[0]) for part in sums if part is not None]
        means = reduce(torch.add, parts) / ctx.count
        if ctx.group is not None:
            dist.all_reduce(means, group=ctx.group)
        return (None,) * 5 + tuple(means.to(device) for device in ctx.devices)


def _merge_processes(merged: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Merges the moments of all processes, in float64, which represents counts exactly."""
    packed = torch.cat(
        [merged.double().flatten(), merged.new_full((1,), count, dtype=torch.float64)]
    )
    # Flat, because gloo requires the part of each rank to have the shape of the input.
    gathered = packed.new_empty(dist.get_world_size(group) * len(packed))
    _all_gather(gathered, packed, group)
    moments, total = merge_ranks(gathered.view(-1, len(packed)))
    return moments.to(merged.dtype), total


def _all_gather(gathered: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    # Renamed in torch 2.14.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(gathered, own, group=group)


class Normalize(Function):
    """(x, tie, weight, bias) -> y; backward computes the sums of g and g * (x - mean).

    `tie` connects the graph to `MergeMoments`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tie: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
    ) -> Tensor:
        ctx.statistics = s = statistics
        # The weight is saved so that autograd detects changes before backward.
        ctx.save_for_backward(x, weight)
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        # The CPU kernel does not accept half-precision parameters with float32 statistics.
        weight, bias = (None if p is None else p.detach().to(s.mean.dtype) for p in (weight, bias))
        s.weight = weight
        if x.is_cuda and x.numel():
            return torch.batch_norm_elemt(x, weight, bias, s.mean, s.invstd, s.eps)
        return F.batch_norm(x, s.mean, s.var, weight, bias, False, 0.0, s.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        g = g.contiguous(memory_format=memory_format(x))  # as the kernels require
        s: Statistics = ctx.statistics
        sum_g, sum_g_centred = _gradient_sums(g, x, s)
        needs_x, needs_sums, needs_weight, needs_bias, _ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            g if needs_x else None,
            torch.stack([sum_g, sum_g_centred]) if needs_sums else None,
            (sum_g_centred * s.invstd).to(weight_dtype) if needs_weight else None,
            sum_g.to(bias_dtype) if needs_bias else None,
            None,
        )


def _gradient_sums(g: Tensor, x: Tensor, s: Statistics) -> tuple[Tensor, Tensor]:
    """Sums of g and of g * (x - mean) per channel of one replica, each (C,)."""
    if not x.numel():
        return torch.zeros_like(s.mean), torch.zeros_like(s.mean)
    if x.is_cuda:
        sum_g, sum_g_centred, _, _ = torch.batch_norm_backward_reduce(
            g, x, s.mean, s.invstd, s.weight, True, False, False
        )
        return sum_g, sum_g_centred
    # The parameter gradients of batch norm in evaluation mode are the two sums, in one fused pass.
    _, sum_g_xhat, sum_g = torch.ops.aten.native_batch_norm_backward(
        g, x, s.weight, s.mean, s.var, None, None, False, s.eps, [False, True, True]
    )
    return sum_g, sum_g_xhat / s.invstd


def _input_gradient(g: Tensor, x: Tensor, means: Tensor, s: Statistics) -> Tensor:
    """w / std * (g - mean(g) - xhat * mean(g * xhat)).

    Args:
        g, x: output gradient and input of one replica.
        means: means of g and of g * (x - mean) over the whole batch, (2, C).
        s: statistics of the whole batch.
    """
    if not x.numel():
        return torch.zeros_like(x)
    mean_g, mean_g_centred = means.unbind(0)
    if s.free is not None:
        mean_g_centred = mean_g_centred * s.free
    if x.is_cuda:
        # The kernel divides by the sum of the given counts (int32); the means are already divided.
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            g, x, s.mean, s.invstd, s.weight, mean_g, mean_g_centred, one
        )
    scale = s.scale
    # Two fused passes: an affine function of x, with the batch norm kernel, then the term in g.
    shift, slope = -scale * mean_g, -scale * s.invstd * mean_g_centred
    affine = F.batch_norm(x, s.mean, s.var, slope, shift, False, 0.0, s.eps)
    return affine.addcmul_(g, scale.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2)))


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of x: channels last if it is, otherwise contiguous."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format
