"""Threads that outlast a forward pass: one for each replica of a module."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# Seconds that threads in the middle of a job may take to end when the interpreter exits.
_GRACE = 2.0


class ReplicaThread:
    """A thread that runs one job after the other until it is stopped.

    Attributes:
        free: set while there is no job, and nothing is left of the last one.
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
        """Hands over a job, which must not raise."""
        self.free.clear()
        self._jobs.put(job)

    def stop(self) -> None:
        """Lets the thread end after its job, without waiting: it may be called anywhere, by the
        garbage collector too."""
        self._jobs.put(None)

    def join(self, timeout: float) -> None:
        """Waits for the end of a thread that was stopped."""
        self._thread.join(timeout)

    def is_alive(self) -> bool:
        """False too in a forked process, which has no threads but the one that forked."""
        return self._thread.is_alive()


class ReplicaThreads:
    """Lends every replica of a module the same thread in each forward pass.

    What libraries keep for a thread is then kept for the replica: cuDNN's plans, which it would
    otherwise make anew in each pass, and never free; the threads of OpenMP. Threads are started
    when they are first needed. They are stopped with this object, and when the interpreter exits.
    A copy, deep or pickled, has threads of its own.
    """

    def __init__(self) -> None:
        self._idle: dict[int, ReplicaThread] = {}
        # The exit of the interpreter is dealt with below, where it is waited for the threads too.
        weakref.finalize(self, _stop_all, self._idle).atexit = False

    def take(self, count: int) -> list[ReplicaThread]:
        """The threads of replicas 0 to count - 1, for the caller alone until it gives them back.

        Raises:
            RuntimeError: a thread cannot be started.
        """
        taken: list[ReplicaThread] = []
        try:
            for i in range(count):
                # None where this is the first pass, or another pass uses it at the same time.
                thread = self._idle.pop(i, None)
                alive = thread is not None and thread.is_alive()
                taken.append(thread if thread and alive else ReplicaThread(f"replica-{i}"))
        except BaseException:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, threads: list[ReplicaThread]) -> None:
        """Ends the use of threads; those that hang in their job are left to themselves."""
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
        job = None  # what it held is freed here, before anybody hears that it is done
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
    """At exit Python ends threads where they stand; in the middle of torch's C++ that aborts the
    process (status 134). So all are stopped, and waited for, before."""
    for thread in list(_started):
        thread.stop()
    deadline = time.monotonic() + _GRACE
    for thread in list(_started):
        thread.join(max(0.0, deadline - time.monotonic()))
