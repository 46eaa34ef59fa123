"""The checkpoint folder of a run: states, histories, and files of earlier runs."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mit_semseg.engine.checkpoint import CLASSES, CONFIG, CheckpointFolder, atomic_save
from mit_semseg.engine.training.fsdp import SHARDS, check_shards, shards_of
from mit_semseg.engine.training.loggers import IDS, TENSORBOARD
from mit_semseg.engine.training.metrics_log import CURVES, METRICS
from mit_semseg.weights import load_checked

log = logging.getLogger("mit_semseg")

EVALUATION = "result_eval"  # subfolder with the output of `evaluate`
# Files that a training writes, besides configuration and class table.
RUN_FILES = (
    *("encoder_*.pth", "decoder_*.pth", "encoder_*.safetensors", "decoder_*.safetensors"),
    *("history_epoch_*.pth", "state_step_*.pth"),
    *("nonfinite_*.pth", METRICS, CURVES, IDS, TENSORBOARD),
)
# The second one is used if the newest is damaged, for example by a failing disk.
KEPT_STATES = 2
# Most batches saved for replay; each file includes the weights.
MAX_SAVED_BATCHES = 3


class RunFolder(CheckpointFolder):
    """The folder of a model during training.

    Besides the weights it has `history_epoch_N.pth`, the metrics up to an epoch,
    `state_step_N.pth`, the state of the run after N steps, with `state_step_N.shards` if the
    training is sharded, and `nonfinite_step_N.pth`, a batch for replay.
    """

    def remove_unfinished(self) -> None:
        """Remove temporary files of a run that was killed while writing."""
        for pattern in RUN_FILES:
            for unfinished in self.path.glob(f".{pattern}.*"):
                unfinished.unlink()
        for shards in self.path.glob("state_step_*.shards"):
            if not shards.with_suffix(".pth").is_file():
                shutil.rmtree(shards)

    def save_history(self, epoch: int, history: Mapping[str, Any]) -> None:
        """Write the metrics up to an epoch."""
        atomic_save({self.path / f"history_epoch_{epoch}.pth": dict(history)})

    def load_history(self, epoch: int) -> dict[str, Any]:
        """The metrics up to an epoch; empty if the file is missing or damaged."""
        file = self.path / f"history_epoch_{epoch}.pth"
        try:
            return load_state(file) if file.is_file() else {}
        except ValueError as error:
            log.warning("%s", error)
            return {}

    def save_state(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps and remove all but the newest two."""
        newest = self.path / f"state_step_{step}.pth"
        atomic_save({newest: dict(state)})
        for old in self.states()[KEPT_STATES:]:
            self.remove_state(old)
        return newest

    def shards(self, step: int) -> Path:
        """The folder with the shards of the state after `step` steps (`TRAIN.parallel fsdp`)."""
        return shards_of(self.path / f"state_step_{step}.pth")

    def remove_state(self, file: Path) -> None:
        """Remove a state."""
        file.unlink()
        if shards_of(file).is_dir():
            shutil.rmtree(shards_of(file))

    def states(self) -> list[Path]:
        """State files, newest first."""
        files = [p for p in self.path.glob("state_step_*.pth") if re.fullmatch(_STATE, p.name)]
        return sorted(files, key=_step, reverse=True)

    def newest_state(self, rename_damaged: bool = True) -> tuple[Path, dict[str, Any]] | None:
        """The newest undamaged state; None if there is no state.

        Args:
            rename_damaged: append `.damaged` to the names of damaged states.

        Raises:
            ValueError: all states are damaged.
        """
        states = self.states()
        for file in states:
            try:
                return file, load_state(file)
            except ValueError as error:
                if _may_be_temporary(error.__cause__):
                    raise
                log.warning("%s; trying the previous state", error)
                if rename_damaged:
                    file.replace(f"{file}.damaged")
        if states:
            raise ValueError(
                f"all {len(states)} states in {self.path} are damaged: continue from the weights "
                "of an epoch with TRAIN.start_epoch N, or restart without --resume"
            )
        return None

    def drop_epochs(self, keep: int) -> None:
        """Remove all but the newest `keep` epoch checkpoints; 0 keeps all."""
        epochs = [name for name in self.names() if re.fullmatch(r"epoch_\d+\.pth", name)]
        for name in epochs[:-keep] if keep else []:
            for kind in ("encoder", "decoder", "history"):
                (self.path / f"{kind}_{name}").unlink(missing_ok=True)

    def save_batch(self, step: int, replay: Mapping[str, Any], mark: str = "") -> str:
        """Write a batch for replay, unless there are already `MAX_SAVED_BATCHES` of this rank.

        Args:
            step: number of the step.
            replay: the batch and the weights before the step.
            mark: suffix of the file name for the rank.

        Returns:
            Where it was saved, as text for a message.
        """
        file = self.path / f"nonfinite_step_{step}{mark}.pth"
        mine = re.compile(rf"nonfinite_step_\d+{mark}\.pth")
        if sum(bool(mine.fullmatch(x.name)) for x in self.path.iterdir()) >= MAX_SAVED_BATCHES:
            return f"not saved: there are already {MAX_SAVED_BATCHES}"
        atomic_save({file: dict(replay)})
        return f"saved as {file}"

    def set_aside(self) -> None:
        """Move the files of an earlier run to the subfolder `earlier_N`."""
        found = [f for pattern in (*RUN_FILES, EVALUATION) for f in self.path.glob(pattern)]
        self._move_aside(found)

    def set_aside_after(self, step: int, epoch: int, best: bool) -> None:
        """Move files newer than a step to `earlier_N`, with a copy of the metrics.

        Args:
            step: later states are moved.
            epoch: checkpoints of later epochs are moved.
            best: also move the best weights.
        """
        files = [file for file in self.states() if _step(file) > step]
        for file in self.path.glob("*_epoch_*.pth"):
            match = re.search(r"_epoch_(\d+)\.pth$", file.name)
            if match and int(match[1]) > epoch:
                files.append(file)
        if best:
            files += self.path.glob("??coder_best.pth")
        aside = self._move_aside(files)
        if aside is not None and (self.path / METRICS).is_file():
            shutil.copyfile(self.path / METRICS, aside / METRICS)

    def make_best(self, epoch: int) -> None:
        """Copy the weights of an epoch, if they exist, to `best.pth`."""
        if f"epoch_{epoch}.pth" in self.names():
            for kind in ("encoder", "decoder"):
                shutil.copyfile(
                    self.path / f"{kind}_epoch_{epoch}.pth", self.path / f"{kind}_best.pth"
                )

    def _move_aside(self, files: list[Path]) -> Path | None:
        if not files:
            return None
        number = 1
        while (self.path / f"earlier_{number}").exists():
            number += 1
        aside = self.path / f"earlier_{number}"
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
            if shards_of(file).is_dir():
                shards_of(file).rename(aside / shards_of(file).name)
        for name in (CONFIG, CLASSES):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, aside / name)
        log.warning("%s had files of an earlier run: moved to %s", self.path, aside)
        return aside


def load_state(file: Path) -> dict[str, Any]:
    """A dict written by `atomic_save`, with its tensors on the CPU, and its shards verified.

    Raises:
        ValueError: the file is damaged or has other content.
        FileNotFoundError: it does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    state = load_checked(file)
    if not isinstance(state, dict):
        raise ValueError(f"{file} contains a {type(state).__name__}, not the state of a run")
    if SHARDS in state:
        check_shards(file, state[SHARDS])
    return state


_STATE = r"state_step_(\d+)\.pth"


def _step(file: Path) -> int:
    match = re.fullmatch(_STATE, file.name)
    return int(match[1]) if match else -1


def _may_be_temporary(cause: BaseException | None) -> bool:
    """Whether a read failed for a reason other than a damaged file."""
    temporary = (errno.ENOMEM, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT)
    return isinstance(cause, MemoryError) or (
        isinstance(cause, OSError) and cause.errno in temporary
    )
