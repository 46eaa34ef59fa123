"""The training loop: epochs, steps, checkpoints, validations."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from mit_semseg.engine.eval_report import single_class
from mit_semseg.engine.evaluate import Interrupted
from mit_semseg.engine.scoring import Evaluation, merged
from mit_semseg.engine.threads import pixels
from mit_semseg.engine.training.build import Parts
from mit_semseg.engine.training.finetune import trainable
from mit_semseg.engine.training.fsdp import load_shards, save_shards, saved_states
from mit_semseg.engine.training.optim import set_learning_rates
from mit_semseg.engine.training.schedule import encoder_factor, learning_rate_factor
from mit_semseg.engine.training.state import Progress, differences, is_finite
from mit_semseg.engine.training.step import StepResult
from mit_semseg.errors import one_line

log = logging.getLogger("mit_semseg")

# torch.compile takes minutes in these first steps: a longer time limit applies.
COMPILING_STEPS = 10

Batches = Iterator[list[dict[str, Any]]]


class Trainer:
    """Runs a training: call `fit`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.options, self.plan, self.process = parts.options, parts.plan, parts.process
        self.progress, self.history = parts.progress, parts.history
        self.saved_at = time.monotonic()
        self.steps_here = 0  # steps of this process, not counting those before resuming

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch or a stop signal; returns the result of `train`."""
        parts, progress = self.parts, self.progress
        if self.process.rank == 0:
            parts.lock.acquire()
            parts.folder.remove_unfinished()
        try:
            self.resume()
            at = f", from step {progress.step}" if progress.step else ""
            log.info("training %s%s", self.plan.summary, at)
            log.info("%s", trainable(parts.step.module))
            loader = parts.loader(
                first=progress.position,
                micro_steps=(progress.max_iters - progress.step) * self.options.accumulate,
            )
            with parts.supervisor.watching(loader.files, loader.kill):
                try:
                    self._epochs(iter(loader), loader.bad_files)
                finally:
                    with parts.supervisor.waiting("the data loader processes to end"):
                        loader.close()
            return self._result()
        finally:
            parts.metrics.close()
            parts.lock.release()

    # ------------------------------------------------------------------ resuming

    def resume(self) -> None:
        """Resume an earlier run or start a new one; rank 0 reads the state and broadcasts it."""
        parts = self.parts
        file, state = None, None
        if self.process.rank == 0:
            module = parts.sharding.empty() if parts.sharding else parts.step.module
            file, state = parts.earlier.find(module) or (None, None)
        here = file is not None and file.parent.resolve() == parts.folder.path.resolve()
        if self.process.world > 1:
            shared: list[Any] = [file, state, here]
            with parts.supervisor.waiting("rank 0 to find a state", others=True):
                dist.broadcast_object_list(shared, src=0)
            file, state, here = shared
        if file is not None and state is not None:
            self._restore(state, file)
        if self.process.rank == 0:
            self._clear_folder(state["step"] if state is not None and here else None)
        if state is None or (here and state["step"] == self.progress.step):
            return
        # The step number or the folder has changed: save the state under the new name.
        if not here:
            self.history.clear_validations()  # best.pth is in the other folder
        elif self.process.rank == 0:
            for other in parts.folder.states():
                if other != file:
                    parts.folder.remove_state(other)
        self._save_state()
        if self.process.rank == 0:
            parts.folder.set_aside_after(self.progress.step, self.progress.epoch, best=False)

    def _restore(self, state: dict[str, Any], file: Path) -> None:
        """Load a state."""
        progress, options = self.progress, self.options
        try:
            self.parts.state.load_state_dict(load_shards(state, file, self.parts.sharding))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} does not fit this run ({one_line(error, 200)}): resume with the "
                "configuration of that run"
            ) from error
        if progress.step > progress.max_iters:
            raise ValueError(
                f"{file} is at epoch {progress.step / progress.epoch_iters:.3g}, but "
                f"TRAIN.num_epoch is {options.num_epoch}: raise TRAIN.num_epoch to continue"
            )
        if self.process.rank == 0:
            log.info("resuming from %s: step %d of %d", file, progress.step, progress.max_iters)
            if state.get("optim", options.optim) != options.optim:
                log.warning("the state is of another optimizer: its momentum is not loaded")
            for line in differences(state.get("config", ""), self.plan.config):
                log.warning("changed since %s: %s", file.name, line)

    def _clear_folder(self, resumed_step: int | None) -> None:
        """Move files of another run, or newer than the state resumed from, to `earlier_N`.

        Args:
            resumed_step: step of the state, if it is in this folder.
        """
        parts, epoch = self.parts, self.progress.epoch
        if resumed_step is None:
            if parts.earlier.resume and not self.progress.step:
                parts.metrics.truncate(0, 0)  # of a run that was killed before its first state
            parts.folder.set_aside()
        else:
            newer = parts.metrics.best_epoch() > epoch
            parts.folder.set_aside_after(resumed_step, epoch, newer)
            if newer:
                parts.folder.make_best(self.history.best[0] if self.history.best else 0)
            parts.metrics.truncate(
                self.progress.step, epoch - 1 if self._is_to_validate(epoch) else epoch
            )
        parts.describe()
        parts.lock.write_job(parts.earlier.job)

    # ------------------------------------------------------------------ epochs and steps

    def _epochs(self, batches: Batches, bad_files: dict[str, str]) -> None:
        progress = self.progress
        self.parts.metrics.open(progress.step)
        if progress.step and not progress.inside:
            # The run was stopped between the last step of an epoch and its files.
            self._finish_epoch(progress.epoch)
        while not (progress.done or self._is_out_of_patience() or self._should_stop()):
            epoch = progress.epoch + 1
            if not progress.inside:
                self.parts.random.begin_epoch()
                progress.losses, progress.accuracies = [], []
            began, seconds = time.monotonic(), progress.seconds
            self._epoch(epoch, batches)
            progress.seconds = seconds + time.monotonic() - began
            if progress.inside:
                break
            self.history.add("train", epoch, _mean(progress.losses), _mean(progress.accuracies))
            if bad_files and self.process.rank == 0:
                log.warning("unusable files so far: %d", len(bad_files))
            self._save_state()
            self._finish_epoch(epoch)
        if self._is_out_of_patience():
            log.info(
                "stopped early after epoch %d of %d: no better mean IoU in %d validations "
                "(TRAIN.patience)",
                *(progress.epoch, self.options.num_epoch, self.history.validations_since_best),
            )
        self.parts.metrics.draw()

    def _epoch(self, epoch: int, batches: Batches) -> None:
        """Steps to the end of an epoch or a stop signal."""
        progress, options, process = self.progress, self.options, self.process
        last, seconds = epoch * progress.epoch_iters, progress.seconds
        title = f"epoch {epoch}/{options.num_epoch}"
        speed = _EpochSpeed(progress.step)
        self.parts.step.training_mode()
        with (
            _cudnn_benchmark(self.plan.fixed_size),
            tqdm(
                total=progress.epoch_iters,
                initial=progress.inside,
                desc=title,
                disable=not process.progress,
                dynamic_ncols=True,
            ) as bar,
        ):
            while progress.step < last:
                rates = self._set_rates()
                result = self._step(batches, speed)
                speed.elapsed = time.monotonic() - speed.began
                progress.seconds = seconds + speed.elapsed
                status = speed.text(progress, rates)
                bar.set_postfix_str(status, refresh=False)
                bar.update()
                if progress.step % options.disp_iter == 0 or progress.step == last:
                    self.parts.metrics.record(
                        kind="train",
                        epoch=epoch,
                        **speed.figures(progress, rates, options.disp_iter),
                    )
                    if not process.progress and process.rank == 0:
                        log.info(
                            "%s, step %d of %d: %s",
                            *(title, progress.step, progress.max_iters, status),
                        )
                if progress.step < last and (result.stop or result.save):
                    self._save_state()
                if result.stop:
                    self.parts.supervisor.note_remote_stop()
                    return

    def _set_rates(self) -> tuple[float, float]:
        """Set and return the learning rates of the next step, (encoder, decoder)."""
        options, progress = self.options, self.progress
        now = options, progress.step, progress.max_iters
        rates = (
            options.lr_encoder * encoder_factor(*now),
            options.lr_decoder * learning_rate_factor(*now),
        )
        self.parts.step.set_progress(progress.step / progress.max_iters)
        set_learning_rates(self.parts.step.optimizer, *rates)
        return rates

    def _step(self, batches: Batches, speed: _EpochSpeed) -> StepResult:
        """One optimizer step."""
        parts, progress, process = self.parts, self.progress, self.process
        supervisor, options = parts.supervisor, self.options
        began = time.monotonic()
        number = supervisor.step = progress.step + 1
        computed = f"step {number} to be computed" + (" by all ranks" * (process.world > 1))
        compiles = options.compile and self.steps_here < COMPILING_STEPS
        for _ in range(options.accumulate):
            before = time.monotonic()
            with supervisor.waiting(f"a batch of step {number}"):
                batch = next(batches)
            speed.waited += time.monotonic() - before
            speed.images += sum(len(item["img_data"]) for item in batch) * process.world
            with (
                supervisor.waiting(computed, patient=compiles, others=True),
                parts.threads.step(pixels(item["img_data"] for item in batch)),
            ):
                parts.step.add(batch)
        with supervisor.waiting(computed, others=True):
            minutes = options.checkpoint_minutes
            due = bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes
            result = parts.step.finish(progress, stop=bool(supervisor.stop_signal), save=due)
        progress.advance(result.loss, result.accuracy, result.updated, self.plan.batches_per_step)
        if self.steps_here:
            supervisor.slowest_step = max(supervisor.slowest_step, time.monotonic() - began)
        self.steps_here += 1
        return result

    def _should_stop(self) -> bool:
        """Whether any rank received a stop signal."""
        supervisor = self.parts.supervisor
        if self.process.world > 1:
            with supervisor.waiting("the other ranks", others=True):
                stops = torch.tensor(
                    float(bool(supervisor.stop_signal)), device=self.process.device
                )
                dist.all_reduce(stops)
            if stops.item():
                supervisor.note_remote_stop()
        return bool(supervisor.stop_signal)

    # ------------------------------------------------------------------ between epochs

    def _save_state(self) -> None:
        """Save the state of the run.

        Raises:
            FloatingPointError: a weight is non-finite; the previous state is kept.
        """
        parts, step = self.parts, self.progress.step
        if not is_finite(parts.step.module):
            raise FloatingPointError(
                f"non-finite weights after step {step}; the previous state is kept: lower "
                "TRAIN.lr_encoder and TRAIN.lr_decoder, set TRAIN.clip_grad, or train with "
                "TRAIN.precision fp32"
            )
        with parts.supervisor.waiting("the run to be saved", patient=True, others=True):
            state = parts.state.state_dict()
            if parts.sharding:
                state = save_shards(state, parts.folder.shards(step))
            if self.process.rank == 0:
                parts.folder.save_state(step, state)
        self.saved_at = time.monotonic()

    def _finish_epoch(self, epoch: int) -> None:
        """Write the weights and history of an epoch, and validate it if due."""
        parts, is_first = self.parts, self.process.rank == 0
        with parts.supervisor.waiting("the weights to be saved", patient=True, others=True):
            weights = saved_states(parts.step.evaluated, wanted=is_first)
            if is_first:
                parts.folder.save(f"epoch_{epoch}.pth", *weights)
                parts.folder.save_history(epoch, self.history.columns)
                parts.folder.drop_epochs(self.options.keep)
        if self._is_to_validate(epoch):
            self._validate(epoch)
        parts.metrics.draw(every=60.0)

    def _is_out_of_patience(self) -> bool:
        """Whether mean IoU has not risen for TRAIN.patience validations."""
        patience = self.options.patience
        return bool(patience) and self.history.validations_since_best >= patience

    def _is_to_validate(self, epoch: int) -> bool:
        """Whether the validation of an epoch is due and has not been done."""
        if self.parts.validate is None or self.history.is_validated(epoch):
            return False
        return epoch % self.options.eval_epochs == 0 or epoch == self.options.num_epoch

    def _validate(self, epoch: int) -> None:
        """Validate an epoch, each rank a share of the images.

        A stop signal aborts it; the resumed run then repeats it.
        """
        parts, process, supervisor = self.parts, self.process, self.parts.supervisor
        assert parts.validate is not None

        def stop() -> bool:
            supervisor.progress()
            # Not with several ranks: one that left would wait for the others.
            return bool(supervisor.stop_signal) and process.world == 1

        net = parts.step.evaluated
        if parts.sharding:  # ranks have different numbers of images, so each needs whole weights
            with supervisor.waiting("the weights to be gathered", patient=True, others=True):
                net = parts.sharding.whole(net)
        try:
            with supervisor.waiting("an image to be validated"):
                evaluation: Evaluation = parts.validate(net, stop=stop)
        except Interrupted:
            log.info("validation of epoch %d is aborted", epoch)
            return
        with supervisor.waiting("the other ranks' validation", others=True):
            evaluation = merged(evaluation, process.device)
        scores = evaluation.matrix.compute()
        mean_iou, accuracy = float(scores["mean_iou"]), float(scores["pixel_accuracy"])
        self.history.add("val", epoch, mean_iou, accuracy)
        log.info("epoch %d: mean IoU %.4f, accuracy %.2f%%", epoch, mean_iou, 100 * accuracy)
        if process.rank:
            return
        if line := single_class(evaluation.matrix, parts.classes):
            log.warning("epoch %d: %s", epoch, line)
        for file, reason in evaluation.failed:
            log.warning("not validated: %s: %s", file, reason.removeprefix(f"{file}: "))
        # The best weights first: a run killed after this validates and writes them again.
        if self.history.best == (epoch, mean_iou) or "best.pth" not in parts.folder.names():
            parts.folder.save("best.pth", *saved_states(net))
        parts.metrics.record(
            kind="val",
            epoch=epoch,
            step=self.progress.step,
            mean_iou=mean_iou,
            pixel_accuracy=accuracy,
            iou=[iou if math.isfinite(iou) else None for iou in scores["iou"].tolist()],
        )
        parts.folder.save_history(epoch, self.history.columns)

    def _result(self) -> dict[str, Any]:
        parts, progress = self.parts, self.progress
        has_best = "best.pth" in parts.folder.names()
        name = "best.pth" if has_best else f"epoch_{self.options.num_epoch}.pth"
        validated = progress.done and not self._is_to_validate(self.options.num_epoch)
        complete = validated or self._is_out_of_patience()
        if complete and self.process.rank == 0:
            parts.lock.write_job("")
        return {
            "best_mean_iou": self.history.best_mean_iou,
            "checkpoint": name if complete or progress.done else f"state_step_{progress.step}.pth",
            "history": self.history.columns,
            "step": progress.step,
            "steps": progress.max_iters,
            "stopped": "" if complete else parts.supervisor.stop_signal,
        }


@dataclass
class _EpochSpeed:
    """Speed of an epoch, for progress bar, log and metrics.jsonl."""

    first: int  # step at the start
    began: float = field(default_factory=time.monotonic)
    elapsed: float = 0.0  # seconds
    waited: float = 0.0  # seconds, for data
    images: int = 0

    def text(self, progress: Progress, rates: tuple[float, float]) -> str:
        """Status of the last steps, for progress bar and log."""
        step_seconds = self.elapsed / (progress.step - self.first)
        return (
            f"loss {_mean(progress.losses[-20:]):.3f}, "
            f"accuracy {100 * _mean(progress.accuracies[-20:]):.1f}%, "
            f"lr {rates[0]:.2g}/{rates[1]:.2g}, {self.images / self.elapsed:.1f} images/s, "
            f"waiting for data {100 * self.waited / self.elapsed:.0f}%, remaining "
            f"{tqdm.format_interval((progress.max_iters - progress.step) * step_seconds)}"
            + (f", skipped steps: {progress.skipped}" if progress.skipped else "")
        )

    def figures(self, progress: Progress, rates: tuple[float, float], n: int) -> dict[str, Any]:
        """A line of metrics.jsonl, with means over the last n steps."""
        return {
            "step": progress.step,
            "loss": _mean(progress.losses[-n:]),
            "accuracy": _mean(progress.accuracies[-n:]),
            "lr_encoder": rates[0],
            "lr_decoder": rates[1],
            "skipped": progress.skipped,
            "images_per_second": self.images / self.elapsed,
            "data_wait": self.waited / self.elapsed,
            "seconds": progress.seconds,
        }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


@contextmanager
def _cudnn_benchmark(wanted: bool) -> Iterator[None]:
    """Enable cuDNN's benchmark mode, useful if all batches have the same size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
