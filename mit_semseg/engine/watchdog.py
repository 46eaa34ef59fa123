"""A watchdog: a run that makes no progress ends, and says what it was waiting for."""

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


class ReadingBoard:
    """Which file every loading process is reading, where the process that waits can see it.

    Memory without locks, which a process that dies could take with it.

    Args:
        readers: number of processes.
    """

    def __init__(self, readers: int) -> None:
        self.slots = [multiprocessing.RawArray("c", _PATH_BYTES) for _ in range(readers)]

    def writer(self, reader: int) -> Callable[[str], None]:
        """A function that notes the file which process number `reader` opens now; "" for none."""
        slot = self.slots[reader]

        def note(path: str) -> None:
            slot.value = os.fsencode(path)[-_PATH_BYTES + 1 :]

        return note

    def files(self) -> list[str]:
        """Files that are being read."""
        return [os.fsdecode(slot.value) for slot in self.slots if slot.value]


class Watchdog:
    """Ends the process when nothing moves for too long.

    What hangs may be a system call or a collective that no exception reaches, so the process is
    ended from a thread, with exit status 3, after a line that names what was waited for and a
    traceback of every thread.

    Args:
        seconds: the limit.
        name: of this process, in messages.
        files: what is being read, asked for when the limit is reached.
        advice: what to do, added to the message.
        awaited: what is waited for; time counts while it gives the same, and not while it gives
            None. Without it time counts from one `progress` to the next.
        what: that is, in words.
        at_the_end: called before the process ends, to take others along.
        end: ends the process; for tests.
    """

    def __init__(
        self,
        seconds: float,
        name: str = "",
        files: Callable[[], list[str]] = list,
        advice: str = "",
        awaited: Callable[[], object] | None = None,
        what: str = "the start",
        at_the_end: Callable[[], None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.seconds, self.name, self.files, self.advice = seconds, name, files, advice
        self._at_the_end, self._end = at_the_end, end
        self._awaited, self._what = awaited, what
        self._last: object = None
        # What counts the time and what sets it back are two threads; and a signal may come, and
        # call `shorten_limit`, in the middle of `progress`.
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
        """Something was done; `what` is waited for next."""
        with self._lock:
            self._what = what
            self._waited = 0.0

    def shorten_limit(self, seconds: float) -> None:
        """Wait this long at most from now on."""
        with self._lock:
            self._limit = min(self._limit, seconds)
            self._waited = 0.0

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Wait ten times as long for what may take its time, such as a large file."""
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
                # A process that was stopped and continued has not waited meanwhile.
                self._waited += min(now - before, 2 * tick)
                if self._awaited is not None:
                    awaited = self._awaited()
                    if awaited is None or awaited != self._last:
                        self._waited = 0.0
                    self._last = awaited
                stalled = self._waited > self._limit * self._patience
                said = f"no progress for {self._waited:.0f} s, waiting for {self._what}"
            before = now
            if stalled:
                self._abort(said)
                return

    def _abort(self, said: str) -> None:
        # Whoever reads standard error may hang as well: speak for some seconds at most.
        speech = threading.Thread(target=self._speak, args=(said,), daemon=True)
        speech.start()
        speech.join(5)
        try:
            self._at_the_end()
        finally:
            self._end(3)

    def _speak(self, said: str) -> None:
        files = self.files()
        reading = f"; being read: {', '.join(files)}" if files else ""
        advice = f"; {self.advice}" if self.advice else ""
        name = f"{self.name}: " if self.name else ""
        print(
            f"{name}error: {said}{reading}{advice}",
            file=sys.stderr,
            flush=True,
        )
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)


def reading_watchdog(seconds: float, name: str, advice: str) -> Watchdog:
    """A watchdog that minds nothing but a file which takes so many seconds to be read."""
    return Watchdog(
        seconds,
        name=name,
        files=READINGS.files,
        advice=advice,
        awaited=READINGS.oldest,
        what="a file to be read",
    )
