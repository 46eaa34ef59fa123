"""Which files are being read, so that somebody else can tell what a slow process waits for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Readings:
    """Files that the threads of this process are reading.

    Attributes:
        listener: called in the thread that reads: with the path of each file just before it is
            read, or read on after another one, and with "" when the thread reads none any more.
    """

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None
        self._files: dict[int, str] = {}

    @contextmanager
    def of(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """The calling thread reads `path`; one file may be read while another is open."""
        thread = threading.get_ident()
        before = self._files.get(thread, "")
        self._note(thread, os.fspath(path))
        try:
            yield
        finally:
            self._note(thread, before)

    def _note(self, thread: int, path: str) -> None:
        if path:
            self._files[thread] = path
        else:
            self._files.pop(thread, None)
        if self.listener is not None:
            self.listener(path)

    def files(self) -> list[str]:
        """What is being read now, a file for each thread."""
        return list(self._files.values())


READINGS = Readings()
