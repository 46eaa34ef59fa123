"""Signals: a run that is asked to stop finishes its step, and no process outlives its parent."""

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
    """Within this context SIGTERM and SIGINT ask instead of ending the process.

    The second SIGINT of a person at the terminal interrupts at once. Elsewhere than in the main
    thread, where Python takes no signals, nothing is changed and nobody asks.

    For one `with` only.

    Args:
        repeated: whoever sends signals repeats them (torchrun): only the first one counts.
        on_ask: called once, in the signal handler.

    Attributes:
        asked: name of the signal that came, "" before.
    """

    def __init__(self, repeated: bool = False, on_ask: Callable[[], None] | None = None) -> None:
        self.asked = ""
        self._repeated = repeated
        self._on_ask = on_ask
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                # What nohup or a shell has told to be ignored stays so.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        # Whoever is called owns this object as a rule: without the circle the memory of both, a
        # whole training's, is free as soon as nobody needs it.
        self._on_ask = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT and not self._repeated:
                raise KeyboardInterrupt
            return
        self.asked = signal.Signals(number).name
        # Of ranks that a command has started all are asked, and the first one speaks for them.
        if not started_here() or os.environ["RANK"] == "0":
            # Not through print: the signal may have come in the middle of one.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _said(self.asked))
        if self._on_ask is not None:
            self._on_ask()


def _said(name: str) -> bytes:
    return f"\n{name}: finishing this step, then saving\n".encode()


def ignore_stops() -> None:
    """From now on: of a process that is done, a signal would only spoil the exit status."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def leave_to_parent() -> None:
    """For worker processes: signals to the whole group are the parent's business, whose end is
    theirs too."""
    ignore_stops()
    die_with_parent(signal.SIGKILL)


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies; on Linux only."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be asked for
        os.kill(os.getpid(), number)
