"""One run at a time in a folder, and the job that it belongs to."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import IO

from mit_semseg.engine.checkpoint import make_writable

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("mit_semseg")

LOCK = ".lock"
JOB = ".job"
# Folders that runs of this process use: its locks keep out other processes only.
_LOCKED: set[Path] = set()


class RunLock:
    """Keeps every other run out of a folder while this one lives.

    Args:
        folder: made when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Make the folder, and lock it.

        Raises:
            ValueError: another run is using the folder.
            OSError: the folder cannot be made or written to.
        """
        make_writable(self.folder, "DIR")
        place = self.folder.resolve()
        if place in _LOCKED:
            raise ValueError(
                f"{self.folder} is in use by another run of this process: end it first"
            )
        lock = open(self.folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        if fcntl is not None:
            try:
                # Of this process alone: children that outlive it hold nothing.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                lock.close()
                raise ValueError(
                    f"{self.folder} is in use by {holder}: wait for it, end it, or give another DIR"
                ) from error
            except OSError as error:
                log.warning("nothing keeps other runs out of %s (%s)", self.folder, error.strerror)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._file = lock
        _LOCKED.add(place)

    def release(self) -> None:
        """Let other runs use the folder again."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _LOCKED.discard(self.folder.resolve())

    def job(self) -> str:
        """Which job of torchrun has a run here that is not completed; "" for none."""
        file = self.folder / JOB
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def note_job(self, job: str) -> None:
        """Write down whose run this is; "" when it is completed."""
        if job:
            (self.folder / JOB).write_text(job, encoding="utf-8")
        else:
            (self.folder / JOB).unlink(missing_ok=True)
