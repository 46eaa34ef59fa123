"""Runs replicas in parallel threads, and raises the first of their exceptions."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .exchange import ReplicaRun
from .replica_threads import ReplicaThread, ReplicaThreads

# Seconds that the other replicas have at least to end after one has failed.
_GRACE = 2.0


def parallel_apply(
    threads: ReplicaThreads,
    run: ReplicaRun,
    replicas: Sequence[nn.Module],
    inputs: Sequence[tuple[Any, ...]],
    kwargs: Sequence[Mapping[str, Any]],
    devices: Sequence[torch.device],
) -> list[Any]:
    """Calls each replica in its thread, with the caller's grad and autocast modes and streams.

    Replica 0 also has a thread. In the caller's thread, a hanging replica 0 would block the caller,
    which now raises after the timeout of the run, and Control-C would interrupt it at any line.

    When this returns or raises, all threads are idle and hold no tensors, except those of replicas
    that hang for longer than the timeout.

    Args:
        threads: threads of the module.
        run: result of `execute_replication_callbacks` for these replicas.
        replicas: one module per input.
        inputs: positional arguments of each replica.
        kwargs: keyword arguments of each replica.
        devices: device of each replica.

    Returns:
        The outputs of the replicas, in order.

    Raises:
        BaseException: the first error of a replica, with its traceback and a note that names the
            replica and its device, raised when the others have ended, too. KeyboardInterrupt also
            waits for them; a second one does not.
    """
    outputs: list[Any] = [None] * len(replicas)
    types = {device.type for device in devices} | {"cpu"}
    autocast = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in sorted(types)
    ]
    cache = torch.is_autocast_cache_enabled()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    # Of all devices: at synchronised layers, one replica works on the devices of the others.
    streams = [torch.cuda.current_stream(d) for d in dict.fromkeys(devices) if d.type == "cuda"]

    def call(i: int, cores: int) -> Any:
        if torch.get_num_threads() != cores:
            torch.set_num_threads(cores)
        # Its own device last, which becomes the current one. The thread's previous streams are not
        # restored: that would create a context on an unused GPU.
        for stream in sorted(streams, key=lambda stream: stream.device == devices[i]):
            torch.cuda.set_stream(stream)
        with ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, enabled in autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
            return replicas[i](*inputs[i], **kwargs[i])

    def work(i: int, cores: int) -> None:
        try:
            outputs[i] = call(i, cores)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, who raises it
            run.end(i, error)
        else:
            run.end(i)

    with _divided_cores(sum(device.type == "cpu" for device in devices)) as cores:
        jobs = [
            partial(contextvars.copy_context().run, work, i, cores) for i in range(len(replicas))
        ]
        taken = threads.take(len(replicas))
        try:
            _run(taken, jobs, run)
        finally:
            threads.give_back(taken)

    if run.failure is not None:
        i, error = run.failure
        note = f"raised in replica {i} of {run.size} on device {devices[i]}"
        if hanging := [str(i) for i in range(run.size) if i not in run.ended]:
            note += f"; replica {', '.join(hanging)} did not end within {run.timeout:g} s"
        _add_note(error, note)
        raise error
    return outputs


def _run(
    threads: Sequence[ReplicaThread], jobs: Sequence[Callable[[], None]], run: ReplicaRun
) -> None:
    """Runs the jobs and waits for them; after a failure, not for those that hang."""
    deadline = time.monotonic() + run.timeout
    try:
        for thread, job in zip(threads, jobs, strict=True):
            thread.run(job)
        with run.changed:
            run.changed.wait_for(lambda: run.failure is not None or len(run.ended) == run.size)
    except BaseException as error:
        # Control-C: wake the waiting replicas.
        with run.changed:
            run.failure = run.failure or (0, error)
            run.changed.notify_all()
        raise
    finally:
        deadline = max(deadline, time.monotonic() + _GRACE)
        for thread in threads:
            thread.free.wait(max(0.0, deadline - time.monotonic()))


@contextmanager
def _divided_cores(cpu_replicas: int) -> Iterator[int]:
    """Number of cores for each replica: those on the CPU share the cores."""
    total = torch.get_num_threads()
    cores = max(1, total // max(1, cpu_replicas))
    try:
        yield cores
    finally:
        # torch.set_num_threads in a replica's thread also affects new threads.
        if cores != total:
            torch.set_num_threads(total)


def _add_note(error: BaseException, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.__cause__ is None:  # Python 3.10 has no notes
        error.__cause__ = RuntimeError(note)
