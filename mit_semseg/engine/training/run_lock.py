"""A lock on a checkpoint folder, and the name of the job whose run is in it."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from mit_semseg.engine.checkpoint import make_writable

log = logging.getLogger("mit_semseg")

LOCK = ".lock"
# Names the process with the lock. Not in the lock file, which is unreadable on Windows.
HOLDER = ".lock-holder"
JOB = ".job"


class RunLock:
    """Prevents two runs in one folder.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        folder: created when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A soft lock (a file that exists) would stay after a process is killed.
        self._lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
        self._acquired = False

    def acquire(self) -> None:
        """Create the folder and lock it.

        Raises:
            ValueError: another run is using the folder.
            OSError: the folder cannot be created or written to.
        """
        make_writable(self.folder, "DIR")
        holder, this = self.folder / HOLDER, f"process {os.getpid()} on {socket.gethostname()}"
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            name = holder.read_text("utf-8").strip() if holder.is_file() else ""
            if name == this:
                raise ValueError(
                    f"{self.folder} is in use by another run of this process: wait until it ends"
                ) from error
            raise ValueError(
                f"{self.folder} is in use by {name or 'another process'}: wait for it, stop it, or "
                "set another DIR"
            ) from error
        except (OSError, NotImplementedError) as error:  # a file system without locks
            log.warning("cannot lock %s (%s): do not start another run in it", self.folder, error)
        self._acquired = True
        holder.write_text(this + "\n", "utf-8")

    def release(self) -> None:
        """Release the lock."""
        if self._acquired:
            self._acquired = False
            (self.folder / HOLDER).unlink(missing_ok=True)
            self._lock.release()

    def job(self) -> str:
        """Name of the torchrun job whose run in this folder is not complete; "" for none."""
        file = self.folder / JOB
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def write_job(self, job: str) -> None:
        """Store the name of this run's job; "" when the run is complete."""
        if job:
            (self.folder / JOB).write_text(job, encoding="utf-8")
        else:
            (self.folder / JOB).unlink(missing_ok=True)
