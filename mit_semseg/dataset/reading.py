"""Tracks which files are being read, so that the watchdog can name the file of a stalled read."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mit_semseg.files import PathLike


class Readings:
    """Files that the threads of this process are reading.

    Attributes:
        listener: called in the reading thread with the path of a file before it is read, or when
            its reading continues after another file, and with "" when the thread reads no file.
    """

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None
        self._files: dict[int, tuple[int, str]] = {}  # thread -> number, path
        self._numbers = itertools.count()

    @contextmanager
    def of(self, path: PathLike) -> Iterator[None]:
        """Context in which the calling thread reads `path`; contexts can be nested."""
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

        Numbers are unique.
        """
        return min(list(self._files.values()), default=None)

    def files(self) -> list[str]:
        """Files being read now, one for each thread."""
        return [path for _, path in list(self._files.values())]


READINGS = Readings()
