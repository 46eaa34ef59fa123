"""A watchdog that ends a process without progress, with a message that says what it waits for."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mit_semseg.dataset.reading import READINGS

_PATH_BYTES = 1024
_PATIENCE = 10.0


class ReadingFiles:
    """Shared memory in which worker processes note the file that they are reading.

    Without locks, since a process may die while it holds one.

    Args:
        readers: number of worker processes.
    """

    def __init__(self, readers: int) -> None:
        self.slots = [multiprocessing.RawArray("c", _PATH_BYTES) for _ in range(readers)]

    def writer(self, reader: int) -> Callable[[str], None]:
        """A function that sets the file of process number `reader`; "" for none."""
        slot = self.slots[reader]

        def note(path: str) -> None:
            slot.value = os.fsencode(path)[-_PATH_BYTES + 1 :]

        return note

    def files(self) -> list[str]:
        """Files being read."""
        return [os.fsdecode(slot.value) for slot in self.slots if slot.value]


class Watchdog:
    """Ends the process if there is no progress for too long.

    A system call or collective that hangs cannot be interrupted by an exception. The process is
    therefore ended from a thread, with exit status 3, after a message that says what it waits for
    and a traceback of every thread.

    Args:
        seconds: the time limit.
        name: of this process, for messages.
        files: returns the files being read, for messages.
        advice: what to do, appended to the message.
        awaited: returns a value for what the process waits for; the time limit restarts when the
            value changes or is None. By default it restarts with every call of `progress`.
        what: description of what the process waits for first.
        before_exit: called before the process ends, to end child processes.
        end: ends the process; replaced in tests.
    """

    def __init__(
        self,
        seconds: float,
        name: str = "",
        files: Callable[[], list[str]] = list,
        advice: str = "",
        awaited: Callable[[], object] | None = None,
        what: str = "the start",
        before_exit: Callable[[], None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.seconds, self.name, self.files, self.advice = seconds, name, files, advice
        self._before_exit, self._end = before_exit, end
        self._awaited, self._what = awaited, what
        self._last: object = None
        # Reentrant, since a signal handler may call `shorten_limit` within `progress`.
        self._lock = threading.RLock()
        self._limit = seconds
        self._waited = 0.0
        self._patience = 1.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def progress(self, what: str) -> None:
        """Restart the time limit; `what` describes what the process waits for next."""
        with self._lock:
            self._what = what
            self._waited = 0.0

    def shorten_limit(self, seconds: float) -> None:
        """Lower the time limit."""
        with self._lock:
            self._limit = min(self._limit, seconds)
            self._waited = 0.0

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within this context the time limit is ten times as long."""
        with self._lock:
            self._patience = _PATIENCE
        try:
            yield
        finally:
            with self._lock:
                self._patience = 1.0
                self._waited = 0.0

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 10)
        before = time.monotonic()
        while not self._closed.wait(tick):
            now = time.monotonic()
            with self._lock:
                # The time for which the process was suspended does not count.
                self._waited += min(now - before, 2 * tick)
                if self._awaited is not None:
                    awaited = self._awaited()
                    if awaited is None or awaited != self._last:
                        self._waited = 0.0
                    self._last = awaited
                stalled = self._waited > self._limit * self._patience
                message = f"no progress for {self._waited:.0f} s, waiting for {self._what}"
            before = now
            if stalled:
                self._abort(message)
                return

    def _abort(self, message: str) -> None:
        # In a thread, since writing to standard error may hang, too.
        printing = threading.Thread(target=self._print, args=(message,), daemon=True)
        printing.start()
        printing.join(5)
        try:
            self._before_exit()
        finally:
            self._end(3)

    def _print(self, message: str) -> None:
        files = self.files()
        reading = f"; being read: {', '.join(files)}" if files else ""
        advice = f"; {self.advice}" if self.advice else ""
        name = f"{self.name}: " if self.name else ""
        print(f"{name}error: {message}{reading}{advice}", file=sys.stderr, flush=True)
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)


def reading_watchdog(seconds: float, name: str, advice: str) -> Watchdog:
    """A watchdog for files that take longer than `seconds` to read."""
    return Watchdog(
        seconds,
        name=name,
        files=READINGS.files,
        advice=advice,
        awaited=READINGS.oldest,
        what="a file to be read",
    )
