"""A small training on the command line, injected faults, and checks of the results."""

import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from processes import Command

from mit_semseg.config import dump_config, load_config
from mit_semseg.engine.training.checkpoints import RunFolder, load_state
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics

# Metrics that differ between identical runs.
TIMES = ("images_per_second", "data_wait", "seconds")
# Seconds within which a command has to end after a fault.
SOON = 10.0


class Training:
    """A small training: its configuration file, and its checkpoint folder beside it.

    Args:
        folder: of the checkpoints; removed first.
        scenes: data written by `streets.write`.
        settings: further settings, `SECTION__key=value`.
    """

    def __init__(self, folder, scenes, **settings):
        small = {
            "DIR": str(folder),
            "DATASET__root_dataset": str(scenes),
            "DATASET__list_train": str(scenes / "training.odgt"),
            "DATASET__list_val": str(scenes / "validation.odgt"),
            "DATASET__classes": str(scenes / "classes.csv"),
            "DATASET__num_class": 10,
            "DATASET__imgSizes": [48, 64],
            "DATASET__segm_downsampling_rate": 2,
            "MODEL__arch_encoder": "mobilenetv2dilated",
            # With dropout, whose random numbers have to be the same after resuming.
            "MODEL__arch_decoder": "ppm_deepsup",
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
            "TRAIN__disp_iter": 1,
            "TRAIN__checkpoint_minutes": 0.01,
            "VAL__checkpoint": "best.pth",
            "VAL__imgSizes": [64],
        }
        self.cfg = load_config(
            None, [x for k, v in {**small, **settings}.items() for x in (k.replace("__", "."), v)]
        )
        shutil.rmtree(folder, ignore_errors=True)
        self.folder = RunFolder(folder)
        self.damaged = set()  # files that a resumed run has to rename
        self.file = folder.with_suffix(".yaml")
        dump_config(self.cfg, self.file)

    def start(self, command, *options):
        """Start `train` or `eval`.

        Args:
            command: of the command line.
            options: after the configuration.
        """
        words = [sys.executable, "-m", "mit_semseg.cli", command, "--gpus", "cpu"]
        # A fixed number of threads: results are compared bit by bit.
        words += ["--threads", "1", "--cfg", str(self.file), *options]
        return Command(words, self.file.with_suffix(".out"))

    def figures(self):
        """The lines of `metrics.jsonl` so far."""
        try:
            return read_metrics(self.folder.path / METRICS)
        except FileNotFoundError:
            return []

    def steps(self):
        """The last step in `metrics.jsonl`."""
        return max((x["step"] for x in self.figures() if x["kind"] == "train"), default=0)

    def is_validated(self):
        """Whether the last epoch has been validated, so that the training is complete."""
        last = self.cfg.TRAIN.num_epoch
        return any(x["kind"] == "val" and x["epoch"] == last for x in self.figures())

    def was_set_aside(self):
        """Whether any start mistook the files for those of an earlier run.

        After a damaged state, newer files than the state used instead are moved for good reason.
        """
        damaged = any(self.folder.path.glob("*.damaged"))
        return any(self.folder.path.glob("earlier_*")) and not damaged

    def differences(self, other):
        """Tensors and lines of metrics that are not bit-identical to those of another training."""
        mine, theirs = self._tensors(), other._tensors()
        found = [
            name
            for name in sorted(mine.keys() | theirs.keys())
            if name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name])
        ]
        ours, others = (
            [json.dumps({k: v for k, v in x.items() if k not in TIMES}) for x in one.figures()]
            for one in (self, other)
        )
        found += [f"{a} != {b}" for a, b in zip(ours, others) if a != b]
        if len(ours) != len(others):
            found.append(f"{len(ours)} lines of metrics, not {len(others)}")
        return found

    def _tensors(self):
        """All tensors of the checkpoints and of the newest state."""
        found = {
            f"{file.name}: {key}": tensor
            for name in self.folder.names()
            for file in self.folder.files(name)
            for key, tensor in torch.load(file, weights_only=True).items()
        }
        return {**found, **_flat(load_state(self.folder.states()[0]), "state")}


def _flat(tree, name):
    """All tensors and numbers of a state by their path, without times and settings."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    if isinstance(tree, (int, float)):
        return {name: torch.tensor(tree, dtype=torch.float64)}
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    found = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key not in ("seconds", "config"):
                found.update(_flat(value, f"{name}.{key}"))
    return found


# ------------------------------------------------------------------------------ faults
@dataclass(frozen=True)
class Fault:
    """A fault injected into a running training.

    Attributes:
        name: for messages.
        inject: injects the fault; returns False if that was not possible.
        codes: allowed exit statuses of the command.
        says: pattern of its only line with `error:`; "" for no such line.
        saves: whether the last step has to be saved.
        soon: whether the command has to end within `SOON` seconds.
        options: of the command line.
    """

    name: str
    inject: Callable[[Training, Command, random.Random], bool]
    codes: tuple[int, ...]
    says: str = ""
    saves: bool = False
    soon: bool = False
    options: tuple[str, ...] = ()


def _kill(training, command, rng):
    command.process.kill()
    return True


def _signal(number):
    def inject(training, command, rng):
        os.killpg(command.process.pid, number)  # to the process group, as Slurm or a terminal
        return True

    return inject


def _worker(number):
    def inject(training, command, rng):
        workers = command.workers()
        if workers:
            psutil.Process(rng.choice(workers)).send_signal(number)
        return bool(workers)

    return inject


def _full_disk(training, command, rng):
    """Limit the size of files to a megabyte."""
    psutil.Process(command.process.pid).rlimit(psutil.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    return True


def _damage(hurt):
    def inject(training, command, rng):
        command.process.kill()
        command.code()
        states = training.folder.states()
        # Only one of two states: without an undamaged one the run could not be resumed.
        if len(states) > 1:
            hurt(states[0], rng)
            training.damaged.add(f"{states[0].name}.damaged")
        return True

    return inject


def _cut_short(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size))


def _flip_bit(file, rng):
    """Flip a random bit in the middle half of a file, where the weights are."""
    size = file.stat().st_size
    with file.open("r+b") as handle:
        at = size // 4 + rng.randrange(size // 2)
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 1 << rng.randrange(8)]))


KILL = Fault("SIGKILL", _kill, (-signal.SIGKILL,))
SIGTERM = Fault("SIGTERM", _signal(signal.SIGTERM), (0,), saves=True, soon=True)
SIGINT = Fault("SIGINT", _signal(signal.SIGINT), (0,), saves=True, soon=True)
LOADER_KILLED = Fault(
    "a loader process killed",
    _worker(signal.SIGKILL),
    (2,),
    says="died with signal SIGKILL",
    soon=True,
    options=("TRAIN.workers", "2"),
)
LOADER_STOPPED = Fault(
    "a loader process stopped",
    _worker(signal.SIGSTOP),
    (2, 3),
    says=r"no (batch|progress) for .*\.png",
    options=("TRAIN.workers", "1", "TRAIN.stall_seconds", "8"),
)
FULL_DISK = Fault("full disk", _full_disk, (2,), says=r"cannot write.*/state_step_\d+\.pth")
CUT_SHORT = Fault("newest state cut short", _damage(_cut_short), (-signal.SIGKILL,))
BIT_FLIPPED = Fault("bit of the newest state flipped", _damage(_flip_bit), (-signal.SIGKILL,))


def train_through(training, faults, pause, rng):
    """Start a training repeatedly until it is complete, with one fault per start.

    Args:
        training: the training.
        faults: to inject; after the last one the training runs to its end.
        pause: waits for the time of a fault, or the end of the command.
        rng: for random choices of faults.

    Returns:
        The number of times of each fault, of starts, of starts with a state to resume from, and of
        states that were being written when the command ended.
    """
    found = Counter()
    while True:
        fault = next(faults, None)
        found["starts"] += 1
        found["starts that resumed"] += bool(training.folder.states())
        options = () if fault is None else fault.options
        command = training.start("train", "--resume", "auto", *options)
        happened = False
        try:
            if fault is not None:
                pause(training, command, fault)
                happened = command.is_running() and fault.inject(training, command, rng)
            ended = command.wait()
        finally:
            command.destroy()
        found["files left unfinished"] += len(list(training.folder.path.glob(".state_step_*")))
        done = ended.code == 0 and training.is_validated()
        context = f"{fault.name if fault and happened else 'no fault'}: {ended.output[-2000:]}"
        assert "Traceback" not in ended.output, context
        assert not ended.left, f"processes left: {ended.left}; {context}"
        assert not training.was_set_aside(), f"taken for an earlier run; {context}"
        if fault is not None and happened and not done:
            assert ended.code in fault.codes, f"exit status {ended.code}; {context}"
            assert len(ended.errors) == bool(fault.says), context
            assert re.search(fault.says, "".join(ended.errors)), context
            newest = training.folder.states()[:1]
            last = [training.folder.path / f"state_step_{training.steps()}.pth"]
            assert not fault.saves or newest == last, f"{newest} is not the last step; {context}"
            assert not fault.soon or ended.seconds < SOON, f"{ended.seconds:.1f} s; {context}"
            found[fault.name] += 1
        else:
            assert ended.code == 0, f"exit status {ended.code}; {context}"
        if done:
            assert {x.name for x in training.folder.path.glob("*.damaged")} == training.damaged
            return found
