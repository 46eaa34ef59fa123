"""Command lines run as a user runs them, and what is left of them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mit_semseg.selftest.job import Running

ROOT = Path(__file__).resolve().parents[2]

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").is_file(), reason="processes are looked up in /proc"
)


class Command(Running):
    """A command with all its descendants, with the package of this repository and one thread.

    Args:
        words: the command.
        log: file that standard output and standard error go to.
        environment: variables beside the inherited ones.
    """

    def __init__(self, words: Sequence[str | Path], log: Path, **environment: str) -> None:
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        super().__init__(list(map(str, words)), log, cwd=ROOT, **{**fixed, **environment})

    def members(self, *words: str) -> list[int]:
        """Living processes whose command line holds all the words."""
        return [pid for pid in super().members() if all(word in line_of(pid) for word in words)]

    def until(self, ready: Callable[[], object], seconds: float = 60) -> float:
        """Wait for a condition; seconds it took. Fails when the command ends before."""
        began = time.monotonic()
        while not ready():
            assert self.process.poll() is None, f"it ended too early:\n{self.text()}"
            assert time.monotonic() - began < seconds, f"not within {seconds} s:\n{self.text()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def until_said(self, pattern: str, seconds: float = 60) -> float:
        """Wait until the output matches."""
        return self.until(lambda: re.search(pattern, self.text()), seconds)

    def code(self, seconds: float = 60) -> int:
        """Exit status, once the command has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.text()}")

    def assert_nothing_left(self, seconds: float = 10) -> None:
        """Within the time no process of the command lives."""
        deadline = time.monotonic() + seconds
        while left := self.members():
            assert time.monotonic() < deadline, f"still there: {left}\n{self.text()}"
            time.sleep(0.05)


def line_of(pid: int) -> str:
    """The command line of a process; empty when it is gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(pid: int) -> None:
    """SIGKILL, also where the process has just gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def torchrun(*options: str) -> list[str]:
    """The words of a torchrun command, in the interpreter of the tests."""
    return [sys.executable, "-m", "torch.distributed.run", *options]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
