"""One process per device of a command, started with torch's elastic launcher.

The command starts itself once per device (`start`). A rank runs as under torchrun, but reports its
exit status and error to the command (`report`), which prints one error for all ranks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mit_semseg.errors import REPORTS, exit_cause
from mit_semseg.files import replacing

if TYPE_CHECKING:
    import torch


def started_here() -> bool:
    """Whether this process is a rank started by a command of this package, not by torchrun."""
    return REPORTS in os.environ


def wanted(parallel: str, devices: Sequence[torch.device]) -> bool:
    """Whether this command has to start one process per device.

    Args:
        parallel: `TRAIN.parallel`.
        devices: of the command.

    Raises:
        ValueError: `parallel` is processes or fsdp, and torch has no backend for these devices.
    """
    if "RANK" in os.environ or len(devices) == 1 or parallel == "replicas":
        return False
    import torch.distributed as dist

    on_gpus = devices[0].type == "cuda"
    able = dist.is_available() and (dist.is_nccl_available() if on_gpus else True)
    if parallel != "auto" and not able:
        raise ValueError(
            f"TRAIN.parallel {parallel} needs a torch with NCCL, which this one lacks: set "
            "TRAIN.parallel replicas"
        )
    return able and (on_gpus or parallel != "auto")


def start(words: Sequence[str], count: int, patience: int) -> int:
    """Run this command in `count` ranks and wait for them.

    SIGINT and SIGTERM are forwarded to the ranks, which finish their step and save.

    Args:
        words: arguments of this command.
        count: number of ranks.
        patience: seconds for the ranks to end after a signal; older versions of torch, without
            TORCH_ELASTIC_SHUTDOWN_TIMEOUT, use 30.

    Returns:
        The exit status.

    Raises:
        ChildProcessError: a rank failed; the message is that of the rank that failed first.
        KeyboardInterrupt: a rank was interrupted.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher logs every signal and failure in many lines.
    log = logging.getLogger("torch.distributed.elastic")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="none",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    python, *rest = _command(words)
    codes: dict[int, int] = {}
    caught = 0
    with tempfile.TemporaryDirectory(prefix="mit_semseg_") as folder:
        with _handlers_kept(), _environment(folder, count, patience):
            try:
                elastic_launch(config, python)(*rest)
            except ChildFailedError as error:
                codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            except SignalException as error:
                caught = int(error.sigval)
        reports = {int(file.stem): _read(file) for file in Path(folder).glob("*.json")}
    return _status(reports, codes, count, caught)


def _command(words: Sequence[str]) -> list[str]:
    """The command line of this process, or an equivalent one if a program called the command."""
    if sys.argv[1:] in (list(words), list(words)[1:]):
        return [sys.executable, *sys.orig_argv[1:]]
    return [sys.executable, "-m", "mit_semseg.cli", *words]


@contextmanager
def _environment(folder: str, count: int, patience: int) -> Iterator[None]:
    """Set environment variables for launcher and ranks."""
    from mit_semseg.engine.cpu import cpu_count

    before = dict(os.environ)
    os.environ[REPORTS] = folder
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(patience)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // count)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restore the signal handlers that the launcher replaces, and keep ignored signals ignored.

    Otherwise a run started with nohup, or in a shell's background, would end with the terminal.
    """
    replace = signal.signal
    before: dict[Any, Any] = {}

    def noted(number: Any, handler: Any) -> Any:
        now = signal.getsignal(number)
        if now is signal.SIG_IGN:
            return now
        before.setdefault(number, now)
        return replace(number, handler)

    signal.signal = noted  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = replace
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Report:
    """The end of a rank.

    Attributes:
        status: exit status.
        error: message; "" without an error.
        lost: whether the error is only the loss of another rank.
        time: in seconds since 1970.
    """

    status: int
    error: str = ""
    lost: bool = False
    time: float = 0.0


def report(status: int, error: str = "", lost: bool = False) -> None:
    """Report the end of this rank to the command that started it."""
    file = Path(os.environ[REPORTS]) / f"{os.environ['RANK']}.json"
    one = Report(status, error, lost, time.time())
    try:
        with replacing(file) as part:
            part.write_text(json.dumps(asdict(one)), encoding="utf-8")
    except OSError:  # the command has ended and removed the folder
        print(f"rank {file.stem}: {error}", file=sys.stderr)


def _read(file: Path) -> Report:
    return Report(**json.loads(file.read_text(encoding="utf-8")))


def _status(
    reports: Mapping[int, Report], codes: Mapping[int, int], count: int, caught: int
) -> int:
    """The exit status of the command.

    Args:
        reports: by rank; missing for ranks that were killed.
        codes: exit codes of failed ranks, from the launcher.
        count: number of ranks.
        caught: the signal that ended the launcher, or 0.
    """
    causes = {rank: one for rank, one in reports.items() if one.error and not one.lost}
    if causes:
        rank = min(causes, key=lambda rank: causes[rank].time)
        raise ChildProcessError(f"rank {rank}: {causes[rank].error}")
    silent = {rank: code for rank, code in codes.items() if rank not in reports}
    for rank, code in silent.items():
        if code < 0:
            raise ChildProcessError(
                f"rank {rank} was ended by {exit_cause(code)}; --resume auto "
                "resumes from the newest checkpoint"
            )
        return code  # the rank itself has printed why
    for rank, one in reports.items():
        if one.error:
            raise ChildProcessError(f"rank {rank}: {one.error}")
    if caught and len(reports) < count:
        return 128 + caught
    status = max((one.status for one in reports.values()), default=0)
    if status == 130:
        raise KeyboardInterrupt
    return status
