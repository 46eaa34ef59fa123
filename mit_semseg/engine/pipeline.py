"""Stages of a pipeline in threads: reading ahead, work handed on, bounded memory, order kept."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mit_semseg.engine.launch import cores_each

T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    function: Callable[[T], R],
    tasks: Iterable[T],
    threads: int = 2,
    ahead: int = 2,
    initializer: Callable[[], None] | None = None,
) -> Generator[tuple[T, Future[R]], None, None]:
    """Tasks in order with what `function` makes of them, computed in threads meanwhile.

    Args:
        function: called with each task in one of the threads.
        tasks: taken one by one as there is room.
        threads: calls that run side by side.
        ahead: tasks taken beyond the one that is yielded.
        initializer: called once in each thread.
    """
    with ThreadPoolExecutor(threads, initializer=initializer) as executor:
        held: deque[tuple[T, Future[R]]] = deque()
        try:
            for task in tasks:
                held.append((task, executor.submit(function, task)))
                if len(held) > ahead:
                    yield held.popleft()
            while held:
                yield held.popleft()
        finally:
            for _, future in held:
                future.cancel()


class HandedOn(Generic[R]):
    """Calls handed on to threads; results come back in the order of the calls.

    Args:
        threads: calls that run side by side.
        most: calls that may be unfinished, or finished with their result not yet taken.
        initializer: called once in each thread.
    """

    def __init__(
        self, threads: int, most: int, initializer: Callable[[], None] | None = None
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, initializer=initializer)
        self._held: deque[Future[R]] = deque()
        self.most = most

    def __enter__(self) -> HandedOn[R]:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def add(self, function: Callable[..., R], *args: object) -> Iterator[R]:
        """Call `function` in a thread; yields the results that are due.

        Those are the oldest ones as far as they are there, and as many as it takes to hold fewer
        than `most`, which are waited for.

        Raises:
            Exception: what a call raised, in place of its result.
        """
        self._held.append(self._executor.submit(function, *args))
        while self._held and (len(self._held) >= self.most or self._held[0].done()):
            yield self._held.popleft().result()

    def rest(self) -> Iterator[R]:
        """Wait for the results of all calls."""
        while self._held:
            yield self._held.popleft().result()


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


class Budget:
    """Bounds what is in memory at a time; it is granted in the order of the requests' numbers.

    Without that order a later task could hold what an earlier one waits for, while its own result
    waits for the earlier one's.

    Args:
        total: amount that is granted at a time, in any unit. A larger request is granted alone.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._turn = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, number: int, amount: int) -> int:
        """Wait until `amount` is free; requests are numbered from 0, without a gap.

        Returns:
            What has to be given back, at most `total`.
        """
        amount = min(amount, self.total)
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._turn == number and self.used + amount <= self.total)
            )
            self._turn += 1
            self.used += amount
            self._changed.notify_all()
        return amount

    def give(self, amount: int) -> None:
        """Give back what `take` returned."""
        with self._changed:
            self.used -= amount
            self._changed.notify_all()

    def close(self) -> None:
        """Grant everything from now on: the work is being ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


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


def enter_device(device: torch.device) -> None:
    """`on_device` for the rest of the calling thread, such as a reader that pins memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


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
