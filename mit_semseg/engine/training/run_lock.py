"""One run at a time in a folder, and the job that it belongs to."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from mit_semseg.engine.checkpoint import make_writable

log = logging.getLogger("mit_semseg")

LOCK = ".lock"
# Who has the lock. Not in the file itself, which others cannot read while it is locked on Windows.
HOLDER = ".lock-holder"
JOB = ".job"


class RunLock:
    """Keeps every other run out of a folder while this one lives.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        folder: made when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A soft lock, a file that merely exists, would outlive a process that was killed.
        self._lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
        self._acquired = False

    def acquire(self) -> None:
        """Make the folder, and lock it.

        Raises:
            ValueError: another run is using the folder.
            OSError: the folder cannot be made or written to.
        """
        make_writable(self.folder, "DIR")
        holder, this = self.folder / HOLDER, f"process {os.getpid()} on {socket.gethostname()}"
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            name = holder.read_text("utf-8").strip() if holder.is_file() else ""
            if name == this:
                raise ValueError(
                    f"{self.folder} is in use by another run of this process: end it first"
                ) from error
            raise ValueError(
                f"{self.folder} is in use by {name or 'another process'}: wait for it, end it, or "
                "give another DIR"
            ) from error
        except (OSError, NotImplementedError) as error:  # of file systems without locks
            log.warning("nothing keeps other runs out of %s (%s)", self.folder, error)
        self._acquired = True
        holder.write_text(this + "\n", "utf-8")

    def release(self) -> None:
        """Let other runs use the folder again."""
        if self._acquired:
            self._acquired = False
            (self.folder / HOLDER).unlink(missing_ok=True)
            self._lock.release()

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
