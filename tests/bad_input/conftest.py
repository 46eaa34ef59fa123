"""A small trained model, commands run as a user would, and an eye on what else they touch."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from mit_semseg.cli import main

SECONDS = 240  # none of these tests takes a tenth of it, unless something hangs


@pytest.fixture(autouse=True)
def no_hang():
    """A test that hangs fails, with the line it hangs at."""

    def ring(*_):
        pytest.fail(f"no end after {SECONDS} s")  # no Exception: no code under test catches it

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def model(tmp_path_factory, make_model):
    """A model of three classes in a checkpoint folder, whose `config.yaml` runs it."""
    folder = tmp_path_factory.mktemp("model") / "ckpt"
    return make_model(folder, ("sky", "road", "tree"), TRAIN__workers=0)


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self):
        """The one line it ended with."""
        assert self.code == 2, self
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and len(lines[0]) < 500, self.err
        assert self.err.rstrip().endswith(lines[0])
        return lines[0]


@pytest.fixture
def command(capfd):
    """`command("predict", "--imgs", ...)` in this process; no traceback ever."""

    def run(*words):
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err, out + err
        assert "Logging error" not in err, err
        return Outcome(code, out, err)

    return run


def listing(folder, but=None):
    """Everything below a folder, with sizes and times; nothing of the folder `but`."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(place, name) != but]
        for name in folders + files:
            path = os.path.join(place, name)
            state = os.lstat(path)
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            found[path] = (0, 0) if is_folder else (state.st_size, state.st_mtime_ns)
    return found


@pytest.fixture
def untouched(tmp_path):
    """`with untouched(but=folder):` nothing else below the test's folder may change."""

    @contextlib.contextmanager
    def watch(but=None):
        before = listing(tmp_path, but)
        yield
        assert listing(tmp_path, but) == before

    return watch
