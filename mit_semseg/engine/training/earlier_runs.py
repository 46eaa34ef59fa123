"""Find the state, or the weights, of an earlier run to resume from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mit_semseg.engine.checkpoint import load_whole
from mit_semseg.engine.training.checkpoints import RunFolder, load_state
from mit_semseg.engine.training.run_lock import RunLock
from mit_semseg.models import SegmentationModule

log = logging.getLogger("mit_semseg")


class EarlierRun(NamedTuple):
    """A state of an earlier run and its file."""

    file: Path
    state: dict[str, Any]  # of `RunState`; from weights without a state only some entries


@dataclass(frozen=True)
class EarlierRuns:
    """Finds what a new run resumes from.

    Attributes:
        folder: checkpoint folder of the new run.
        lock: of that folder.
        resume: "auto", a state file, a folder with a state, or "" to start from the beginning.
        job: name of the torchrun job; a restarted job resumes its own state for any `resume`.
        start_epoch: `TRAIN.start_epoch`; 0 for none.
        epoch_iters: steps per epoch.
        batches_per_step: batches per step of all ranks together.
    """

    folder: RunFolder
    lock: RunLock
    resume: str
    job: str
    start_epoch: int
    epoch_iters: int
    batches_per_step: int

    def may_exist(self) -> bool:
        """Whether `find` may return something, judged without reading files."""
        if self.resume not in ("", "auto"):
            return True
        begun = bool(self.folder.states()) or self.folder.latest_epoch() > 0
        return begun and bool(self.resume or self._is_same_job or self.start_epoch)

    @property
    def _is_same_job(self) -> bool:
        return bool(self.job) and self.lock.job() == self.job

    def find(self, module: SegmentationModule) -> EarlierRun | None:
        """The state to resume from; None to start from the beginning.

        Args:
            module: weights of an epoch are loaded into this if there is no state.

        Raises:
            FileNotFoundError: `resume` does not exist.
            ValueError: a file is damaged, not a state of a run, or of another network.
        """
        earlier = None
        for resume in ("auto" if self._is_same_job else "", self.resume):
            if resume and earlier is None:
                earlier = self._in(resume, module)
        if earlier is None and self.start_epoch:
            earlier = self._at_epoch(module)
        if earlier is None:
            if self.resume:
                log.info("nothing to resume in %s: starting from the beginning", self.folder.path)
            return None
        _check(earlier)
        epoch, inside = divmod(earlier.state["step"], earlier.state["epoch_iters"])
        if not inside:
            # The validation of the epoch is later than its state.
            later = RunFolder(earlier.file.parent).load_history(epoch)
            earlier.state["history"] = {**earlier.state["history"], **later}
        return earlier

    def _in(self, resume: str, module: SegmentationModule) -> EarlierRun | None:
        """The state that a value of `--resume` names; None if auto finds nothing."""
        path = self.folder.path if resume == "auto" else Path(resume)
        if path.is_file():
            return EarlierRun(path, load_state(path))
        if not path.is_dir():
            raise FileNotFoundError(
                f"--resume {resume}: no such file or folder; give auto, a state_step_N.pth, or a "
                "folder with one"
            )
        folder = RunFolder(path)
        if found := folder.newest_state(rename_damaged=resume == "auto"):
            return EarlierRun(*found)
        if latest := folder.latest_epoch():
            return self._weights(folder, latest, module)
        if resume == "auto":
            return None
        raise FileNotFoundError(f"--resume {resume}: no state_step_N.pth in this folder")

    def _at_epoch(self, module: SegmentationModule) -> EarlierRun:
        file = self.folder.path / f"state_step_{self.start_epoch * self.epoch_iters}.pth"
        if file.is_file():
            return EarlierRun(file, load_state(file))
        return self._weights(self.folder, self.start_epoch, module)

    def _weights(self, folder: RunFolder, epoch: int, module: SegmentationModule) -> EarlierRun:
        """A state made from the weights of an epoch."""
        encoder, decoder = folder.files(f"epoch_{epoch}.pth")
        load_whole(module.encoder, encoder, "encoder")
        load_whole(module.decoder, decoder, "decoder")
        log.warning(
            "%s has no state_step_N.pth of epoch %d: loading the weights only, the optimizer "
            "state is reset",
            folder.path,
            epoch,
        )
        state = {
            "step": epoch * self.epoch_iters,
            "position": epoch * self.epoch_iters * self.batches_per_step,
            "epoch_iters": self.epoch_iters,
            "encoder": module.encoder.state_dict(),
            "decoder": module.decoder.state_dict(),
            "history": folder.load_history(epoch),
        }
        return EarlierRun(encoder, state)


def _check(earlier: EarlierRun) -> None:
    """Reject files of other programs; whether a state fits the run is checked when it is loaded."""
    state = earlier.state
    wrong = [
        key for key in ("encoder", "decoder", "history") if not isinstance(state.get(key), dict)
    ]
    for key, least in (("step", 0), ("position", 0), ("epoch_iters", 1)):
        if type(state.get(key)) is not int or state[key] < least:  # a bool is an int, too
            wrong.append(key)
    if not isinstance(state.get("config", ""), str):
        wrong.append("config")
    if wrong:
        raise ValueError(
            f"{earlier.file} is not a state of a run ({', '.join(sorted(wrong))}: missing or of "
            "the wrong type); give auto, a state_step_N.pth, or a folder with one"
        )
