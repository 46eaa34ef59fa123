"""Command lines run as a user runs them, and what is left of them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "MIT_SEMSEG_TEST_COMMAND"

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").is_file(), reason="processes are looked up in /proc"
)


class Command:
    """A command with all its descendants, whatever sessions they are in: all bear its mark.

    Args:
        words: the command, run in the repository's root.
        log: file that standard output and standard error go to.
        environment: variables beside the inherited ones.
    """

    def __init__(self, words: Sequence[str | Path], log: Path, **environment: str) -> None:
        self.log = log
        self.mark = f"{MARK}={uuid.uuid4().hex}".encode()
        name, value = self.mark.decode().split("=")
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    "PYTHONUNBUFFERED": "1",
                    **environment,
                    name: value,
                },
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self, *words: str) -> list[int]:
        """Living processes whose command line holds all the words, without those that ended."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if self.mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # gone meanwhile
                continue
            if state not in "ZX" and all(word in line for word in words):
                found.append(int(folder.name))
        return sorted(found)

    def until(self, ready: Callable[[], object], seconds: float = 60) -> float:
        """Wait for a condition; seconds it took. Fails when the command ends before."""
        began = time.monotonic()
        while not ready():
            assert self.process.poll() is None, f"it ended too early:\n{self.output}"
            assert time.monotonic() - began < seconds, f"not within {seconds} s:\n{self.output}"
            time.sleep(0.05)
        return time.monotonic() - began

    def until_said(self, pattern: str, seconds: float = 60) -> float:
        """Wait until the output matches."""
        return self.until(lambda: re.search(pattern, self.output), seconds)

    def code(self, seconds: float = 60) -> int:
        """Exit status, once the command has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.output}")

    def assert_nothing_left(self, seconds: float = 10) -> None:
        """Within the time no process of the command lives."""
        deadline = time.monotonic() + seconds
        while left := self.members():
            assert time.monotonic() < deadline, f"still there: {left}\n{self.output}"
            time.sleep(0.05)

    def end(self) -> None:
        """Kill whatever is left."""
        for _ in range(50):
            members = self.members()
            if not members and self.process.poll() is not None:
                return
            for pid in members:
                kill(pid)
            self.process.poll()
            time.sleep(0.05)


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
