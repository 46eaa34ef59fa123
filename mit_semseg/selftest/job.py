"""A small job through the command line, in processes of its own that can be watched and broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from mit_semseg.config import dump_config, load_config
from mit_semseg.demo import streets
from mit_semseg.engine.training.checkpoints import RunFolder, load_state
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics
from mit_semseg.weights import check_archive

# What differs between two runs that are otherwise the same.
TIMES = ("images_per_second", "data_wait", "seconds")


@dataclass
class Ground:
    """Rendered scenes that the jobs of one selftest share.

    Attributes:
        folder: what everything is written below.
        decoder: of the jobs. `ppm_deepsup` has dropout, whose random numbers have to line up too;
            `c1_deepsup` is a sixth of its size, and so quicker to save.
    """

    folder: Path
    decoder: str = "ppm_deepsup"
    _unbroken: dict[str, Job] = field(default_factory=dict)

    def unbroken(self, data: Path | None = None, **settings: Any) -> Job:
        """The job that nothing happens to, trained at the first call.

        Raises:
            ChildProcessError: it does not succeed.
        """
        key = repr(sorted(settings.items()))
        if key not in self._unbroken:
            job = self.job(f"unbroken_{len(self._unbroken)}", data, **settings)
            finished = job.train()
            if finished.code:
                raise ChildProcessError(f"the unbroken job failed:\n{finished.output[-2000:]}")
            self._unbroken[key] = job
        return self._unbroken[key]

    def data(self, train: int = 24, val: int = 6, size: tuple[int, int] = (96, 128)) -> Path:
        """The scenes, rendered at the first call."""
        root = self.folder / f"scenes_{train}_{val}_{size[0]}x{size[1]}"
        if not (root / "validation.odgt").is_file():
            streets.write(root, train, val, 304, size)
        return root

    def job(self, name: str, data: Path | None = None, **settings: Any) -> Job:
        """A job that has done nothing yet, `SECTION__key=value` beside what makes it small."""
        root = data or self.data()
        base: dict[str, Any] = {
            "DIR": str(self.folder / name),
            "DATASET__root_dataset": str(root),
            "DATASET__list_train": str(root / "training.odgt"),
            "DATASET__list_val": str(root / "validation.odgt"),
            "DATASET__classes": str(root / "classes.csv"),
            "DATASET__num_class": 10,
            "DATASET__imgSizes": [48, 64],
            "DATASET__segm_downsampling_rate": 2,
            "MODEL__arch_encoder": "mobilenetv2dilated",
            "MODEL__arch_decoder": self.decoder,
            "MODEL__fc_dim": 320,
            "MODEL__weights_encoder": "none",
            "TRAIN__num_epoch": 2,
            "TRAIN__epoch_iters": 12,
            "TRAIN__optim": "AdamW",
            "TRAIN__lr_encoder": 0.002,
            "TRAIN__lr_decoder": 0.002,
            "TRAIN__ema": 0.9,
            "TRAIN__workers": 1,
            "TRAIN__keep": 1,
            "TRAIN__disp_iter": 5,
            "TRAIN__checkpoint_minutes": 0.01,
            "VAL__checkpoint": "best.pth",
            "VAL__imgSizes": [64],
        }
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Job(self.folder / f"{name}.yaml", {**base, **settings})


class Job:
    """A configuration file, and the commands that run it."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        opts: list[Any] = []
        for key, value in settings.items():
            opts += [key.replace("__", "."), value]
        self.cfg = load_config(None, opts)
        self.file = file
        dump_config(self.cfg, file)

    @property
    def folder(self) -> RunFolder:
        """Its checkpoint folder."""
        return RunFolder(self.cfg.DIR)

    def start(self, command: str, *options: str, launcher: Sequence[str] = ()) -> Running:
        """Start `train` or `eval` on one compute thread per core that is free for it.

        Args:
            command: of the command line.
            options: after the configuration.
            launcher: what stands before, such as torchrun's module and its options.
        """
        module = ["-m", "mit_semseg.cli"]
        # One number of threads whatever else runs here: results are compared bit by bit.
        words = [sys.executable, *launcher, *module, command, "--gpus", "cpu", "--threads", "1"]
        return Running([*words, "--cfg", str(self.file), *options], self.file.with_suffix(".out"))

    def train(self, *options: str, limit: float = 600) -> Finished:
        """Train to the end."""
        return self.start("train", *options).wait(limit)

    def resume(self, *options: str) -> Running:
        """Go on; `Running.resumed` tells later whether it did from the newest whole state."""
        whole = next(filter(_is_whole, self.folder.states()), None)
        running = self.start("train", "--resume", "auto", *options)
        running.expected = f"resuming from {whole}:" if whole else "starting anew"
        return running

    @property
    def was_set_aside(self) -> bool:
        """Whether any start took what was there for an earlier run, and nothing was damaged:
        what is newer than a state that has to do in place of a damaged one is set aside."""
        damaged = any(self.folder.path.glob("*.damaged"))
        return any(self.folder.path.glob("earlier_*")) and not damaged

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors of all checkpoints that evaluation may load."""
        return {
            f"{file.name}: {key}": tensor
            for name in self.folder.names()
            for file in self.folder.files(name)
            for key, tensor in torch.load(file, weights_only=True).items()
        }

    def figures(self) -> list[dict[str, Any]]:
        """The lines of its journal without the times."""
        lines = read_metrics(self.folder.path / METRICS)
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    def differences(self, other: Job) -> int:
        """Tensors and lines of the journal that are not bit by bit those of another job."""
        mine, theirs = self.weights(), other.weights()
        mine.update(_tensors(load_state(self.folder.states()[0])))
        theirs.update(_tensors(load_state(other.folder.states()[0])))
        names = mine.keys() | theirs.keys()
        tensors = sum(
            name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name])
            for name in names
        )
        ours, others = ([json.dumps(line) for line in job.figures()] for job in (self, other))
        lines = sum(a != b for a, b in zip(ours, others)) + abs(len(ours) - len(others))
        return tensors + lines


def _is_whole(file: Path) -> bool:
    try:
        check_archive(file)
    except ValueError:
        return False
    return True


def _tensors(tree: Any, name: str = "state") -> dict[str, torch.Tensor]:
    """All tensors and numbers of a state but times and settings, by where they are."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    if isinstance(tree, (int, float)):
        return {name: torch.tensor(tree, dtype=torch.float64)}
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    found: dict[str, torch.Tensor] = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key not in ("seconds", "config"):
                found.update(_tensors(value, f"{name}.{key}"))
    return found


@dataclass
class Finished:
    """How a command ended.

    Attributes:
        code: exit status, negative for a signal.
        output: standard output and error together.
        seconds: from its start, or from `Running.mark`.
        left: processes of it that were still there 10 seconds later.
    """

    code: int
    output: str
    seconds: float
    left: list[int]

    @property
    def error(self) -> str:
        """What follows `error:`, with a rank before it or without; "" when there is none."""
        # A bar may stand before it on the same line.
        found = re.search(r"(rank \d+: )?error: .*", self.output)
        return found[0] if found else ""

    @property
    def has_traceback(self) -> bool:
        """Whether a Python traceback was printed."""
        return "Traceback (most recent call last)" in self.output


class Running:
    """A command that is running, in a session of its own.

    Args:
        words: the command.
        output: file that standard output and standard error go to.
        cwd: the folder it runs in; None for this one.
        environment: variables beside the inherited ones.

    Attributes:
        started: all of them that were not waited for yet.
    """

    started: ClassVar[list[Running]] = []

    def __init__(
        self, words: Sequence[str], output: Path, *, cwd: Path | None = None, **environment: str
    ) -> None:
        self.output = output
        self.expected = ""
        self.started.append(self)
        # What it starts is known by this, whatever session and parent it takes.
        self.mark_of_all = f"MIT_SEMSEG_SELFTEST={uuid.uuid4()}"
        name, value = self.mark_of_all.split("=")
        with output.open("w") as file:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell tells what it starts in the background to ignore Control-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                cwd=cwd,
                env={**os.environ, **environment, name: value},
            )
        self.began = time.monotonic()

    def mark(self) -> None:
        """Count `Finished.seconds` from now."""
        self.began = time.monotonic()

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def resumed(self) -> bool:
        """Whether it has said that it goes on from where it should, or is not that far yet."""
        text = self.text()
        return self.expected in text or "INFO] training " not in text

    def wait_for(self, file: Path, pattern: str, limit: float = 120) -> None:
        """Until a file matches in a folder; TimeoutError, or ChildProcessError at its end."""
        end = time.monotonic() + limit
        while not any(file.glob(pattern)):
            if self.process.poll() is not None:
                raise ChildProcessError(f"the job ended early:\n{self.text()[-2000:]}")
            if time.monotonic() > end:
                self.destroy()
                raise TimeoutError(
                    f"no {pattern} in {file} for {limit:g} s:\n{self.text()[-2000:]}"
                )
            time.sleep(0.02)

    def children(self) -> list[int]:
        """Its descendants that multiprocessing started: loaders or evaluation workers."""
        return [pid for pid in self.members() if pid != self.process.pid and _is_worker(pid)]

    def members(self) -> list[int]:
        """All processes that it or its descendants started, and that are alive."""
        return [pid for pid in _pids() if self.mark_of_all in environment(pid)]

    def kill(self) -> None:
        """SIGKILL the command itself, and nothing else."""
        self.process.kill()

    def wait(self, limit: float = 600) -> Finished:
        """Wait for its end, and up to 10 s for that of all its processes."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.destroy()
            raise TimeoutError(f"still running after {limit:g} s:\n{self.text()[-2000:]}") from None
        seconds = time.monotonic() - self.began
        end = time.monotonic() + 10
        while (left := self.members()) and time.monotonic() < end:
            time.sleep(0.05)
        self.destroy()
        return Finished(code, self.text(), seconds, left)

    def destroy(self) -> None:
        """End every process of it."""
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        if self in self.started:
            self.started.remove(self)


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def environment(pid: int) -> list[str]:
    """`NAME=value` as a process was started with; empty when it is gone, or a zombie."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def _is_worker(pid: int) -> bool:
    """Forked workers look like their parent; resource trackers and fork servers do not."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not any(b"resource_tracker" in word or b"forkserver" in word for word in words)
