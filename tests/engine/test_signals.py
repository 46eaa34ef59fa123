"""Signals: the first asks, the second of a person interrupts, and orphans do not live on."""

import os
import signal
import threading
import time

import psutil
import pytest
from processes import exit_codes, forkserver, needs_proc

from mit_semseg.engine.signals import StopRequest, ignore_stops, leave_to_parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_interrupts(number, capfd):
    before = signal.getsignal(number)
    called = []
    with StopRequest(on_stop=lambda: called.append(1)) as stop:
        assert not stop.signal
        os.kill(os.getpid(), number)
        assert stop.signal == number.name
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
    assert stop.signal == "SIGINT"


def test_outside_the_main_thread_handlers_stay():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run():
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def wait_for_signals(rank, pids):
    """A process with a worker that is left to it; the worker says when it is ready."""
    ready, started = os.pipe()
    worker = os.fork()
    if not worker:
        leave_to_parent()
        os.write(started, b"ready")
        time.sleep(100)
    os.read(ready, 5)
    pids.write_text(f"{os.getpid()} {worker}")
    time.sleep(100)


@needs_proc
def test_a_worker_ignores_the_group_and_dies_with_its_parent(tmp_path):
    pids = tmp_path / "pids"
    thread = threading.Thread(target=exit_codes, args=(wait_for_signals, 1, pids))
    thread.start()
    while not pids.is_file() or len(pids.read_text().split()) < 2:
        time.sleep(0.02)
    parent, worker = (psutil.Process(int(pid)) for pid in pids.read_text().split())
    worker.send_signal(signal.SIGTERM)
    worker.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    parent.kill()
    thread.join(20)
    psutil.wait_procs([worker], 10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def end_slowly(rank, ending):
    ignore_stops()
    ending.touch()
    time.sleep(0.5)


def test_a_finished_process_ignores_signals(tmp_path):
    process = forkserver().Process(target=end_slowly, args=(0, tmp_path / "ending"))
    process.start()
    while not (tmp_path / "ending").exists():
        time.sleep(0.02)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 0
