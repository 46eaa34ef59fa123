"""Signals: the first asks, the second of a person interrupts, and orphans do not live on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mit_semseg.engine.signals import StopRequest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_interrupts(number, capfd):
    before = signal.getsignal(number)
    called = []
    with StopRequest(on_ask=lambda: called.append(1)) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # whoever repeats SIGTERM is not impatient
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert called == [1]
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing this step" in capfd.readouterr().err


def test_repeated_signals_of_a_launcher_count_once():
    with StopRequest(repeated=True) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked == "SIGINT"


def test_in_another_thread_nothing_is_touched():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run():
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does it on Linux only")
def test_a_worker_ignores_the_group_and_dies_with_its_parent(tmp_path):
    worker = (
        "import time; from mit_semseg.engine.signals import leave_to_parent\n"
        "leave_to_parent(); print('ready', flush=True); time.sleep(100)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {worker!r}], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(100)"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert running.stdout is not None
    pid = int(running.stdout.readline())
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert _lives(pid)
    running.kill()
    running.wait()
    end = time.monotonic() + 10
    while _lives(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(pid)


def test_a_signal_to_a_process_that_is_done_changes_nothing():
    done = (
        "import atexit, time; from mit_semseg.engine.signals import ignore_stops\n"
        "atexit.register(lambda: (print('ending', flush=True), time.sleep(1)))\n"
        "atexit.register(ignore_stops)"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", done], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert running.stdout is not None
    running.stdout.readline()
    running.send_signal(signal.SIGTERM)
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 0


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
