"""The CPU's cores, compute threads and allocator."""

from __future__ import annotations

import ctypes
import os

import torch


def set_threads(count: int) -> None:
    """Give this process `count` compute threads, at least one; OpenCV gets none of its own."""
    import cv2

    torch.set_num_threads(max(1, count))
    # Decoding already runs beside the network; OpenCV's pool on top would fight for the cores.
    cv2.setNumThreads(0)


# Compute threads that the user has asked for; 0: as many as there are cores.
_fixed_threads = 0


def fix_threads(count: int) -> None:
    """Compute with `count` threads here and in processes that are started from here.

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
    """The number that `fix_threads` was given, 0 without it."""
    return _fixed_threads


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of returning them to the kernel.

    Training on the CPU allocates the same large tensors every step; with glibc's defaults each
    is mapped and zeroed page by page anew, which costs a third of the step. Elsewhere than on
    glibc nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4  # parameter numbers in malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def cpu_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_each(processes: int = 1) -> int:
    """Cores for each of so many processes of this rank, at least one."""
    return max(1, cpu_count() // (local_ranks() * processes))


def local_ranks() -> int:
    """Ranks of torchrun on this machine, which share its cores; 1 outside torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
