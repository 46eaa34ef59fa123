"""The folder of a run: states and histories beside the weights, and what earlier runs left."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mit_semseg.engine.checkpoint import CLASSES, CONFIG, CheckpointFolder, atomic_save
from mit_semseg.engine.training.metrics_log import CURVES, METRICS
from mit_semseg.weights import load_checked

log = logging.getLogger("mit_semseg")

# What a training leaves beside configuration and class table.
EVALUATION = "result_eval"  # folder of the figures of `evaluate`
RUN_FILES = (
    *("encoder_*.pth", "decoder_*.pth", "history_epoch_*.pth", "state_step_*.pth"),
    *("nonfinite_*.pth", METRICS, CURVES),
)
# A newer one may be cut off by what nothing survives, a failing disk: then the one before counts.
KEPT_STATES = 2
# Batches saved for replay, at most: each holds the weights, too.
MOST_SAVED = 3


class RunFolder(CheckpointFolder):
    """A model's folder while it is trained.

    `history_epoch_N.pth` holds the curves up to an epoch, `state_step_N.pth` the whole run as it
    stood after N steps, `nonfinite_step_N.pth` a batch for replay.
    """

    def remove_unfinished(self) -> None:
        """Remove what an earlier run was writing when it was killed."""
        for pattern in RUN_FILES:
            for unfinished in self.path.glob(f".{pattern}.*"):
                unfinished.unlink()

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

        A damaged one is named, skipped, and renamed to end in `.damaged`, unless `mend` is
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

    def drop_epochs(self, keep: int) -> None:
        """Remove all but the newest `keep` epoch checkpoints; 0 keeps all."""
        epochs = [name for name in self.names() if name.startswith("epoch_")]
        for name in epochs[:-keep] if keep else []:
            for kind in ("encoder", "decoder", "history"):
                (self.path / f"{kind}_{name}").unlink(missing_ok=True)

    def save_batch(self, step: int, replay: Mapping[str, Any], mark: str = "") -> str:
        """Write a batch for replay, unless there are enough; says in words where.

        Args:
            step: its number.
            replay: the batch, and the weights it met.
            mark: of the rank, in the name.
        """
        file = self.path / f"nonfinite_step_{step}{mark}.pth"
        mine = re.compile(rf"nonfinite_step_\d+{mark}\.pth")
        if sum(bool(mine.fullmatch(x.name)) for x in self.path.iterdir()) >= MOST_SAVED:
            return "not saved, there are enough"
        atomic_save({file: dict(replay)})
        return f"saved as {file}"

    def set_aside(self) -> None:
        """Move an earlier run's files to `earlier_N` below, so that a new one neither mixes with
        nor destroys them."""
        found = [f for pattern in (*RUN_FILES, EVALUATION) for f in self.path.glob(pattern)]
        self._move_aside(found)

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
        if aside is not None and (self.path / METRICS).is_file():
            shutil.copyfile(self.path / METRICS, aside / METRICS)

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


_STATE = r"state_step_(\d+)\.pth"


def _step(file: Path) -> int:
    match = re.fullmatch(_STATE, file.name)
    return int(match[1]) if match else -1


def _may_pass(cause: BaseException | None) -> bool:
    """Whether a file that cannot be read now may be whole."""
    passing = (errno.ENOMEM, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT)
    no_answer = isinstance(cause, OSError) and cause.errno in passing
    return no_answer or isinstance(cause, MemoryError)
