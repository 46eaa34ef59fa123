"""Runs the sides of a comparison in separate processes, in alternation.

With separate processes, a side does not affect the memory allocator, thread pools and caches of the
other, and its peak memory can be measured.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from mit_semseg.benchmarks.clock import Clock, Runnable, clock_of
from mit_semseg.engine.cpu import set_threads
from mit_semseg.lib.utils import as_numpy
from mit_semseg.precision import Precision

# Maximum number of calls of a burst and of a profile.
MAX_CALLS, PROFILED_CALLS = 200, 5
# Warm-up calls after the first: on a GPU the second may record a graph.
WARM_CALLS = 2


class SideError(RuntimeError):
    """One side failed; the message contains its traceback."""


@dataclass
class Timing:
    """Measurements of one side.

    Attributes:
        seconds: seconds per call, of every timed call or burst.
        calls: number of calls in a burst.
        extra_mib: peak memory in addition to that after preparation, in MiB, of the first call or,
            with bursts, of all calls; None: unknown.
        flops: floating-point operations of one call; 0: not counted.
        kernel_seconds: seconds per call in which GPU kernels run; None: unknown.
        result: result of a call.
    """

    seconds: list[float] = field(default_factory=list)
    calls: int = 1
    extra_mib: float | None = None
    flops: int = 0
    kernel_seconds: float | None = None
    result: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def busy(self) -> float | None:
        """Fraction of time in which GPU kernels run."""
        return None if self.kernel_seconds is None else self.kernel_seconds / self.median


def time_sides(
    sides: dict[str, Callable[[], Runnable]],
    repeats: int,
    *,
    device: str = "cpu",
    threads: int = 0,
    flops: bool = False,
    limit: float = 60.0,
    burst: float = 0.0,
    timeout: float | None = None,
    processes: Processes | None = None,
) -> dict[str, Timing]:
    """Times the sides in alternation, A B A B, after warm-up calls.

    Args:
        sides: name -> picklable function that prepares a side and returns the function to time.
        repeats: timed calls or bursts of every side after the first call; 0: time the first call.
        device: cpu or cuda.
        threads: compute threads of each side; 0: all cores.
        flops: count the floating-point operations of a call.
        limit: seconds after which no further round is started; measured from the beginning with
            bursts, otherwise from the first round.
        burst: seconds of consecutive calls that are timed together; 0: single calls.
        timeout: seconds after which a side that does not answer is killed; None: no timeout.
        processes: processes of the sides, which are kept; None: new ones for this call.

    Raises:
        SideError: a side raised an error, its process died, or it hangs.
    """
    held = processes or Processes()
    timings = {name: Timing() for name in sides}
    began = time.monotonic()
    try:
        side_of = {name: held.get(name, timeout) for name in sides}
        for name, prepare in sides.items():
            side_of[name].call("prepare", prepare, device, threads)
            # Before a CUDA graph is recorded, whose operations are not counted.
            if flops and burst:
                timings[name].flops = side_of[name].call("flops")
            timings[name].extra_mib, first = side_of[name].call("first")
            if not repeats:
                timings[name].seconds.append(first)
        if burst and repeats:
            for name, side in side_of.items():
                side.call("run", WARM_CALLS)
                fitting = round(burst / max(side.call("run", 1), 1e-6))
                timings[name].calls = max(1, min(MAX_CALLS, fitting))
        if not burst:
            began = time.monotonic()
        for done in range(repeats):
            if done >= (1 if burst else 2) and time.monotonic() - began > limit:
                break
            for name, side in side_of.items():
                timings[name].seconds.append(side.call("run", timings[name].calls))
        for name, side in side_of.items():
            one = timings[name]
            one.result = side.call("last")
            if burst and repeats:
                one.extra_mib = side.call("peak")
                one.kernel_seconds = side.call("kernels", min(one.calls, PROFILED_CALLS))
            elif flops:
                one.flops = side.call("flops")
    finally:
        if processes is None:
            held.stop()
    return timings


class Processes:
    """The processes of the sides by name, started when first needed."""

    def __init__(self) -> None:
        self.sides: dict[str, _Side] = {}

    def get(self, name: str, timeout: float | None) -> _Side:
        """The process of a side; a new one if the earlier one has failed."""
        if name not in self.sides or not self.sides[name].process.is_alive():
            self.sides[name] = _Side()
        self.sides[name].timeout = timeout
        return self.sides[name]

    def computed(self) -> float:
        """CPU seconds of the running processes."""
        alive = [side for side in self.sides.values() if side.process.is_alive()]
        return float(sum(side.call("computed") for side in alive))

    def stop(self) -> None:
        """Stops all processes."""
        for side in self.sides.values():
            side.stop()
        self.sides.clear()


class _Side:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.timeout: float | None = None
        self.pipe, theirs = context.Pipe()
        # Not a daemon, which cannot have children, such as loader workers. When this process ends,
        # the pipe is closed, and so it ends, too.
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def call(self, what: str, *arguments: Any) -> Any:
        """Calls a method of `_Work` in the process, which is stopped if it fails."""
        try:
            self.pipe.send((what, arguments))
            if self.timeout is not None and not self.pipe.poll(self.timeout):
                self.process.kill()
                self.stop()
                raise SideError(f"no answer for {self.timeout:g} s")
            kind, value = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            code = self.process.exitcode
            self.stop()
            raise SideError(f"the process died with exit code {code}") from None
        if kind == "error":
            self.stop()
            raise SideError(value)
        return value

    def stop(self) -> None:
        """Stops the process."""
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection) -> None:
    work = _Work()
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = getattr(work, what)(*arguments)
        except Exception:  # noqa: BLE001 - raised in the parent
            pipe.send(("error", traceback.format_exc()))
            return
        pipe.send(("ok", answer))


class _Work:
    """Methods that run in the process of a side."""

    def __init__(self) -> None:
        self.cores = torch.get_num_threads()
        self.clock = Clock()
        self.call: Runnable = lambda: None
        self.result: Any = None

    def prepare(self, prepare: Callable[[], Runnable], device: str, threads: int) -> None:
        """Frees the previous side and prepares the next one."""
        self.call, self.result = (lambda: None), None
        self.clock.release()
        self.clock = clock_of(device)
        set_threads(threads or self.cores)
        self.call = prepare()
        self.clock.mark_memory()

    def first(self) -> tuple[float | None, float]:
        """Peak memory in MiB, and seconds of the first call."""
        seconds = self.run(1)
        return self.clock.peak_mib(), seconds

    def run(self, calls: int) -> float:
        """Mean seconds of consecutive calls."""
        self.result = None
        seconds, self.result = self.clock.timed(self.call, calls)
        return seconds

    def peak(self) -> float | None:
        """Peak memory of all calls so far, in MiB."""
        return self.clock.peak_mib()

    def kernels(self, calls: int) -> float | None:
        """Seconds per call in which GPU kernels run."""
        return self.clock.kernel_seconds(self.call, calls)

    def computed(self) -> float:
        """CPU seconds of this process and its ended children."""
        return sum(os.times()[:4])

    def last(self) -> Any:
        """Result of the last call."""
        return as_numpy(self.result)

    def flops(self) -> int:
        """Floating-point operations of a call."""
        return count_flops(self.call)


def count_flops(call: Runnable) -> int:
    """Floating-point operations of one call, with torch's counter (two per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return int(counter.get_total_flops())


def _convolution_backward_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *options: Any, out_shape: Any
) -> int:
    """Each gradient takes as many operations as the forward pass; arguments are shapes.

    Torch's formula counts a grouped convolution as a full one.
    """
    wants_x, wants_weight, _ = options[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (wants_x + wants_weight)


def convolution_rate(precision: str, device: str = "cpu", seconds: float = 1.5) -> float:
    """FLOP/s of a 3x3 convolution of 256 channels, channels last, on a device.

    It gives a lower bound, the floor, of the time of convolutional networks.

    Args:
        precision: fp32, tf32, bf16 or fp16 (see `precision.Precision`).
        device: cpu or cuda.
        seconds: duration of the measurement.
    """
    products = Precision.of(precision, torch.device(device))
    clock, on_cpu = clock_of(device), device == "cpu"
    images, calls = (1, 1) if on_cpu else (16, 100)
    x = torch.randn(images, 256, 64, 96, device=device, dtype=products.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, products.dtype)
    layer = layer.to(memory_format=torch.channels_last)
    work = 2 * images * 64 * 96 * 256 * 256 * 9
    rates: list[float] = []
    with torch.no_grad(), products.products():
        clock.timed(lambda: layer(x), calls)
        end = time.monotonic() + seconds
        while not rates or time.monotonic() < end:
            rates.append(work / clock.timed(lambda: layer(x), calls)[0])
    return statistics.median(rates)
