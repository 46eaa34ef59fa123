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

# How long the other replicas may take to leave after one has failed, in seconds.
_GRACE = 2.0


def parallel_apply(
    run: ReplicaRun,
    replicas: Sequence[nn.Module],
    inputs: Sequence[tuple[Any, ...]],
    kwargs: Sequence[Mapping[str, Any]],
    devices: Sequence[torch.device],
) -> list[Any]:
    """Calls each replica in a thread of its own, under the caller's grad and autocast modes.

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
            the replica and its device; at most two seconds after it happened.
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

    with _divided_cores(sum(device.type == "cpu" for device in devices)):
        for i in range(len(replicas)):
            context = contextvars.copy_context()
            threading.Thread(
                target=context.run, args=(work, i), name=f"replica-{i}", daemon=True
            ).start()
        _wait_for_all(run)

    if run.failure is not None:
        i, error = run.failure
        _add_note(error, f"raised in replica {i} of {run.size} on device {devices[i]}")
        raise error
    return outputs


def _wait_for_all(run: ReplicaRun) -> None:
    """Returns when every replica has left, or soon after the first has failed."""
    try:
        with run.changed:
            run.changed.wait_for(lambda: run.failure is not None or len(run.ended) == run.size)
            deadline = time.monotonic() + _GRACE
            run.changed.wait_for(
                lambda: len(run.ended) == run.size, timeout=deadline - time.monotonic()
            )
    except BaseException as error:
        # Ctrl-C in the caller must release the replicas too.
        with run.changed:
            run.failure = run.failure or (0, error)
            run.changed.notify_all()
        raise


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
