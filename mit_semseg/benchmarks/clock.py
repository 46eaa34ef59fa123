"""Measurement of time and memory: on a CPU with the host's clock, on a GPU with CUDA events."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

Runnable = Callable[[], Any]
MIB = 2**20


def clock_of(device: str) -> Clock:
    """The clock of a device, cpu or cuda."""
    return Clock() if device == "cpu" else GpuClock()


class Clock:
    """Clock for the CPU: host time, and memory of this process."""

    def timed(self, call: Runnable, calls: int = 1) -> tuple[float, Any]:
        """Mean seconds of consecutive calls, and the result of the last one."""
        result = None
        began = time.perf_counter()
        for _ in range(calls):
            result = None  # freed before the next call
            result = call()
        return (time.perf_counter() - began) / calls, result

    def mark_memory(self) -> None:
        """Start to measure peak memory."""
        self.held = _reset_high_water_mark()

    def peak_mib(self) -> float | None:
        """Increase of memory since `mark_memory`, at its peak, in MiB; None: unknown."""
        peak = _status("VmHWM")
        return None if self.held is None or peak is None else peak - self.held

    def kernel_seconds(self, call: Runnable, calls: int = 1) -> float | None:
        """Seconds per call in which kernels run; None: unknown."""
        return None

    def release(self) -> None:
        """Free unused memory."""
        gc.collect()


class GpuClock(Clock):
    """Clock for the current GPU: CUDA events, and memory allocated by torch."""

    def timed(self, call: Runnable, calls: int = 1) -> tuple[float, Any]:
        """As on the CPU, measured with CUDA events.

        There is a synchronisation before and after the calls, not between them.
        """
        result = None
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            result = None
            result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls, result

    def mark_memory(self) -> None:
        """As on the CPU."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.held = torch.cuda.memory_allocated()

    def peak_mib(self) -> float | None:
        """As on the CPU."""
        return (torch.cuda.max_memory_allocated() - (self.held or 0)) / MIB

    def kernel_seconds(self, call: Runnable, calls: int = 1) -> float | None:
        """As on the CPU, with the profiler. It slows the host but hardly the kernels, so compare
        the result with seconds measured without it."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
        spans = kernel_spans(profiled.events() or ())
        return covered(spans) * 1e-6 / calls if spans else None

    def release(self) -> None:
        """As on the CPU."""
        gc.collect()
        torch.cuda.empty_cache()


class OtherPrograms:
    """Measures how many of the cores of this process are used by other programs.

    Args:
        own: returns the CPU seconds of running child processes; those of ended ones are known.
    """

    def __init__(self, own: Callable[[], float] = lambda: 0.0) -> None:
        self._own = own
        self._began, self._before = time.monotonic(), self._seconds()

    def cores(self) -> float | None:
        """Mean number of cores since this object was created; None: unknown."""
        now = self._seconds()
        if now is None or self._before is None:
            return None
        return max(0.0, (now - self._before) / (time.monotonic() - self._began))

    def _seconds(self) -> float | None:
        busy = busy_seconds()
        return None if busy is None else busy - sum(os.times()[:4]) - self._own()


def busy_seconds(file: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds of the cores of this process since the machine was booted; None: not on Linux."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    # user, nice, system, (idle, iowait,) irq, softirq, steal
    ticks = sum(sum(map(int, [*x[1:4], *x[6:9]])) for x in lines if x and x[0] in mine)
    return ticks / os.sysconf("SC_CLK_TCK")


def kernel_spans(events: Iterable[Any]) -> list[tuple[float, float]]:
    """Start and end of the kernels among profiler events, in microseconds.

    Copies and ranges of `record_function` are not kernels.
    """
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    ]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, as kernels of several streams overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _reset_high_water_mark() -> float | None:
    # Return freed memory to the system, as calls could reuse it without increasing the peak.
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> float | None:
    """A line of /proc/self/status in MiB; None if there is no such file."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return None
