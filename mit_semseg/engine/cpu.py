"""CPU cores, compute threads and memory allocator."""

from __future__ import annotations

import ctypes
import os

import torch


def set_threads(count: int) -> None:
    """Set the number of compute threads of torch, at least 1, and turn off those of OpenCV."""
    import cv2

    torch.set_num_threads(max(1, count))
    # Images are decoded in other threads already; OpenCV's own would compete for the cores.
    cv2.setNumThreads(0)


# Compute threads set by `fix_threads`; 0 for one per core.
_fixed_threads = 0


def fix_threads(count: int) -> None:
    """Fix the number of compute threads, also of processes that are started later.

    Raises:
        ValueError: `count` is below 1.
    """
    global _fixed_threads
    if count < 1:
        raise ValueError(f"--threads {count}: give at least 1")
    _fixed_threads = count
    os.environ["OMP_NUM_THREADS"] = str(count)
    set_threads(count)


def fixed_threads() -> int:
    """The number set with `fix_threads`; 0 without it."""
    return _fixed_threads


def keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks instead of returning them to the kernel.

    Training on the CPU allocates the same large tensors in every step; with glibc's defaults each
    of them is mapped and zeroed again, which takes a third of the step. No effect with other C
    libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # parameter numbers in malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def cpu_count() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_each(processes: int = 1) -> int:
    """Cores for each of `processes` processes of this rank, at least 1."""
    return max(1, cpu_count() // (local_ranks() * processes))


def local_ranks() -> int:
    """Number of torchrun's ranks on this machine; 1 outside torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
