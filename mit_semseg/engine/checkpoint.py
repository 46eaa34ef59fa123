"""Folders of checkpoints: written atomically under the published names, read back whole."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from mit_semseg.config import dump_config, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, class_table
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.weights import load_checked, load_into, read_state_dict

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("mit_semseg")

CONFIG = "config.yaml"
CLASSES = "classes.csv"
LOCK = ".lock"
JOB = ".job"
# What a training leaves beside configuration and class table.
RUN_FILES = (
    *("encoder_*.pth", "decoder_*.pth", "history_epoch_*.pth", "state_step_*.pth"),
    *("nonfinite_*.pth", "metrics.jsonl", "curves.png"),
)
# A newer one may be cut off by what nothing survives, a failing disk: then the one before counts.
KEPT_STATES = 2
# Folders that runs of this process use: its locks keep out other processes only.
_OCCUPIED: set[Path] = set()


def atomic_save(files: Mapping[Path, Any]) -> None:
    """torch.save each value to its path.

    Everything is written to temporary neighbours first, reaches the disk, and is then renamed, so
    that a killed run or a full disk leaves whole files: those that were there before, or the new
    ones. (Between two renames a kill may leave one of each; a resumed run writes both again.) A
    checksum of every tensor is
    part of torch's format, see `weights.check_archive`.

    Raises:
        OSError: a file cannot be written, such as on a full disk; its folder is named.
    """
    written: dict[str, Path] = {}
    try:
        for path, obj in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            written[temporary] = path
            _write(obj, handle, path)
        for temporary, path in written.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in files}:
            _sync_names(folder)
    except BaseException:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)
        raise


def _write(obj: Any, handle: int, path: Path) -> None:
    try:
        with os.fdopen(handle, "wb") as file:
            _save(obj, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = f"{error.strerror}: cannot write"
        raise OSError(error.errno, reason, str(path)) from error


def _save(obj: Any, file: IO[bytes]) -> None:
    try:
        torch.save(obj, file)
    except RuntimeError as error:
        # torch may report a failed write as a broken archive; the reason is what it replaced.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_names(folder: Path) -> None:
    """Let renamed files reach the disk; where folders cannot be opened nothing is done."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_writable(folder: str | Path, what: str) -> None:
    """Make a folder and try to write in it, before the work whose results it is to hold.

    Args:
        folder: its path.
        what: the setting or option that names it.

    Raises:
        OSError: one line with the setting, the folder and the reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{what} {folder} cannot be written to ({reason}): give another") from error


class CheckpointFolder:
    """One model's folder: `config.yaml`, `classes.csv` and `{encoder,decoder}_NAME.pth` pairs.

    NAME is `epoch_N` or `best`; `history_epoch_N.pth` holds the curves, and `state_step_N.pth` the
    whole run as it stood after N steps.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    def config(self) -> Config:
        """The configuration the model was trained with, DIR set to this folder."""
        file = self.path / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: {self.path} is no checkpoint folder")
        cfg = load_config(file)
        cfg.DIR = str(self.path)
        return cfg

    def classes(self) -> ClassTable:
        """Class names and colours, from the folder, else from the configuration's data set."""
        file = self.path / CLASSES
        return ClassTable.load(file) if file.is_file() else class_table(self.config().DATASET)

    def names(self) -> list[str]:
        """Checkpoints for which both halves are there: epochs in order, `best.pth` last."""
        encoders = {p.name.removeprefix("encoder_") for p in self.path.glob("encoder_*.pth")}
        decoders = {p.name.removeprefix("decoder_") for p in self.path.glob("decoder_*.pth")}
        return sorted(encoders & decoders, key=_order)

    def best_or_latest(self) -> str:
        """`best.pth` when there is one, else the latest epoch; FileNotFoundError when empty."""
        names = self.names()
        if not names:
            raise FileNotFoundError(
                f"{self.path} holds no encoder_NAME.pth with a decoder_NAME.pth; "
                f"it holds {_listing(self.path)}"
            )
        return names[-1]

    def files(self, checkpoint: str) -> tuple[Path, Path]:
        """Encoder and decoder file of `epoch_N.pth` or `best.pth`.

        Raises:
            FileNotFoundError: one is missing; the error lists the checkpoints that are there.
        """
        files = self.path / f"encoder_{checkpoint}", self.path / f"decoder_{checkpoint}"
        for file in files:
            if not file.is_file():
                have = ", ".join(self.names())
                raise FileNotFoundError(
                    f"{file} does not exist; {self.path} has {have}"
                    if have
                    else f"{file} does not exist; {self.path} holds {_listing(self.path)}: train "
                    f"first, or put encoder_{checkpoint} and decoder_{checkpoint} there"
                )
        return files

    def prepare(self, cfg: Config, classes: ClassTable) -> None:
        """Create the folder with configuration, class names and palette."""
        self.path.mkdir(parents=True, exist_ok=True)
        dump_config(cfg, self.path / CONFIG)
        classes.save(self.path / CLASSES)

    def occupy(self) -> None:
        """Make the folder ready for a run, and keep every other run out while this one lives.

        What an earlier run was writing when it was killed is removed.

        Raises:
            ValueError: another run is using the folder.
            OSError: the folder cannot be made or written to.
        """
        make_writable(self.path, "DIR")
        place = self.path.resolve()
        if place in _OCCUPIED:
            raise ValueError(f"{self.path} is in use by another run of this process: end it first")
        lock = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        if fcntl is not None:
            try:
                # Of this process alone: children that outlive it hold nothing.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                lock.close()
                raise ValueError(
                    f"{self.path} is in use by {holder}: wait for it, end it, or give another DIR"
                ) from error
            except OSError as error:
                log.warning("nothing keeps other runs out of %s (%s)", self.path, error.strerror)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock
        _OCCUPIED.add(place)
        for pattern in RUN_FILES:
            for unfinished in self.path.glob(f".{pattern}.*"):
                unfinished.unlink()

    def leave(self) -> None:
        """Let other runs use the folder again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            _OCCUPIED.discard(self.path.resolve())

    def job(self) -> str:
        """Which job of torchrun has a run here that is not completed; "" for none."""
        file = self.path / JOB
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def note_job(self, job: str) -> None:
        """Write down whose run this is; "" when it is completed."""
        if job:
            (self.path / JOB).write_text(job, encoding="utf-8")
        else:
            (self.path / JOB).unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Move an earlier run's files to `earlier_N` below, so that a new one neither mixes with
        nor destroys them."""
        self._move_aside([f for pattern in RUN_FILES for f in self.path.glob(pattern)])

    def set_aside_after(self, step: int, epoch: int, best: bool) -> None:
        """Move what is newer than a place in the run that it goes back to, and copy its figures.

        Args:
            step: the newest state that stays.
            epoch: the newest epoch that stays.
            best: whether the best weights are newer, too.
        """
        files = [file for file in self.states() if _step(file) > step]
        for file in self.path.glob("*_epoch_*.pth"):
            match = re.search(r"_epoch_(\d+)\.pth$", file.name)
            if match and int(match[1]) > epoch:
                files.append(file)
        if best:
            files += self.path.glob("??coder_best.pth")
        aside = self._move_aside(files)
        if aside is not None and (self.path / "metrics.jsonl").is_file():
            shutil.copyfile(self.path / "metrics.jsonl", aside / "metrics.jsonl")

    def make_best(self, epoch: int) -> None:
        """Take the weights of an epoch for the best; where they are gone nothing is done."""
        if f"epoch_{epoch}.pth" in self.names():
            for kind in ("encoder", "decoder"):
                shutil.copyfile(
                    self.path / f"{kind}_epoch_{epoch}.pth", self.path / f"{kind}_best.pth"
                )

    def _move_aside(self, files: list[Path]) -> Path | None:
        if not any(file.suffix == ".pth" for file in files):
            return None
        number = 1
        while (self.path / f"earlier_{number}").exists():
            number += 1
        aside = self.path / f"earlier_{number}"
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        for name in (CONFIG, CLASSES):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, aside / name)
        log.warning("%s held an earlier run, which is now in %s", self.path, aside)
        return aside

    def save(self, name: str, encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
        """Write one checkpoint; `name` is `epoch_N.pth` or `best.pth`."""
        atomic_save(
            {
                self.path / f"encoder_{name}": dict(encoder),
                self.path / f"decoder_{name}": dict(decoder),
            }
        )

    def save_history(self, epoch: int, history: Mapping[str, Any]) -> None:
        """Write the curves up to an epoch."""
        atomic_save({self.path / f"history_epoch_{epoch}.pth": dict(history)})

    def load_history(self, epoch: int) -> dict[str, Any]:
        """The curves up to an epoch; empty where there are none, or they are damaged."""
        file = self.path / f"history_epoch_{epoch}.pth"
        try:
            return load_state(file) if file.is_file() else {}
        except ValueError as error:
            log.warning("%s", error)
            return {}

    def save_state(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state of a run after `step` steps; the newest two stay."""
        newest = self.path / f"state_step_{step}.pth"
        atomic_save({newest: dict(state)})
        for old in self.states()[KEPT_STATES:]:
            old.unlink()
        return newest

    def states(self) -> list[Path]:
        """Files of states, the newest first."""
        files = [p for p in self.path.glob("state_step_*.pth") if re.fullmatch(_STATE, p.name)]
        return sorted(files, key=_step, reverse=True)

    def newest_state(self, mend: bool = True) -> tuple[Path, dict[str, Any]] | None:
        """The newest state that is whole; None where there is no state at all.

        A damaged one is named, passed over, and renamed to end in `.damaged`, unless `mend` is
        False, for folders that are not one's own.

        Raises:
            ValueError: there are states, and all of them are damaged.
        """
        states = self.states()
        for file in states:
            try:
                return file, load_state(file)
            except ValueError as error:
                if _may_pass(error.__cause__):
                    raise
                log.warning("%s; the one before is taken", error)
                if mend:
                    file.replace(f"{file}.damaged")
        if states:
            raise ValueError(
                f"all {len(states)} states in {self.path} are damaged: continue from an epoch's "
                "weights with TRAIN.start_epoch N, or start anew without --resume"
            )
        return None

    def latest_epoch(self) -> int:
        """The newest epoch whose weights are there, 0 when there is none."""
        epochs = [
            int(m[1]) for name in self.names() if (m := re.fullmatch(r"epoch_(\d+)\.pth", name))
        ]
        return max(epochs, default=0)

    def drop_epochs(self, keep: int) -> None:
        """Remove all but the newest `keep` epoch checkpoints; 0 keeps all."""
        epochs = [name for name in self.names() if name.startswith("epoch_")]
        for name in epochs[:-keep] if keep else []:
            for kind in ("encoder", "decoder", "history"):
                (self.path / f"{kind}_{name}").unlink(missing_ok=True)


def load_state(file: Path) -> dict[str, Any]:
    """What `atomic_save` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, or something else.
        FileNotFoundError: it does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    state = load_checked(file)
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}, which is no state of a run")
    return state


def pack(source: str | Path, out: str | Path, checkpoint: str | None = None) -> Path:
    """Copy one checkpoint of a folder, small enough to hand on, as `best.pth` of another.

    Convolution and linear weights are stored in half precision, which every loader here casts
    back; running statistics and biases, small and more sensitive, stay as they are. Class names,
    palette, configuration, log and curves come along.

    Args:
        source: a checkpoint folder.
        out: the folder to write; created.
        checkpoint: `epoch_N.pth` or `best.pth`; None takes the best, else the latest.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a weight does not fit half precision, or `out` is the source.
    """
    folder, packed = CheckpointFolder(source), CheckpointFolder(out)
    if packed.path.resolve() == folder.path.resolve():
        raise ValueError(f"{out} is the source itself; name another folder to pack into")
    halves = []
    for file in folder.files(checkpoint or folder.best_or_latest()):
        weights = read_state_dict(file)
        small = {
            k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in weights.items()
        }
        for name, tensor in small.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{file}: {name} holds values that half precision cannot: do not pack"
                )
        halves.append(small)
    cfg = folder.config()
    cfg.DIR = str(out)
    cfg.VAL.checkpoint = cfg.TEST.checkpoint = "best.pth"
    packed.prepare(cfg, folder.classes())
    packed.save("best.pth", halves[0], halves[1])
    for name in ("metrics.jsonl", "curves.png", "log.txt"):
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, packed.path / name)
    return packed.path


def resolve_checkpoint(directory: str | Path, checkpoint: str) -> tuple[CheckpointFolder, str]:
    """Folder and name of a checkpoint: a bare name lies in `directory`, a path names its own."""
    path = Path(checkpoint)
    if path.name == checkpoint:
        return CheckpointFolder(directory), checkpoint
    return CheckpointFolder(path.parent), path.name


def model_classes(cfg: Config, checkpoint: str) -> ClassTable:
    """Names and colours: those beside the checkpoint, else the configuration's data set's.

    Raises:
        ValueError: the table has not `DATASET.num_class` rows.
    """
    folder, _ = resolve_checkpoint(cfg.DIR, checkpoint)
    file = folder.path / CLASSES
    if not file.is_file():
        return class_table(cfg.DATASET)
    table = ClassTable.load(file)
    if len(table) != cfg.DATASET.num_class:
        raise ValueError(
            f"{file} has {len(table)} classes, but DATASET.num_class is {cfg.DATASET.num_class}; "
            "use the configuration this checkpoint was trained with"
        )
    return table


def load_model(cfg: Config, checkpoint: str) -> SegmentationModule:
    """The model of a configuration with a checkpoint's weights, in evaluation mode on the CPU.

    Args:
        checkpoint: `epoch_N.pth` or `best.pth` in `cfg.DIR`, or with a folder in front.

    Raises:
        FileNotFoundError: the checkpoint does not exist; those that do are listed.
        ValueError: the weights do not fit the configured model.
    """
    folder, name = resolve_checkpoint(cfg.DIR, checkpoint)
    encoder_file, decoder_file = folder.files(name)
    bare = cfg.clone()
    bare.MODEL.weights_encoder = bare.MODEL.weights_decoder = "none"
    module = ModelBuilder.from_config(bare, inference=True)
    load_whole(module.encoder, encoder_file, "encoder")
    load_whole(module.decoder, decoder_file, "decoder")
    return module.eval()


def load_whole(module: nn.Module, file: Path, what: str) -> None:
    """Load a file that must fit entirely: a trained model with a random part predicts nonsense.

    Raises:
        ValueError: weights of the module are missing in the file, or have another shape.
    """
    report = load_into(module, file, what=what)
    lacking = [*report.missing, *report.mismatched]
    if lacking:
        raise ValueError(
            f"{file} does not fit this {what}: {len(lacking)} tensors are missing or of another "
            f"shape, such as {lacking[0]}; check MODEL.arch_{what} and DATASET.num_class"
        )


_STATE = r"state_step_(\d+)\.pth"


def _step(file: Path) -> int:
    match = re.fullmatch(_STATE, file.name)
    return int(match[1]) if match else -1


def _order(name: str) -> tuple[int, str]:
    match = re.fullmatch(r"epoch_(\d+)\.pth", name)
    return (int(match[1]), name) if match else (10**9 if name == "best.pth" else -1, name)


def _may_pass(cause: BaseException | None) -> bool:
    """Whether a file that cannot be read now may be whole."""
    passing = (errno.ENOMEM, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT)
    no_answer = isinstance(cause, OSError) and cause.errno in passing
    return no_answer or isinstance(cause, MemoryError)


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "nothing: the folder does not exist"
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "no file"
