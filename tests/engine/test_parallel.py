"""One command that starts a process for each of its devices, beside one with a thread for each."""

import json
import re
import signal
import sys

import pytest
import torch
from jobs import SIZES, Job, layout, phrases, steps_of
from processes import Command, kill, needs_proc

from mit_semseg.engine import processes

# As train.py on a machine with two devices.
SCRIPT = """
import sys, torch
from mit_semseg.engine import devices

devices.resolve_devices = lambda gpus, option="--gpus": [torch.device("cpu")] * 2
from mit_semseg.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
LONG = {"TRAIN__num_epoch": 200, "TRAIN__eval_epochs": 0, "TRAIN__keep": 1}
RANK = "two_devices.py"


@pytest.fixture
def start(tmp_path, make_images):
    """`start(name, parallel, KEY=value)` -> a training on two devices, and its folder."""
    job = Job(tmp_path)
    make_images(job.data, SIZES)
    (tmp_path / RANK).write_text(SCRIPT)
    commands = []

    def begin(name, parallel, **changes):
        config = job.config(name, TRAIN__parallel=parallel, **changes)
        nohup = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
        words = [*nohup, sys.executable, tmp_path / RANK, "--cfg", config]
        commands.append(Command(words, tmp_path / f"{name}.txt"))
        return commands[-1], tmp_path / name

    yield begin
    for command in commands:
        command.destroy()


def first_loss(folder):
    return float(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def test_processes_leave_what_replicas_leave(start):
    folders = []
    for parallel in ("replicas", "processes"):
        command, folder = start(parallel, parallel)
        assert command.code(120) == 0, command.text()
        assert command.text().count("Training done: ") == 1
        folders.append(folder)
    threads, ranks = folders
    assert layout(threads) == layout(ranks)
    assert phrases(threads) == phrases(ranks)
    for line in (ranks / "log.txt").read_text().splitlines():
        assert re.match(r"\[[-\d]+ [:\d]+ [A-Z]+\] ", line), "no line names a rank"
    # BatchNorm and loss of both are those of the union of the two batches.
    assert first_loss(ranks) == pytest.approx(first_loss(threads), rel=1e-4)


@needs_proc
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_to_the_command_saves_the_state(number, start):
    command, folder = start("stopped", "processes", **LONG)
    command.until(lambda: len(steps_of(folder)) >= 2, 120)
    command.process.send_signal(signal.SIGHUP)  # which nohup has told it to ignore
    command.until(lambda: len(steps_of(folder)) >= 4, 120)
    command.process.send_signal(number)
    assert command.code(40) == 0, command.text()
    command.assert_nothing_left(2)
    said = command.text()
    assert said.count("finishing this step") == 1
    (step,) = re.findall(rf"Stopped by {number.name} after step (\d+) of 600", said)
    assert (folder / f"state_step_{step}.pth").is_file()
    assert f"python {folder.parent / RANK} --resume auto" in said, "not a line for torchrun"
    assert "elastic" not in said and "Traceback" not in said


@needs_proc
def test_an_error_in_ranks_is_told_once(start):
    command, _ = start("broken", "processes", TRAIN__compile=True)
    assert command.code(120) == 2, command.text()
    command.assert_nothing_left(2)
    (line,) = command.text().strip().splitlines()
    assert re.match(r"error: rank \d: TRAIN.compile with 2 devices: ", line)


@needs_proc
def test_a_killed_rank_ends_the_command(start):
    command, folder = start("killed", "processes", **LONG)
    command.until(lambda: len(steps_of(folder)) >= 1, 120)
    ranks = [pid for pid in command.members(RANK) if pid != command.process.pid]
    assert len(ranks) == 2
    kill(ranks[1])
    assert command.code(40) == 2, command.text()
    command.assert_nothing_left(2)
    errors = [line for line in command.text().splitlines() if "error: " in line]
    assert len(errors) == 1 and "was ended by signal SIGKILL; --resume auto" in errors[0]


@needs_proc
def test_ranks_stop_when_the_command_is_killed(start):
    command, folder = start("orphans", "processes", **LONG)
    command.until(lambda: len(steps_of(folder)) >= 1, 120)
    kill(command.process.pid)
    command.process.wait(10)
    command.assert_nothing_left(30)
    assert list(folder.glob("state_step_*.pth"))


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("parallel", "devices", "nccl", "expected"),
    [
        ("auto", [GPU] * 2, True, True),
        ("auto", [GPU] * 2, False, False),
        ("auto", [GPU], True, False),
        ("auto", [CPU] * 2, True, False),
        ("processes", [CPU] * 2, False, True),
        ("processes", [CPU], True, False),
        ("replicas", [GPU] * 2, True, False),
    ],
)
def test_when_processes_are_started(parallel, devices, nccl, expected, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: nccl)
    assert processes.wanted(parallel, devices) is expected
    monkeypatch.setenv("RANK", "0")
    assert not processes.wanted(parallel, devices), "a rank starts none"


def test_processes_on_gpus_need_nccl(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="TRAIN.parallel replicas"):
        processes.wanted("processes", [GPU] * 2)


def report(error="", lost=False, time=0.0):
    return processes.Report(2 if error else 0, error, lost, time)


@pytest.mark.parametrize(
    ("reports", "codes", "message"),
    [
        ({0: report("lost", True, 1), 1: report("no such file", time=2)}, {}, "rank 1: no such f"),
        ({0: report("second", time=3), 1: report("first", time=2)}, {}, "rank 1: first"),
        ({0: report("lost", True)}, {0: 2, 1: -9}, "rank 1 was ended by signal SIGKILL"),
        ({0: report("lost", True)}, {0: 2}, "rank 0: lost"),
    ],
)
def test_the_cause_is_told(reports, codes, message):
    with pytest.raises(ChildProcessError, match=message):
        processes._status(reports, codes, 2, 0)


@pytest.mark.parametrize(
    ("reports", "codes", "caught", "status"),
    [
        ({0: report(), 1: report()}, {}, 0, 0),
        ({0: report(), 1: report()}, {}, 2, 0),  # stopped, and all is saved
        ({}, {}, 2, 130),  # before the first step
        ({0: report("lost", True)}, {1: 3}, 0, 3),  # its watchdog has said why
    ],
)
def test_the_exit_status_of_all_ranks(reports, codes, caught, status):
    assert processes._status(reports, codes, 2, caught) == status
