"""One command that starts a process for each of its devices, beside one with a thread for each."""

import re
import signal
import sys

import pytest
import torch
from jobs import ENVIRONMENT, SIZES, Job, figures_of, layout, phrases, steps_of
from processes import Command, kill, needs_proc
from small_runs import SMALL

from mit_semseg.cli import main
from mit_semseg.engine import devices, processes
from mit_semseg.models import ENCODERS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# As train.py on a machine with two devices.
SCRIPT = """
import sys, torch
from mit_semseg.engine import devices

import small_runs
small_runs.register()
devices.resolve_devices = lambda gpus, option="--gpus": [torch.device("cpu")] * 2
from mit_semseg.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
LONG = {"TRAIN__num_epoch": 200, "TRAIN__eval_epochs": 0, "TRAIN__keep": 1}
RANK = "two_devices.py"


@pytest.fixture
def job(tmp_path, make_images):
    job = Job(tmp_path)
    make_images(job.data, SIZES)
    return job


@pytest.fixture
def start(job):
    """`start(name, KEY=value)` -> a training in two processes, and its folder."""
    (job.root / RANK).write_text(SCRIPT)
    commands = []

    def begin(name, **changes):
        config = job.config(name, TRAIN__parallel="processes", **changes)
        nohup = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
        words = [*nohup, sys.executable, job.root / RANK, "--cfg", config]
        commands.append(Command(words, job.root / f"{name}.txt", **ENVIRONMENT))
        return commands[-1], job.root / name

    yield begin
    for command in commands:
        command.destroy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"TRAIN__accumulate": 2, "TRAIN__activation_checkpointing": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "accumulated and checkpointed"],
)
def test_processes_leave_the_files_of_replicas(job, start, monkeypatch, changes):
    command, ranks = start("ranks", **changes)
    assert command.code(120) == 0, command.text()
    assert command.text().count("Training done: ") == 1
    for encoder, kind in SMALL.items():
        monkeypatch.setitem(ENCODERS._entries, encoder, kind)
    monkeypatch.setattr(devices, "resolve_devices", lambda *args, **options: [CPU] * 2)
    config = job.config("threads", TRAIN__parallel="replicas", **changes)
    assert main(["train", "--cfg", str(config)]) == 0
    threads = job.root / "threads"
    assert layout(threads) == layout(ranks)
    assert phrases(threads) == phrases(ranks)
    for line in (ranks / "log.txt").read_text().splitlines():
        assert re.match(r"\[[-\d]+ [:\d]+ [A-Z]+\] ", line), "no line names a rank"
    # BatchNorm and loss of both are those of the union of the two batches.
    losses = [figures_of(folder)[0]["loss"] for folder in (ranks, threads)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@needs_proc
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_to_the_command_saves_the_state(number, start):
    command, folder = start("stopped", **LONG)
    command.until(lambda: len(steps_of(folder)) >= 1, 120)
    command.process.send_signal(signal.SIGHUP)  # which nohup has told it to ignore
    command.until(lambda: len(steps_of(folder)) >= 3, 120)
    command.process.send_signal(number)
    assert command.code(40) == 0, command.text()
    command.assert_nothing_left(2)
    output = command.text()
    assert output.count("finishing this step") == 1
    (step,) = re.findall(rf"Stopped by {number.name} after step (\d+) of 600", output)
    assert (folder / f"state_step_{step}.pth").is_file()
    assert f"python {folder.parent / RANK} --resume auto" in output, "not a line for torchrun"
    assert "elastic" not in output and "Traceback" not in output


@needs_proc
def test_an_error_in_ranks_is_reported_once(start):
    command, _ = start("broken", TRAIN__compile=True)
    assert command.code(120) == 2, command.text()
    command.assert_nothing_left(2)
    (line,) = command.text().strip().splitlines()
    assert re.match(r"error: rank \d: TRAIN.compile with 2 devices: ", line)


@needs_proc
def test_a_killed_rank_ends_the_command(start):
    command, folder = start("killed", **LONG)
    command.until(lambda: len(steps_of(folder)) >= 1, 120)
    ranks = [pid for pid in command.members(RANK) if pid != command.process.pid]
    assert len(ranks) == 2
    kill(ranks[1])
    assert command.code(40) == 2, command.text()
    command.assert_nothing_left(2)
    (error,) = [line for line in command.text().splitlines() if "error: " in line]
    assert "was ended by signal SIGKILL; --resume auto" in error


@needs_proc
def test_ranks_stop_when_the_command_is_killed(start):
    command, folder = start("orphans", **LONG)
    command.until(lambda: len(steps_of(folder)) >= 1, 120)
    kill(command.process.pid)
    command.process.wait(10)
    command.assert_nothing_left(30)
    assert list(folder.glob("state_step_*.pth"))


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
    if not nccl:
        with pytest.raises(ValueError, match="TRAIN.parallel replicas"):
            processes.wanted("processes", [GPU] * 2)
    monkeypatch.setenv("RANK", "0")
    assert not processes.wanted(parallel, devices), "a rank starts none"


def report(error="", lost=False, time=0.0):
    return processes.Report(2 if error else 0, error, lost, time)


LOST = report("lost", True, 1)


@pytest.mark.parametrize(
    ("reports", "codes", "caught", "outcome"),
    [
        ([LOST, report("no such file", time=2)], {}, 0, "rank 1: no such f"),
        ([report("second", time=3), report("first", time=2)], {}, 0, "rank 1: first"),
        ([LOST], {0: 2, 1: -9}, 0, "rank 1 was ended by signal SIGKILL"),
        ([LOST], {0: 2}, 0, "rank 0: lost"),
        ([report(), report()], {}, 0, 0),
        ([report(), report()], {}, 2, 0),  # stopped, and all is saved
        ([], {}, 2, 130),  # before the first step
        ([LOST], {1: 3}, 0, 3),  # its watchdog has said why
    ],
)
def test_the_cause_and_the_exit_status_of_all_ranks(reports, codes, caught, outcome):
    reports = dict(enumerate(reports))
    if isinstance(outcome, int):
        assert processes._status(reports, codes, 2, caught) == outcome
    else:
        with pytest.raises(ChildProcessError, match=outcome):
            processes._status(reports, codes, 2, caught)
