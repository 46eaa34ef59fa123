"""Two procedures, each in a process of its own, that take turns.

A process of its own keeps what one side does to the memory allocator, to thread pools and to
caches away from the other, and makes its peak memory its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mit_semseg.engine.launch import set_threads
from mit_semseg.lib.utils import as_numpy

Runnable = Callable[[], Any]
MIB = 2**20


class SideError(RuntimeError):
    """One side failed; the message holds its traceback."""


@dataclass
class Timing:
    """What one side took.

    Attributes:
        seconds: of every timed call.
        extra_mib: peak memory of the first call beyond what was held before it, in MiB; None
            where the system does not tell.
        flops: floating-point operations of one call, 0 when there is nothing to count.
        result: what a call returned.
    """

    seconds: list[float] = field(default_factory=list)
    extra_mib: float | None = None
    flops: int = 0
    result: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(
    sides: dict[str, Callable[[], Runnable]],
    repeats: int,
    *,
    device: str = "cpu",
    threads: int = 0,
    flops: bool = False,
    limit: float = 60.0,
) -> dict[str, Timing]:
    """Runs every side in turn, A B A B, after a first call of each that is not counted.

    Args:
        sides: name -> picklable function that prepares a side and returns what is to be timed.
        repeats: timed calls of every side after the first; with 0 the first is what counts.
        device: cpu or cuda; of what is timed.
        threads: compute threads of each side; 0 = the cores there are.
        flops: count the floating-point operations of a call.
        limit: seconds after which no further round is begun, so that slow rows end.

    Raises:
        SideError: a side raised, or its process died.
    """
    processes = {name: _Side(prepare, device, threads) for name, prepare in sides.items()}
    timings = {name: Timing() for name in sides}
    try:
        for name, process in processes.items():
            timings[name].extra_mib, first = process.ask("first")
            if not repeats:
                timings[name].seconds.append(first)
        began = time.monotonic()
        for done in range(repeats):
            if done >= 2 and time.monotonic() - began > limit:
                break
            for name, process in processes.items():
                timings[name].seconds.append(process.ask("run"))
        for name, process in processes.items():
            timings[name].result = process.ask("result")
            timings[name].flops = process.ask("flops") if flops else 0
    finally:
        for process in processes.values():
            process.stop()
    return timings


class _Side:
    def __init__(self, prepare: Callable[[], Runnable], device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon, which may have no children, such as a loader's workers; when this process
        # ends, the pipe closes, and so does the other.
        self.process = context.Process(target=_serve, args=(prepare, device, threads, theirs))
        self.process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        try:
            self.pipe.send(what)
            kind, value = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            raise SideError(f"the process died with exit code {self.process.exitcode}") from None
        if kind == "error":
            raise SideError(value)
        return value

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(prepare: Callable[[], Runnable], device: str, threads: int, pipe: Connection) -> None:
    call: Runnable | None = None
    result: Any = None
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        try:
            if call is None:
                set_threads(threads or torch.get_num_threads())
                call = prepare()
            answer: Any = None
            if what == "first":
                memory, seconds, result = _peak(call, device)
                answer = memory, seconds
            elif what == "run":
                answer, result = _timed(call, device)
            elif what == "result":
                answer = as_numpy(result)
            elif what == "flops":
                answer = count_flops(call)
        except Exception:  # noqa: BLE001 - whatever it is belongs to the parent
            pipe.send(("error", traceback.format_exc()))
            return
        pipe.send(("ok", answer))


def _timed(call: Runnable, device: str) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def _peak(call: Runnable, device: str) -> tuple[float | None, float, Any]:
    """Most memory of one call beyond what was held, in MiB; its seconds and its result."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        seconds, result = _timed(call, device)
        return (torch.cuda.max_memory_allocated() - held) / MIB, seconds, result
    before = _reset_high_water_mark()
    seconds, result = _timed(call, device)
    after = _status("VmHWM")
    known = before is not None and after is not None
    return (after - before if known else None), seconds, result  # type: ignore[operator]


def _reset_high_water_mark() -> float | None:
    # What preparing has freed goes back to the system, or a call could hide in it.
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> float | None:
    """A line of /proc/self/status in MiB, None where there is no such file."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return None


def count_flops(call: Runnable) -> int:
    """Floating-point operations of one call, by torch's counter (two per multiply-add)."""
    from torch.utils.flop_counter import FlopCounterMode

    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return int(counter.get_total_flops())


def _convolution_backward_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *options: Any, out_shape: Any
) -> int:
    """Each wanted gradient takes what the forward pass does; arguments come as shapes.

    Torch's own formula takes a grouped convolution for a full one.
    """
    wants_x, wants_weight, _ = options[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (wants_x + wants_weight)


def convolution_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 1.5) -> float:
    """FLOP/s that this machine reaches on a 3x3 convolution of 256 channels, channels last.

    What networks of convolutions cannot pass, and so the floor of their time.
    """
    x = torch.randn(1 if device == "cpu" else 16, 256, 64, 96, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype)
    layer = layer.to(memory_format=torch.channels_last)
    work = 2 * x.shape[0] * 64 * 96 * 256 * 256 * 9
    rates = []
    with torch.no_grad():
        layer(x)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rates.append(work / _timed(lambda: layer(x), device)[0])
    return statistics.median(rates)


def machine(device: str) -> str:
    """The machine in words."""
    import platform

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    text = f"{name}, {cores} cores"
    return f"{torch.cuda.get_device_name()}; {text}" if device != "cpu" else text
