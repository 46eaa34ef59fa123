"""Threads for the replicas of a module that are reused in every forward pass."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# Seconds that running jobs have to end when the interpreter exits.
_GRACE = 2.0


class ReplicaThread:
    """A thread that runs one job after another until it is stopped.

    Attributes:
        free: set while there is no job, and the last one has been freed.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.free = threading.Event()
        self.free.set()
        self._thread = threading.Thread(
            target=_serve, args=(self._jobs, self.free), name=name, daemon=True
        )
        self._thread.start()
        _remember(self)

    def run(self, job: Callable[[], None]) -> None:
        """Starts a job, which must not raise."""
        self.free.clear()
        self._jobs.put(job)

    def stop(self) -> None:
        """Ends the thread after its job, without waiting, as the garbage collector may call it."""
        self._jobs.put(None)

    def join(self, timeout: float) -> None:
        """Waits for the end of a stopped thread."""
        self._thread.join(timeout)

    def is_alive(self) -> bool:
        """Whether the thread is running; False in a forked process, which does not inherit it."""
        return self._thread.is_alive()


class ReplicaThreads:
    """Provides the same thread to each replica of a module in every forward pass.

    Libraries keep state per thread, which is then reused: the plans of cuDNN, which it would
    otherwise create in each pass and never free, and the threads of OpenMP. Threads are started
    when first needed, and stopped with this object and when the interpreter exits. A deep or
    pickled copy has its own threads.
    """

    def __init__(self) -> None:
        self._idle: dict[int, ReplicaThread] = {}
        # Not at exit: `_end_all` stops the threads then, and waits for them.
        weakref.finalize(self, _stop_all, self._idle).atexit = False

    def take(self, count: int) -> list[ReplicaThread]:
        """The threads of replicas 0 to count - 1, reserved for the caller until `give_back`.

        Raises:
            RuntimeError: a thread cannot be started.
        """
        taken: list[ReplicaThread] = []
        try:
            for i in range(count):
                # None in the first pass, or if another pass uses it at the same time.
                thread = self._idle.pop(i, None)
                alive = thread is not None and thread.is_alive()
                taken.append(thread if thread and alive else ReplicaThread(f"replica-{i}"))
        except BaseException:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, threads: list[ReplicaThread]) -> None:
        """Returns threads; those whose job hangs are not used again."""
        for i, thread in enumerate(threads):
            if not thread.free.is_set() or self._idle.setdefault(i, thread) is not thread:
                thread.stop()

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplicaThreads:
        return ReplicaThreads()

    def __reduce__(self) -> tuple[type[ReplicaThreads], tuple[()]]:
        return ReplicaThreads, ()


def _serve(jobs: SimpleQueue[Callable[[], None] | None], free: threading.Event) -> None:
    while (job := jobs.get()) is not None:
        job()
        job = None  # free what it holds before it counts as done
        free.set()


def _stop_all(threads: dict[int, ReplicaThread]) -> None:
    for thread in list(threads.values()):
        thread.stop()


_started: set[ReplicaThread] = set()


def _remember(thread: ReplicaThread) -> None:
    for other in list(_started):
        if not other.is_alive():
            _started.discard(other)
    _started.add(thread)


@atexit.register
def _end_all() -> None:
    """Stop all threads and wait for them: at exit Python would kill them, which aborts the process
    (status 134) if they are in torch's C++ code."""
    for thread in list(_started):
        thread.stop()
    deadline = time.monotonic() + _GRACE
    for thread in list(_started):
        thread.join(max(0.0, deadline - time.monotonic()))
