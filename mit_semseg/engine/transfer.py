"""Asynchronous copies to the host, timing on the device, and numbers of helper threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mit_semseg.engine.cpu import cores_each


@dataclass(frozen=True)
class Threads:
    """Numbers of reader and writer threads of a pipeline, and the lengths of its queues.

    Attributes:
        readers: threads that read inputs.
        writers: threads that process and write results.
    """

    readers: int
    writers: int

    @classmethod
    def of(cls, device: torch.device, processes: int) -> Threads:
        """Numbers for one of `processes` processes of this rank."""
        cores = cores_each(processes)
        if device.type == "cpu":
            return cls(2, max(1, cores // 8))
        return cls(min(8, max(2, cores // 2)), min(16, max(2, cores)))

    @property
    def read_ahead(self) -> int:
        """Most tasks that are read ahead of the computation."""
        return self.readers

    @property
    def unwritten(self) -> int:
        """Most tasks that are computed and not written yet."""
        return self.writers + 2

    @property
    def held(self) -> int:
        """Most tasks that are taken before the first result."""
        return self.read_ahead + 1 + self.unwritten


class HostCopy:
    """An asynchronous copy of a tensor to the host, on the current stream of its device.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor.detach()
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            # A blocking event: the waiting thread sleeps and does not occupy a core.
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """Wait for the copy and return it; may be called from any thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.cpu()

    def array(self) -> np.ndarray:
        """`wait` as a NumPy array."""
        array: np.ndarray = self.wait().numpy()
        return array


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in pinned memory if `device` is a GPU, for asynchronous copies to it."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which a GPU is the current device of this thread; no-op for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Stopwatch:
    """Measures the time from creation to `stop` on a device, without synchronising.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]

    def stop(self) -> Stopwatch:
        """End the measurement with the work launched so far."""
        self._marks.append(self._mark())
        return self

    def seconds(self) -> float:
        """The time; waits until the work is done."""
        start, end = self._marks
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1000
        assert isinstance(start, float) and isinstance(end, float)
        return end - start

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def stacked(
    inputs: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Samples of equal shapes, concatenated to batches.

    Args:
        inputs: per sample, one (1, 3, h, w) tensor per scale.
        sizes: per sample, (H, W) of its class map.

    Yields:
        Positions in `inputs`, and per scale their (N, 3, h, w) tensor.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (scales, size) in enumerate(zip(inputs, sizes, strict=True)):
        groups.setdefault((size, *(x.shape for x in scales)), []).append(i)
    for positions in groups.values():
        yield positions, [torch.cat(x) for x in zip(*(inputs[i] for i in positions), strict=True)]
