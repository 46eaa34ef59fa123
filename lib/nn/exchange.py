"""Exchange of values between the replicas of one forward pass, without deadlocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


class ReplicaAborted(RuntimeError):
    """Raised in a replica that waits when another one fails; the caller gets the other's error."""


class ReplicaRun:
    """State of one forward pass over `size` replicas: which of them wait, have ended, or failed.

    All state is guarded by `changed`, which is notified on every change, so that a replica does
    not wait for others that cannot come.

    Args:
        size: number of replicas.
        timeout: seconds that a replica waits for the others at one call of a layer.
    """

    def __init__(self, size: int, timeout: float = 600.0) -> None:
        self.size = size
        self.timeout = timeout
        self.changed = threading.Condition()
        self.failure: tuple[int, BaseException] | None = None
        self.ended: set[int] = set()
        self.waiting: dict[int, str] = {}

    def end(self, copy_id: int, error: BaseException | None = None) -> None:
        """Records that a replica has ended, possibly with an error, and wakes the others."""
        with self.changed:
            self.ended.add(copy_id)
            self.waiting.pop(copy_id, None)
            if error is not None and self.failure is None:
                self.failure = (copy_id, error)
            self.changed.notify_all()


class _Exchange:
    """One call of one layer: the value and the result of each replica."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.results: Sequence[Any] | None = None


class CallbackContext:
    """Context shared by the copies of one submodule, for `__data_parallel_replicate__`.

    Args:
        run: their forward pass; None: one with a single copy.
        name: qualified name of the submodule, for messages.
    """

    def __init__(self, run: ReplicaRun | None = None, name: str = "") -> None:
        run = run or ReplicaRun(1)
        self.run = run
        self.name = name or "the module"
        self._calls = [0] * run.size
        self._exchanges: dict[int, _Exchange] = {}

    def exchange(
        self, copy_id: int, value: Any, combine: Callable[[list[Any]], Sequence[Any]]
    ) -> Any:
        """Waits until every copy has passed a value; the last one combines them for all.

        Args:
            copy_id: index of the calling replica.
            value: its value.
            combine: all values in replica order -> one result for each replica.

        Returns:
            The result for this replica.

        Raises:
            ReplicaAborted: another replica failed.
            RuntimeError: another replica has ended, or waits at another layer.
            TimeoutError: the others did not call within the timeout of the run.
        """
        run = self.run
        with run.changed:
            if copy_id in run.ended:
                raise RuntimeError(
                    f"{self.name} was called after its replica had finished: synchronised "
                    "replicas cannot be recomputed in backward (activation checkpointing); "
                    "use one device per process"
                )
            turn = self._calls[copy_id]
            self._calls[copy_id] += 1
            exchange = self._exchanges.setdefault(turn, _Exchange())
            exchange.values[copy_id] = value
            complete = len(exchange.values) == run.size
            if complete:
                del self._exchanges[turn]
                for other in exchange.values:
                    run.waiting.pop(other, None)
            else:
                run.waiting[copy_id] = self.name
                self._wait(copy_id, exchange)
        if complete:
            results = combine([exchange.values[i] for i in range(run.size)])
            with run.changed:
                exchange.results = results
                run.changed.notify_all()
        assert exchange.results is not None
        return exchange.results[copy_id]

    def _wait(self, copy_id: int, exchange: _Exchange) -> None:
        """Waits, holding `changed`, for the results or an error."""
        run = self.run
        deadline = time.monotonic() + run.timeout
        while exchange.results is None:
            if run.failure is not None:
                raise ReplicaAborted(
                    f"replica {copy_id} stopped at {self.name}: replica {run.failure[0]} failed"
                )
            absent = [i for i in range(run.size) if i not in exchange.values]
            for i in absent:
                if i in run.ended:
                    raise RuntimeError(
                        f"replica {i} finished without reaching {self.name}, where replica "
                        f"{copy_id} waits: every replica must call the same synchronised layers"
                    )
            if absent and all(i in run.waiting for i in absent):
                # The absent replicas wait for this one at other layers: a deadlock.
                places = ", ".join(f"replica {i} at {run.waiting[i]}" for i in absent)
                raise RuntimeError(
                    f"replica {copy_id} waits at {self.name}, but {places}: "
                    "every replica must call the same synchronised layers in the same order"
                )
            if not run.changed.wait(max(0.0, deadline - time.monotonic())) and (
                exchange.results is None and time.monotonic() >= deadline
            ):
                raise TimeoutError(
                    f"replica {copy_id} waited {run.timeout:g} s at {self.name} for replica "
                    f"{', '.join(map(str, absent)) or 'results'}; raise timeout= if it is only slow"
                )
