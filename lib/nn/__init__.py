"""Data parallelism, and batch normalisation synchronised across replicas and processes."""

import importlib
from types import ModuleType

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


def __getattr__(name: str) -> ModuleType:
    # Importing the published package also imported these modules (now in `mit_semseg.compat`).
    if name in ("comm", "modules", "parallel"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
