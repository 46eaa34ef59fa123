"""Where the replicas of one forward pass meet, and how none of them waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


class ReplicaAborted(RuntimeError):
    """A replica was released because another one failed; the caller sees the other's error."""


class ReplicaRun:
    """One forward pass over `size` replicas: who waits, who is done, who failed.

    All state is guarded by `changed`, which is notified on every change, so a waiting replica
    learns at once that it waits in vain.

    Args:
        size: number of replicas.
        timeout: seconds a replica waits for the others at one meeting.
    """

    def __init__(self, size: int, timeout: float = 600.0) -> None:
        self.size = size
        self.timeout = timeout
        self.changed = threading.Condition()
        self.failure: tuple[int, BaseException] | None = None
        self.ended: set[int] = set()
        self.waiting: dict[int, str] = {}

    def end(self, copy_id: int, error: BaseException | None = None) -> None:
        """Records that a replica has left, with the error that ended it, and wakes the others."""
        with self.changed:
            self.ended.add(copy_id)
            self.waiting.pop(copy_id, None)
            if error is not None and self.failure is None:
                self.failure = (copy_id, error)
            self.changed.notify_all()


class _Meeting:
    """One call of one layer: what each replica brought, and what each takes away."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.results: Sequence[Any] | None = None


class CallbackContext:
    """What the copies of one submodule share; handed to `__data_parallel_replicate__`.

    Args:
        run: the forward pass the copies take part in; None: one of a single copy.
        name: qualified name of the submodule, for messages.
    """

    def __init__(self, run: ReplicaRun | None = None, name: str = "") -> None:
        run = run or ReplicaRun(1)
        self.run = run
        self.name = name or "the module"
        self._calls = [0] * run.size
        self._meetings: dict[int, _Meeting] = {}

    def exchange(
        self, copy_id: int, value: Any, combine: Callable[[list[Any]], Sequence[Any]]
    ) -> Any:
        """Waits until every copy has brought a value; the last one combines them for all.

        Args:
            copy_id: which replica calls.
            value: what it brings.
            combine: all values in replica order -> one result for each replica.

        Returns:
            The result for this replica.

        Raises:
            ReplicaAborted: another replica failed.
            RuntimeError: a replica cannot come any more, as it has finished, or waits elsewhere.
            TimeoutError: the others did not come within the run's timeout.
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
            meeting = self._meetings.setdefault(turn, _Meeting())
            meeting.values[copy_id] = value
            complete = len(meeting.values) == run.size
            if complete:
                del self._meetings[turn]
                for other in meeting.values:
                    run.waiting.pop(other, None)
            else:
                run.waiting[copy_id] = self.name
                self._wait(copy_id, meeting)
        if complete:
            results = combine([meeting.values[i] for i in range(run.size)])
            with run.changed:
                meeting.results = results
                run.changed.notify_all()
        assert meeting.results is not None
        return meeting.results[copy_id]

    def _wait(self, copy_id: int, meeting: _Meeting) -> None:
        """Waits, holding `changed`, for the meeting's results or a reason to give up."""
        run = self.run
        deadline = time.monotonic() + run.timeout
        while meeting.results is None:
            if run.failure is not None:
                raise ReplicaAborted(
                    f"replica {copy_id} stopped at {self.name}: replica {run.failure[0]} failed"
                )
            absent = [i for i in range(run.size) if i not in meeting.values]
            for i in absent:
                if i in run.ended:
                    raise RuntimeError(
                        f"replica {i} finished without reaching {self.name}, where replica "
                        f"{copy_id} waits: every replica must call the same synchronised layers"
                    )
            if absent and all(i in run.waiting for i in absent):
                # The absent ones wait for this replica at other layers: nobody can ever move.
                places = ", ".join(f"replica {i} at {run.waiting[i]}" for i in absent)
                raise RuntimeError(
                    f"replica {copy_id} waits at {self.name}, but {places}: "
                    "every replica must call the same synchronised layers in the same order"
                )
            if not run.changed.wait(max(0.0, deadline - time.monotonic())) and (
                meeting.results is None and time.monotonic() >= deadline
            ):
                raise TimeoutError(
                    f"replica {copy_id} waited {run.timeout:g} s at {self.name} for replica "
                    f"{', '.join(map(str, absent)) or 'results'}; raise timeout= if it is only slow"
                )
