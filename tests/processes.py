"""Command lines run as a user runs them, and every process that comes of them."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from torch.multiprocessing import start_processes

ROOT = Path(__file__).resolve().parents[1]

needs_proc = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes die with their parents on Linux only"
)


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit status, negative for a signal.
        seconds: that it took from `Command.wait` on.
        left: processes of it that were still there 10 seconds later.
        output: standard output and standard error.
    """

    code: int
    seconds: float
    left: list[int]
    output: str

    @property
    def errors(self):
        """What follows `error: ` on a line, with a rank before it or without."""
        return re.findall(r"(?:rank \d+: )?error: .*", self.output)


class Command:
    """A command with all its descendants, with the package of this repository and one thread.

    Args:
        words: the command.
        log: file that standard output and standard error go to.
        environment: variables beside the inherited ones.
    """

    def __init__(self, words, log, **environment):
        # What it starts is known by this, whatever session and parent it takes.
        self.mark = str(uuid.uuid4())
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(map(str, words)),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell tells what it starts in the background to ignore Control-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                cwd=ROOT,
                env={**os.environ, **fixed, **environment, "STARTED_BY_TEST": self.mark},
            )

    def text(self):
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_running(self):
        """Whether the command itself has not ended."""
        return self.process.poll() is None

    def members(self, *words):
        """Its living processes whose command line holds all the words."""
        return [
            one.pid
            for one in self._processes()
            if not words or all(word in " ".join(_ask(one.cmdline) or []) for word in words)
        ]

    def workers(self):
        """Its descendants that multiprocessing has forked or spawned to work."""
        # Forked workers look like their parent; resource trackers and fork servers do not.
        lines = {one.pid: " ".join(_ask(one.cmdline) or []) for one in self._processes()}
        lines.pop(self.process.pid, None)
        return [
            pid for pid, line in lines.items() if not re.search("resource_tracker|forkserver", line)
        ]

    def memory_mib(self):
        """Memory that its processes have filled, shared pages divided among those who share them.

        Pages of files, such as torch's libraries, are left out: their shares change whenever any
        other process that uses torch comes or goes.
        """
        return sum(filled_mib(one) for one in self._processes())

    def _processes(self):
        return [
            one
            for one in psutil.process_iter()
            if (_ask(one.environ) or {}).get("STARTED_BY_TEST") == self.mark
        ]

    def until(self, ready, seconds=60):
        """Wait for a condition; seconds it took. Fails when the command ends before."""
        began = time.monotonic()
        while not ready():
            assert self.is_running(), f"it ended too early:\n{self.text()}"
            assert time.monotonic() - began < seconds, f"not within {seconds} s:\n{self.text()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def until_said(self, pattern, seconds=60):
        """Wait until the output matches."""
        return self.until(lambda: re.search(pattern, self.text()), seconds)

    def code(self, seconds=60):
        """Exit status, once the command has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.text()}")

    def wait(self, seconds=600):
        """Wait for its end, and up to 10 seconds for that of all its processes."""
        began = time.monotonic()
        code = self.code(seconds)
        took = time.monotonic() - began
        while (left := self.members()) and time.monotonic() - began < took + 10:
            time.sleep(0.05)
        self.destroy()
        return Ended(code, took, left, self.text())

    def assert_nothing_left(self, seconds=10):
        """Within the time no process of the command lives."""
        deadline = time.monotonic() + seconds
        while left := self.members():
            assert time.monotonic() < deadline, f"still there: {left}\n{self.text()}"
            time.sleep(0.05)

    def destroy(self):
        """End every process of it."""
        for pid in self.members():
            kill(pid)
        self.process.wait()


def _ask(question):
    """What psutil says of a process; None where it is gone, a zombie, or another user's."""
    with contextlib.suppress(psutil.Error):
        return question()
    return None


def filled_mib(process):
    """Memory that a process has filled, see `Command.memory_mib`; 0 when it is gone."""
    maps = _ask(process.memory_maps) or []
    return sum(one.pss for one in maps if not os.path.isfile(one.path)) / 2**20


def kill(pid):
    """SIGKILL, also where the process has just gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# Imported once, by the fork server; a new interpreter takes seconds to import each of them.
PRELOADED = ["torch._dynamo", "mit_semseg.engine.train", "mit_semseg.benchmarks.rows"]


def forkserver():
    """Starts processes as forks of one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_ranks(function, count, *arguments):
    """Run `function(rank, *arguments)` in forks of a process that has imported torch."""
    forkserver()
    start_processes(function, arguments, nprocs=count, start_method="forkserver")


def exit_codes(function, count, *arguments):
    """As `start_ranks`; how each of them has ended, None where it has not within two minutes."""
    ranks = [
        forkserver().Process(target=function, args=(rank, *arguments)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def torchrun(*options):
    """The words of a torchrun command, in the interpreter of the tests."""
    return [sys.executable, "-m", "torch.distributed.run", *options]


def free_port():
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
