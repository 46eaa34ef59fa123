"""Where a run resumes: the newest state, or the newest weights, that an earlier one has left."""

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
    """A place in an earlier run."""

    file: Path
    state: dict[str, Any]  # as `RunState` has it, or the part of it that weights can tell


@dataclass(frozen=True)
class EarlierRuns:
    """What a new run may resume from.

    Attributes:
        folder: its own.
        lock: of that folder.
        resume: "auto", a state file, a folder with one, or "" to start anew.
        job: the name of its job, which resumes its own states whatever `resume` says.
        start_epoch: TRAIN.start_epoch; 0 for none.
        epoch_iters: steps of an epoch.
        batches_a_step: batches that all ranks together take for one.
    """

    folder: RunFolder
    lock: RunLock
    resume: str
    job: str
    start_epoch: int
    epoch_iters: int
    batches_a_step: int

    def may_exist(self) -> bool:
        """Whether there is anything to look for, as far as can be said without reading it."""
        if self.resume not in ("", "auto"):
            return True
        begun = bool(self.folder.states()) or self.folder.latest_epoch() > 0
        return begun and bool(self.resume or self._comes_back or self.start_epoch)

    @property
    def _comes_back(self) -> bool:
        return bool(self.job) and self.lock.job() == self.job

    def find(self, module: SegmentationModule) -> EarlierRun | None:
        """The place to resume from; None to start anew.

        Args:
            module: has to fit published weights, which it gets where there is no state.

        Raises:
            FileNotFoundError: `resume` names nothing that is there.
            ValueError: what is there is damaged, no state of a run, or of another network.
        """
        earlier = None
        for place in ("auto" if self._comes_back else "", self.resume):
            if place and earlier is None:
                earlier = self._in(place, module)
        if earlier is None and self.start_epoch:
            earlier = self._at_epoch(module)
        if earlier is None:
            if self.resume:
                log.info("%s holds nothing to resume from: starting anew", self.folder.path)
            return None
        _check(earlier)
        epoch, inside = divmod(earlier.state["step"], earlier.state["epoch_iters"])
        if not inside:
            # It may have been validated after the state was written.
            later = RunFolder(earlier.file.parent).load_history(epoch)
            earlier.state["history"] = {**earlier.state["history"], **later}
        return earlier

    def _in(self, resume: str, module: SegmentationModule) -> EarlierRun | None:
        """What `--resume` names; nothing where auto finds nothing."""
        place = self.folder.path if resume == "auto" else Path(resume)
        if place.is_file():
            return EarlierRun(place, load_state(place))
        if not place.is_dir():
            raise FileNotFoundError(
                f"--resume {resume}: no such file or folder; give auto, a state_step_N.pth, or a "
                "folder that holds one"
            )
        folder = RunFolder(place)
        if found := folder.newest_state(mend=resume == "auto"):
            return EarlierRun(*found)
        if latest := folder.latest_epoch():
            return self._weights(folder, latest, module)
        if resume == "auto":
            return None
        raise FileNotFoundError(f"--resume {resume}: the folder holds no state_step_N.pth")

    def _at_epoch(self, module: SegmentationModule) -> EarlierRun:
        file = self.folder.path / f"state_step_{self.start_epoch * self.epoch_iters}.pth"
        if file.is_file():
            return EarlierRun(file, load_state(file))
        return self._weights(self.folder, self.start_epoch, module)

    def _weights(self, folder: RunFolder, epoch: int, module: SegmentationModule) -> EarlierRun:
        """What the published files of an epoch hold, in the form of a state."""
        encoder, decoder = folder.files(f"epoch_{epoch}.pth")
        load_whole(module.encoder, encoder, "encoder")
        load_whole(module.decoder, decoder, "decoder")
        log.warning(
            "%s has no state_step_N.pth of epoch %d: weights are loaded, momentum starts afresh",
            folder.path,
            epoch,
        )
        state = {
            "step": epoch * self.epoch_iters,
            "position": epoch * self.epoch_iters * self.batches_a_step,
            "epoch_iters": self.epoch_iters,
            "encoder": module.encoder.state_dict(),
            "decoder": module.decoder.state_dict(),
            "history": folder.load_history(epoch),
        }
        return EarlierRun(encoder, state)


def _check(earlier: EarlierRun) -> None:
    """Refuse what another program has saved; whether a state fits the run is seen later."""
    state = earlier.state
    wrong = [
        key for key in ("encoder", "decoder", "history") if not isinstance(state.get(key), dict)
    ]
    for key, least in (("step", 0), ("position", 0), ("epoch_iters", 1)):
        # True and False are numbers to Python.
        if type(state.get(key)) is not int or state[key] < least:
            wrong.append(key)
    if not isinstance(state.get("config", ""), str):
        wrong.append("config")
    if wrong:
        raise ValueError(
            f"{earlier.file} is no state of a run ({', '.join(sorted(wrong))}: missing, or of "
            "another kind); give auto, a state_step_N.pth, or a folder that holds one"
        )
