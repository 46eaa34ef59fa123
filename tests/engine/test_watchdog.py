"""The watchdog: silent while something moves, and precise about what does not."""

import multiprocessing
import threading
import time

import pytest

from mit_semseg.dataset.reading import READINGS
from mit_semseg.engine.watchdog import ReadingFiles, Watchdog, reading_watchdog


class Ended:
    """Stands for os._exit: notes the exit status, and lets the test go on."""

    def __init__(self):
        self.codes = []
        self.event = threading.Event()

    def __call__(self, code):
        self.codes.append(code)
        self.event.set()


def test_a_stall_names_what_is_awaited_and_read(capfd):
    end = Ended()
    files = lambda: ["a.jpg", "b.png"]  # noqa: E731
    with Watchdog(0.8, "rank 2", files, "raise TRAIN.stall_seconds", end=end) as dog:
        dog.progress("a batch of step 7")
        assert end.event.wait(10)
    assert end.codes == [3]
    output = capfd.readouterr().err
    line = next(line for line in output.splitlines() if "error:" in line)
    assert line == (
        "rank 2: error: no progress for 1 s, waiting for a batch of step 7; being read: "
        "a.jpg, b.png; raise TRAIN.stall_seconds"
    )
    assert "most recent call first" in output, "where every thread stands"


def test_progress_and_patience_prevent_a_stall():
    end = Ended()
    with Watchdog(0.4, end=end) as dog:
        for _ in range(6):
            dog.progress("the next")
            time.sleep(0.1)
        with dog.patient():
            time.sleep(0.6)
    time.sleep(0.6)
    assert not end.codes


def test_only_what_is_awaited_counts(capfd):
    end, current = Ended(), [None]
    with Watchdog(0.4, awaited=lambda: current[0], what="a file", end=end):
        time.sleep(0.6)  # nothing is awaited
        for number in range(5):
            current[0] = number
            time.sleep(0.12)
        assert not end.codes
        current[0] = "this one"
        assert end.event.wait(10)
    assert end.codes == [3]
    assert "waiting for a file" in capfd.readouterr().err


def test_a_file_counts_from_when_it_is_opened(capfd):
    end = Ended()
    with reading_watchdog(0.4, "rank 1", "look at it") as dog:
        dog._end = end
        time.sleep(0.6)
        for _ in range(5):
            with READINGS.of("quick.png"):
                time.sleep(0.1)
        assert not end.codes
        with READINGS.of("slow.png"):
            assert end.event.wait(10)
    output = capfd.readouterr().err
    assert "rank 1: error: no progress for " in output
    assert "waiting for a file to be read; being read: slow.png; look at it" in output


@pytest.mark.timeout(20)
def test_its_limit_can_be_shortened_at_any_moment():
    end = Ended()
    with Watchdog(60, end=end) as dog:
        dog.shorten_limit(0.2)
        assert end.event.wait(10)
    with Watchdog(60, end=Ended()) as dog, dog._lock:  # by a signal in the middle of `progress`
        dog.shorten_limit(30)


def _read(note, name, ready):
    note(name)
    ready.set()
    time.sleep(60)


def test_what_a_process_was_reading_when_it_died_is_known():
    shared = ReadingFiles(2)
    ready = multiprocessing.get_context("fork").Event()
    name = "/data/" + "x" * 2000 + "/ümlaut.jpg"
    process = multiprocessing.get_context("fork").Process(
        target=_read, args=(shared.writer(1), name, ready)
    )
    process.start()
    assert ready.wait(10)
    process.kill()
    process.join()
    assert len(shared.files()) == 1
    assert shared.files()[0].endswith("x/ümlaut.jpg"), "the end tells more than the beginning"
    shared.writer(1)("")
    assert shared.files() == []
