"""Signals: stopping after the current step, and ending worker processes with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from mit_semseg.engine.processes import started_here

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within this context SIGTERM and SIGINT are recorded and do not end the process.

    A second SIGINT raises KeyboardInterrupt. Only in the main thread, the only one in which Python
    handles signals. Can be entered once.

    Args:
        repeated: ignore further signals, since torchrun repeats them.
        on_stop: called in the signal handler, once.

    Attributes:
        signal: name of the signal received; "" for none.
    """

    def __init__(self, repeated: bool = False, on_stop: Callable[[], None] | None = None) -> None:
        self.signal = ""
        self._repeated = repeated
        self._on_stop = on_stop
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                # Signals ignored by nohup or a background shell stay ignored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        # Break the reference cycle with the object that owns the callback, so that the memory of a
        # training is freed at once.
        self._on_stop = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if number == signal.SIGINT and not self._repeated:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number).name
        # All ranks started by a command receive the signal; only rank 0 prints the message.
        if not started_here() or os.environ["RANK"] == "0":
            # Not with print, which the signal may have interrupted.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _message(self.signal))
        if self._on_stop is not None:
            self._on_stop()


def _message(name: str) -> bytes:
    return f"\n{name}: finishing this step, then saving\n".encode()


def ignore_stops() -> None:
    """Ignore stop signals from now on, so that they do not change the exit status."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def leave_to_parent() -> None:
    """Ignore stop signals in a worker process, and end it with its parent."""
    ignore_stops()
    die_with_parent(signal.SIGKILL)


def die_with_parent(number: signal.Signals) -> None:
    """Send this process a signal when its parent dies; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), number)
