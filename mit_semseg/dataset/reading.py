"""Which files are being read, so that somebody else can tell what a slow process waits for."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PathLike = str | os.PathLike[str]


class Readings:
    """Files that the threads of this process are reading.

    Attributes:
        listener: called in the thread that reads: with the path of each file just before it is
            read, or read on after another one, and with "" when the thread reads none any more.
    """

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None
        self._files: dict[int, tuple[int, str]] = {}  # of each thread, numbered as they came
        self._numbers = itertools.count()

    @contextmanager
    def of(self, path: PathLike) -> Iterator[None]:
        """The calling thread reads `path`; one file may be read while another is open."""
        thread = threading.get_ident()
        before = self._files.get(thread)
        self._note(thread, (next(self._numbers), os.fspath(path)))
        try:
            yield
        finally:
            self._note(thread, before)

    def _note(self, thread: int, entry: tuple[int, str] | None) -> None:
        if entry is None:
            self._files.pop(thread, None)
        else:
            self._files[thread] = entry
        if self.listener is not None:
            self.listener(entry[1] if entry else "")

    def oldest(self) -> tuple[int, str] | None:
        """Number and path of the file that has been read for the longest time; None if none is.

        No two readings have the same number.
        """
        return min(list(self._files.values()), default=None)

    def files(self) -> list[str]:
        """What is being read now, a file for each thread."""
        return [path for _, path in list(self._files.values())]


READINGS = Readings()
