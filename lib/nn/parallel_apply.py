"""One thread per replica, and one exception for the caller."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .exchange import ReplicaRun

# How long the other replicas may at least take to leave after one has failed, in seconds.
_GRACE = 2.0


def parallel_apply(
    run: ReplicaRun,
    replicas: Sequence[nn.Module],
    inputs: Sequence[tuple[Any, ...]],
    kwargs: Sequence[Mapping[str, Any]],
    devices: Sequence[torch.device],
) -> list[Any]:
    """Calls each replica in a thread of its own, under the caller's grad and autocast modes.

    The threads have ended when this returns or raises: one that frees its tensors while the
    interpreter shuts down would abort the process. Only a replica that hangs, and answers neither
    at a synchronised layer nor by its end within the run's timeout, is left behind.

    Args:
        run: the run that `execute_replication_callbacks` returned for these replicas.
        replicas: one module per input.
        inputs: positional arguments of each replica.
        kwargs: keyword arguments of each replica.
        devices: where each replica lives.

    Returns:
        The replicas' outputs, in order.

    Raises:
        BaseException: the first error of a replica, with its own traceback and a note naming
            the replica and its device, when the others have left, too. KeyboardInterrupt waits
            for them likewise; a second one does not.
    """
    outputs: list[Any] = [None] * len(replicas)
    types = {device.type for device in devices} | {"cpu"}
    autocast = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in sorted(types)
    ]
    cache = torch.is_autocast_cache_enabled()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    streams = [torch.cuda.current_stream(d) if d.type == "cuda" else None for d in devices]

    def call(i: int) -> Any:
        with ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, enabled in autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
            if streams[i] is not None:
                stack.enter_context(torch.cuda.device(devices[i]))
                stack.enter_context(torch.cuda.stream(streams[i]))
            return replicas[i](*inputs[i], **kwargs[i])

    def work(i: int) -> None:
        try:
            outputs[i] = call(i)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, who raises it
            run.end(i, error)
        else:
            run.end(i)

    threads = [
        threading.Thread(
            target=contextvars.copy_context().run, args=(work, i), name=f"replica-{i}", daemon=True
        )
        for i in range(len(replicas))
    ]
    with _divided_cores(sum(device.type == "cpu" for device in devices)):
        _run(threads, run)

    if run.failure is not None:
        i, error = run.failure
        note = f"raised in replica {i} of {run.size} on device {devices[i]}"
        if hanging := [str(i) for i in range(run.size) if i not in run.ended]:
            note += f"; replica {', '.join(hanging)} did not end within {run.timeout:g} s"
        _add_note(error, note)
        raise error
    return outputs


def _run(threads: Sequence[threading.Thread], run: ReplicaRun) -> None:
    """Starts the replicas' threads and joins them, but for those that hang after a failure."""
    deadline = time.monotonic() + run.timeout
    try:
        for thread in threads:
            thread.start()
        with run.changed:
            run.changed.wait_for(lambda: run.failure is not None or len(run.ended) == run.size)
    except BaseException as error:
        # Ctrl-C, or a thread that cannot be started: the replicas that run are released too.
        for i, thread in enumerate(threads):
            if thread.ident is None:
                run.end(i, error)
        with run.changed:
            run.failure = run.failure or (0, error)
            run.changed.notify_all()
        raise
    finally:
        # Not by join alone: before Python 3.13 an interrupted join takes the thread for ended.
        with run.changed:
            left = max(_GRACE, deadline - time.monotonic())
            run.changed.wait_for(lambda: len(run.ended) == run.size, timeout=left)
        for i in tuple(run.ended):  # one that hangs may end now, after all
            if threads[i].ident is not None:
                threads[i].join()


@contextmanager
def _divided_cores(cpu_replicas: int) -> Iterator[None]:
    """Lets CPU replicas share the cores instead of each claiming all of them."""
    total = torch.get_num_threads()
    share = max(1, total // max(1, cpu_replicas))
    if share == total:
        yield
        return
    # New threads start with the process-wide count; the caller's own comes back below.
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(total)


def _add_note(error: BaseException, note: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.__cause__ is None:  # Python 3.10 has no notes
        error.__cause__ = RuntimeError(note)
