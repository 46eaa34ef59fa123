"""The pool of worker processes: every task once, and no process that outlives a run."""

import multiprocessing
import sys
import threading
import time

import pytest
from pool_work import squares, tensors
from processes import Command, kill, needs_proc

from mit_semseg.config import dump_config
from mit_semseg.engine.pool import WorkerError, run_here, run_pool


def test_pool_does_every_task_once():
    results = []
    finals = run_pool(squares, [10, 20], range(9), results.append)
    assert sorted(results) == [k * k for k in range(9)]
    assert [final[0] for final in finals] == [10, 20]
    assert sum(final[1] for final in finals) == 9
    here = []
    assert run_here(lambda tasks: squares(5, tasks), range(4), here.append) == (5, 4)
    assert here == [0, 1, 4, 9]


def test_tensors_come_back_from_processes_that_have_ended():
    results = []
    (final,) = run_pool(tensors, [5], [2, 3], results.append)
    assert [result.tolist() for result in results] == [[0, 1], [0, 1, 2]] and int(final) == 5


@pytest.mark.parametrize(
    ("poison", "error", "message"),
    [
        (-1, ChildProcessError, r"died with exit code 7 while working on .*image -1"),
        (-2, WorkerError, r"(?s)poisoned.*Traceback"),
    ],
)
def test_pool_ends_with_the_first_accident(poison, error, message):
    before = []
    with pytest.raises(error, match=message):
        run_pool(
            squares,
            [0],
            [1, poison, 2, 3],
            lambda _: before.append(time.monotonic()),
            describe=lambda task: f"image {task}",
        )
    assert len(before) == 1 and time.monotonic() - before[0] < 10
    assert not multiprocessing.active_children()


def test_pool_gives_up_on_a_hanging_worker():
    results, options = [], {"describe": lambda task: f"image {task}", "timeout": 3}
    with pytest.raises(TimeoutError, match=r"no answer from any worker for 3 s; .*image -3"):
        run_pool(squares, [0], [1, -3], results.append, **options)
    assert results == [1]
    assert not multiprocessing.active_children()


def test_an_error_of_the_caller_ends_the_threads_too():
    before = threading.active_count()

    def refuse(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_here(lambda tasks: squares(5, tasks), range(100), refuse)
    assert threading.active_count() == before


# ------------------------------------------------------------------------------ kills
WORKER = "spawn_main"  # in the command line of every worker process

SLEEPERS = """
import sys, time
from mit_semseg.engine.pool import run_pool

def sleep(setup, tasks):
    for task in tasks:
        print("asleep", flush=True)
        time.sleep(600)
        yield task

if __name__ == "__main__":
    run_pool(sleep, [0, 1], range(9), print)
"""


@needs_proc
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    command = Command([sys.executable, script], tmp_path / "log.txt")
    try:
        command.until(lambda: command.text().count("asleep") == 2)
        assert len(command.members(WORKER)) == 2
        kill(command.process.pid)
        command.code(5)
        command.assert_nothing_left(5)
    finally:
        command.destroy()


@needs_proc
@pytest.mark.slow  # a killed worker: test_evaluate.py; a killed parent: above
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_kill_ends_the_command_and_its_processes(victim, tmp_path, make_model, make_images):
    """Of 4000 images by two processes."""
    make_images(tmp_path, [(48, 64)] * 4)
    listing = tmp_path / "val.odgt"
    listing.write_text(listing.read_text() * 1000)
    lists = {"DATASET__root_dataset": str(tmp_path), "DATASET__list_val": str(listing)}
    cfg = make_model(tmp_path / "model", ("road", "sky", "car", "tree"), **lists)
    dump_config(cfg, tmp_path / "job.yaml")
    words = ["-m", "mit_semseg.cli", "eval", "--gpus", "cpu", "--workers", "2"]
    words = [sys.executable, *words, "--cfg", tmp_path / "job.yaml"]
    command = Command(words, tmp_path / "log.txt")
    try:
        command.until_said(r" [1-9]\d*/4000 ")
        workers = command.members(WORKER)
        assert len(workers) == 2
        began = time.monotonic()
        kill(workers[1] if victim == "worker" else command.process.pid)
        code = command.code(10)
        command.assert_nothing_left(10 - (time.monotonic() - began))
        assert code != 0
        if victim == "worker":
            assert f"(process {workers[1]}) died with signal SIGKILL" in command.text()
    finally:
        command.destroy()
