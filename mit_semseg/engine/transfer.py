"""Between host and device: copies that nobody waits for, times, threads for the host's part."""

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
    """Threads beside the one that computes, and how far they are ahead of it and behind.

    Attributes:
        readers: read what is computed next.
        writers: do what is left to do on the host.
    """

    readers: int
    writers: int

    @classmethod
    def of(cls, device: torch.device, processes: int) -> Threads:
        """As the cores of each of so many processes allow; on the CPU the network needs them."""
        cores = cores_each(processes)
        if device.type == "cpu":
            return cls(2, max(1, cores // 8))
        return cls(min(8, max(2, cores // 2)), min(16, max(2, cores)))

    @property
    def read_ahead(self) -> int:
        """Tasks that are read, or being read, beyond the one that is computed."""
        return self.readers

    @property
    def unwritten(self) -> int:
        """Tasks that may have been computed and not written."""
        return self.writers + 2

    @property
    def held(self) -> int:
        """Tasks that may be taken before there is a first result."""
        return self.read_ahead + 1 + self.unwritten


class HostCopy:
    """A tensor on its way to the host; whoever starts the copy does not wait for it.

    Made in the thread that computed the tensor, on the current stream of its device.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor.detach()
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            # Whoever waits sleeps: a thread that polls would take a core from the others.
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host; may be called from any thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.cpu()

    def array(self) -> np.ndarray:
        """As `wait`, for NumPy."""
        array: np.ndarray = self.wait().numpy()
        return array


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host from which copies to `device` are not waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current device of the calling thread; nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Stopwatch:
    """Time from its making to `stop`, by the device's own clock; starting it waits for nothing.

    Args:
        device: where the work is done that is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]

    def stop(self) -> Stopwatch:
        """The end of the work, as far as it has been started."""
        self._marks.append(self._mark())
        return self

    def seconds(self) -> float:
        """What the work took; waits until it is done."""
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
    """Samples of equal shapes joined into batches; none is dropped.

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
