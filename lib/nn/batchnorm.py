"""Batch normalisation with statistics over all replicas and processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .exchange import CallbackContext
from .sync_function import LocalMoments, MergeMoments, Normalize, Statistics, memory_format


class _SynchronizedBatchNorm(_BatchNorm):
    """Batch normalisation over the batches of all replicas and processes.

    In training, statistics are synchronised across the replicas of `UserScatteredDataParallel` (or
    `DataParallelWithCallback`), the processes of a `torch.distributed` group, or both: outputs,
    gradients and running statistics are those of the torch layer on the concatenated batch, for
    any sizes. Otherwise it is the torch layer. State dicts are those of the torch layer; internal
    buffers in published checkpoints (`_tmp_running_mean`, `_tmp_running_var`, `_running_iter`) are
    dropped.

    Paper: Peng et al. 2018, "MegDet", arXiv:1711.07240, sec. 3.3; moments are merged as in Chan,
    Golub & LeVeque 1979.

    Args:
        num_features: number of channels C.
        eps: see `eps_mode`.
        momentum: weight of a new batch in the running statistics; None: cumulative average.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics for evaluation.
        device: device of parameters and buffers.
        dtype: dtype of parameters and buffers.
        process_group: processes to synchronise with; None: all, if the default group is
            initialised.
        eps_mode: "add": sqrt(var + eps), as in torch; "clamp": sqrt(max(var, eps)), in synchronised
            training only, as in the published layer.

    Raises:
        ValueError: `eps_mode` has another value; in the forward pass, the input has the wrong
            shape, or all batches together have only one value per channel.
    """

    # Set on replicas, through __data_parallel_replicate__.
    _replica: tuple[CallbackContext, int] | None = None
    # For activation checkpointing: when a pass is recomputed in backward, the other replicas cannot
    # take part. The first pass appends the statistics, the second reads them.
    noted: list[Statistics] | None = None
    given: Iterator[Statistics] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        eps_mode: str = "add",
    ) -> None:
        if eps_mode not in ("add", "clamp"):
            raise ValueError(f"eps_mode = {eps_mode!r}: use 'add' or 'clamp'")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = process_group
        self.eps_mode = eps_mode

    def __data_parallel_replicate__(self, ctx: CallbackContext, copy_id: int) -> None:
        """Stores the context shared with the other replicas."""
        self.__dict__["_replica"] = (ctx, copy_id)  # faster than nn.Module.__setattr__

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `input`, (N, C) or (N, C, ...); same shape and dtype."""
        group = self._live_group()
        if not self.training or (self._replica is None and group is None):
            return super().forward(input)
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels, got input of shape {tuple(input.shape)}"
            )

        x = input.contiguous(memory_format=memory_format(input))
        found: list[Statistics] = []
        token, moments = LocalMoments.apply(x, found)
        if self.given is not None:
            return Normalize.apply(token, moments, self.weight, self.bias, next(self.given))
        count = x.numel() // self.num_features

        def merge(parts: list[tuple[Tensor, int]]) -> list[tuple[Tensor, Statistics]]:
            statistics: list[Statistics] = []
            clamp = self.eps_mode == "clamp"
            counts = [n for _, n in parts]
            ties = MergeMoments.apply(
                counts, group, self.eps, clamp, statistics, *(m for m, _ in parts)
            )
            return list(zip(ties, statistics, strict=True))

        if self._replica is None:
            ((tie, statistics),) = merge([(moments, count)])
        else:
            context, copy_id = self._replica
            tie, statistics = context.exchange(copy_id, (moments, count), merge)
        found.append(statistics)
        if self.noted is not None:
            self.noted.append(statistics)
        if self._replica is None or copy_id == 0:
            self._update_running(statistics)
        return Normalize.apply(token, tie, self.weight, self.bias, statistics)

    def _live_group(self) -> dist.ProcessGroup | None:
        """The process group to synchronise with, if it has several processes."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @torch.no_grad()
    def _update_running(self, statistics: Statistics) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        factor: float | Tensor = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                # On the device of the count, so that the host need not synchronise.
                factor = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        self.running_mean.lerp_(statistics.mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(statistics.unbiased_var.to(self.running_var.dtype), factor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The published layer stored moving averages of its own in the state dict.
        for name in ("_tmp_running_mean", "_tmp_running_var", "_running_iter"):
            state_dict.pop(prefix + name, None)
        if self.num_batches_tracked is not None:
            # Published checkpoints lack the count at any version; keep the current one.
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SynchronizedBatchNorm1d(_SynchronizedBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over all replicas and processes; (N, C) or (N, C, L)."""


class SynchronizedBatchNorm2d(_SynchronizedBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over all replicas and processes; (N, C, H, W)."""


class SynchronizedBatchNorm3d(_SynchronizedBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` over all replicas and processes; (N, C, D, H, W)."""


for _layer in (SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d):
    _layer.__doc__ = f"{_layer.__doc__}\n{(_SynchronizedBatchNorm.__doc__ or '').partition('.')[2]}"
