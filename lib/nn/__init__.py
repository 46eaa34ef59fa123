"""Replicas of a module on several devices, and batch normalisation across them."""

from .batchnorm import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d
from .data_parallel import (
    DataParallelWithCallback,
    UserScatteredDataParallel,
    patch_replication_callback,
)
from .transfer import async_copy_to, user_scattered_collate

__all__ = [
    "DataParallelWithCallback",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "UserScatteredDataParallel",
    "async_copy_to",
    "patch_replication_callback",
    "user_scattered_collate",
]
