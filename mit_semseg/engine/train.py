"""Training: seeded, resumed exactly from any step, validated as it goes, and never hanging."""

from __future__ import annotations

import itertools
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mit_semseg.config.node import Config
from mit_semseg.dataset import TrainDataset, build_split, check_sample
from mit_semseg.engine.balance import class_weights
from mit_semseg.engine.checkpoint import CheckpointFolder, atomic_save
from mit_semseg.engine.eval_report import single_class
from mit_semseg.engine.evaluate import Interrupted, evaluate_model, merged, val_dataset
from mit_semseg.engine.feed import Feed
from mit_semseg.engine.journal import Journal
from mit_semseg.engine.launch import (
    autocast,
    cpu_count,
    fixed_threads,
    keep_freed_memory,
    local_ranks,
    set_threads,
)
from mit_semseg.engine.optim import (
    build_optimizer,
    joined_states,
    load_optimizer,
    moving_average,
    poly_factor,
    set_learning_rates,
)
from mit_semseg.engine.peers import lost_peers
from mit_semseg.engine.resume import Search
from mit_semseg.engine.run_state import (
    Snapshot,
    differences,
    random_state,
    rank_seed,
    restore_random_state,
    seed_everything,
)
from mit_semseg.engine.signals import StopRequest
from mit_semseg.engine.threads import ThreadTuner, pixels
from mit_semseg.engine.watchdog import Watchdog, reading_watchdog
from mit_semseg.lib.nn import UserScatteredDataParallel, async_copy_to
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.compilation import compile_for_training, compiler_errors
from mit_semseg.models.recompute import recompute
from mit_semseg.precision import Precision

log = logging.getLogger("mit_semseg")

# Steps in a row without a finite loss after which TRAIN.on_nan skip gives up, too; and steps in a
# row whose gradients fp16 cannot hold: the loss scale, which begins at 65536, is 1/16 by then.
MOST_SKIPPED = 20
# Batches saved for replay, at most: each holds the weights, too.
MOST_SAVED = 3
# What to do when nothing moves.
STALLED = "look at these files, or raise TRAIN.stall_seconds"
# Seconds that a step may at least take on GPUs of several ranks after a request to stop.
STOP_GRACE = 8.0


def train(
    cfg: Config,
    devices: Sequence[torch.device],
    *,
    rank: int = 0,
    world: int = 1,
    resume: bool | str = False,
    job: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Train the configured model and leave its checkpoint folder in `cfg.DIR`.

    SIGTERM and SIGINT make it finish the step, save its state and return. Killed at any moment and
    resumed it goes on from its newest state; on the CPU its weights are then those, bit by bit, of
    a run that was never killed.

    Args:
        cfg: a checked configuration (`launch.read_config`).
        devices: devices of this process; several are driven by UserScatteredDataParallel.
        rank, world: place in torchrun's process group (`launch.rank_devices`).
        resume: "auto" or True continues from the newest state in `cfg.DIR` that is whole, and
            starts anew where there is none; otherwise a state file, or a folder with one.
        job: name of the job that this run is part of (`launch.job_name`): one that comes back
            after it has lost a rank goes on from its own states, whatever `resume` says.
        progress: show tqdm bars.

    Returns:
        `best_mean_iou` (None when nothing was validated), `checkpoint` (best.pth, or the last
        epoch), `history`, `step`, `steps`, and `stopped`, the signal that ended the run before its
        last step ("" when it was completed).

    Raises:
        ValueError: unusable data or configuration, before the first step.
        FloatingPointError: the loss is no finite number; the files of the batch are named.
        ChildProcessError: a loading process died.
        TimeoutError: no batch came for TRAIN.stall_seconds.
        ConnectionError: another rank was lost.
        MemoryError: a GPU is out of memory.
        OSError: the checkpoint folder cannot be written to.

    When nothing moves for TRAIN.stall_seconds and no exception reaches what hangs, the whole
    process is ended, with exit status 3 and a line that says what it waited for.
    """
    try:
        trainer = Trainer(cfg, devices, rank, world, progress and rank == 0, resume, job)
        return trainer.run()
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(
            f"{' '.join(str(error).split())[:200]}: lower TRAIN.batch_size_per_gpu (and raise "
            "TRAIN.accumulate), set TRAIN.precision bf16 or TRAIN.recompute True, or lower "
            "DATASET.imgMaxSize"
        ) from error


class Trainer:
    """One run; `run` is the whole of it, the other methods its parts in order."""

    def __init__(
        self,
        cfg: Config,
        devices: Sequence[torch.device],
        rank: int,
        world: int,
        progress: bool,
        resume: bool | str = False,
        job: str = "",
    ) -> None:
        self.cfg, self.devices = cfg, list(devices)
        self.rank, self.world, self.progress = rank, world, progress
        self.device = self.devices[0]
        self.folder = CheckpointFolder(cfg.DIR)
        self.journal = Journal(self.folder.path, rank)
        self.history: dict[str, dict[str, list[float]]] = {
            "train": {"epoch": [], "loss": [], "acc": []},
            "val": {"epoch": [], "mean_iou": [], "pixel_accuracy": []},
        }
        # Steps done, batches that all ranks have taken for them, and seconds they took.
        self.step, self.position, self.seconds = 0, 0, 0.0
        self.steps_here = 0  # in this process
        # Of the steps of this epoch.
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.skipped = 0  # steps of the whole run, and those that ended it so far
        self.skipped_in_a_row = 0
        self.slowest_step = 0.0  # in seconds, but for the first
        self.bad_files: dict[str, str] = {}
        self.stop = StopRequest()
        self.watchdog = Watchdog(cfg.TRAIN.stall_seconds)
        self.saved_at = time.monotonic()
        if cfg.TRAIN.compile and (count := len(self.devices) * world) > 1:
            raise ValueError(
                f"TRAIN.compile with {count} devices: BatchNorm over all of them cannot be "
                "compiled; set TRAIN.compile False, or train on one device"
            )
        if cfg.TRAIN.start_epoch > cfg.TRAIN.num_epoch:
            raise ValueError(
                f"TRAIN.start_epoch {cfg.TRAIN.start_epoch} lies behind TRAIN.num_epoch "
                f"{cfg.TRAIN.num_epoch}: raise TRAIN.num_epoch to train on"
            )
        if self.device.type == "cpu":
            set_threads(fixed_threads() or cpu_count() // local_ranks())
            keep_freed_memory()
        # Ranks wait for each other: what one of them measures is not its own time.
        alone = self.device.type == "cpu" and world == 1
        self.threads = ThreadTuner(enabled=alone and not cfg.TRAIN.compile)
        seed_everything(cfg.TRAIN.seed)
        with reading_watchdog(cfg.TRAIN.stall_seconds, self._name, STALLED):
            self.split = build_split(cfg.DATASET, "train")
            check_sample(self.split, on_error=cfg.DATASET.on_error)
            self.data = TrainDataset(
                cfg.DATASET.root_dataset,
                self.split.records,
                cfg.DATASET,
                batch_per_gpu=cfg.TRAIN.batch_size_per_gpu,
                seed=cfg.TRAIN.seed,
                label_map=self.split.label_map,
                normalized=False,  # bytes travel; the module normalises them where it computes
            )
            self.val = val_dataset(cfg) if cfg.TRAIN.eval_epochs else None
            if self.val is not None and rank == 0:
                # A mask that cannot be used is to be found now, not after the first epoch.
                val = build_split(cfg.DATASET, "val")
                if val.classes.names != self.split.classes.names:
                    raise ValueError(
                        "DATASET.list_train and DATASET.list_val are of different classes, "
                        f"{', '.join(self.split.classes.names[:8])} and "
                        f"{', '.join(val.classes.names[:8])}; give both the same, in one order"
                    )
                check_sample(val, n=8, on_error=cfg.DATASET.on_error)
            weights = class_weights(cfg, self.split, progress=progress)
        self.batches_a_step = len(self.devices) * world * cfg.TRAIN.accumulate
        self.epoch_iters: int = (
            math.ceil(self.data.batches_per_pass / self.batches_a_step)
            if cfg.TRAIN.epoch_iters == "auto"
            else cfg.TRAIN.epoch_iters
        )
        self.max_iters = self.epoch_iters * cfg.TRAIN.num_epoch
        self.search = Search(
            self.folder,
            resume="auto" if resume is True else resume or "",
            job=job,
            start_epoch=cfg.TRAIN.start_epoch,
            epoch_iters=self.epoch_iters,
            batches_a_step=self.batches_a_step,
        )
        self._build(weights)

    @property
    def _name(self) -> str:
        """Of this process, in messages."""
        return f"rank {self.rank}" if self.world > 1 else ""

    def _build(self, weights: Tensor | None) -> None:
        cfg = self.cfg
        initial = cfg
        if self.search.may_find():
            # The weights that training began with may be gone, or behind a net that is down.
            initial = cfg.clone()
            initial.MODEL.weights_encoder = initial.MODEL.weights_decoder = "none"
        self.module: SegmentationModule = ModelBuilder.from_config(
            initial, inference=False, class_weights=weights
        )
        self.module.to(self.device)
        if cfg.TRAIN.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # fp16 overflows without loss scaling; bf16 has the range of fp32.
        fp16 = Precision.of(cfg.TRAIN.precision, self.device).dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.optimizer = build_optimizer(
            cfg,
            (self.module.encoder, cfg.TRAIN.lr_encoder),
            (self.module.decoder, cfg.TRAIN.lr_decoder),
        )
        self.average = moving_average(self.module, cfg.TRAIN.ema) if cfg.TRAIN.ema else None
        self.statistics = Snapshot(self.module)
        if cfg.TRAIN.recompute:
            recompute(self.module.encoder)
        if cfg.TRAIN.compile:
            compile_for_training(self.module.encoder, "forward")
            compile_for_training(self.module.decoder, "log_probabilities")
        self.parallel: nn.Module = self.module
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            with self._peers():
                self.parallel = nn.parallel.DistributedDataParallel(
                    self.module, device_ids=ids, broadcast_buffers=False
                )
        elif len(self.devices) > 1:
            self.parallel = UserScatteredDataParallel(
                self.module, device_ids=self.devices, timeout=cfg.TRAIN.stall_seconds
            )

    def run(self) -> dict[str, Any]:
        """All epochs."""
        cfg = self.cfg
        if self.rank == 0:
            self.folder.occupy()
        try:
            self._begin()
            log.info(
                "training %s + %s on %d images: epochs %d, steps each %d, batch %d x %d devices, "
                "%s%s",
                cfg.MODEL.arch_encoder,
                cfg.MODEL.arch_decoder,
                len(self.split.records),
                cfg.TRAIN.num_epoch,
                self.epoch_iters,
                cfg.TRAIN.batch_size_per_gpu * cfg.TRAIN.accumulate,
                len(self.devices) * self.world,
                cfg.TRAIN.precision,
                f", from step {self.step} on" if self.step else "",
            )
            feed = Feed(
                self.data,
                cfg,
                self.devices,
                self.rank,
                self.world,
                self.position,
                self.max_iters - self.step,
            )
            self.stop = StopRequest(repeated=self.world > 1, on_ask=self._hurry)
            self.watchdog = Watchdog(
                # Behind the loader's own limit, whose message says more.
                cfg.TRAIN.stall_seconds + 2,
                name=self._name,
                files=feed.files,
                advice=f"{STALLED}; --resume auto goes on from the newest checkpoint",
                at_the_end=feed.kill,
            )
            with self.stop, self.watchdog:
                try:
                    self._epochs(iter(feed))
                finally:
                    self.watchdog.progress("the loading processes to end")
                    feed.close()
        finally:
            self.folder.leave()
        has_best = "best.pth" in self.folder.names()
        name = "best.pth" if has_best else f"epoch_{cfg.TRAIN.num_epoch}.pth"
        done = self.step >= self.max_iters
        if done and self._is_validated and self.rank == 0:
            self.folder.note_job("")
        return {
            "best_mean_iou": self.best,
            "checkpoint": name if done else f"state_step_{self.step}.pth",
            "history": self.history,
            "step": self.step,
            "steps": self.max_iters,
            "stopped": "" if done and self._is_validated else self.stop.asked,
        }

    def _hurry(self) -> None:
        """When a rank has died, those on GPUs wait for it in vain: NCCL does not notice."""
        if self.world > 1 and self.device.type == "cuda" and self.slowest_step:
            self.watchdog.hurry(max(STOP_GRACE, 3 * self.slowest_step))

    def _epochs(self, batches: Iterator[list[dict[str, Any]]]) -> None:
        if self.step and self.step % self.epoch_iters == 0:
            # The run was stopped after the last step of an epoch, before all was written.
            self._finish_epoch(self.step // self.epoch_iters)
        while self.step < self.max_iters and not self._stops():
            epoch, inside = divmod(self.step, self.epoch_iters)
            if not inside:
                seed_everything(self.cfg.TRAIN.seed + rank_seed(self.rank, epoch + 1))
                self.losses, self.accuracies = [], []
            began, seconds = time.monotonic(), self.seconds
            self._epoch(epoch + 1, batches, seconds)
            self.seconds = seconds + time.monotonic() - began
            if self.step % self.epoch_iters:
                break
            self._close_history(epoch + 1)
            self._save_state()
            self._finish_epoch(epoch + 1)
        self.journal.draw()

    # ------------------------------------------------------------------ one epoch

    def _epoch(
        self, epoch: int, batches: Iterator[list[dict[str, Any]]], seconds_before: float
    ) -> None:
        """Steps up to the end of an epoch, or to a request to stop, which is answered."""
        cfg = self.cfg
        self.parallel.train()
        if cfg.TRAIN.fix_bn:
            freeze_batchnorm(self.module)
        began = time.monotonic()
        meter = _Meter()
        first, last = self.step, epoch * self.epoch_iters
        title = f"epoch {epoch}/{cfg.TRAIN.num_epoch}"
        with tqdm(
            total=self.epoch_iters,
            initial=first - (epoch - 1) * self.epoch_iters,
            desc=title,
            disable=not self.progress,
            dynamic_ncols=True,
        ) as bar:
            while self.step < last:
                rates = self._schedule(self.step)
                stop, save = self._one_step(batches, meter)
                elapsed = time.monotonic() - began
                self.seconds = seconds_before + elapsed
                pace = elapsed / (self.step - first)
                figures = (
                    f"loss {_mean(self.losses[-20:]):.3f}, "
                    f"accuracy {100 * _mean(self.accuracies[-20:]):.1f}%, "
                    f"lr {rates[0]:.2g}/{rates[1]:.2g}, {meter.images / elapsed:.1f} images/s, "
                    f"waiting for data {100 * meter.waited / elapsed:.0f}%, run done in "
                    f"{tqdm.format_interval((self.max_iters - self.step) * pace)}"
                    + (f", skipped steps: {self.skipped}" if self.skipped else "")
                )
                bar.set_postfix_str(figures, refresh=False)
                bar.update()
                if self.step % cfg.TRAIN.disp_iter == 0 or self.step == last:
                    # An epoch shorter than disp_iter still leaves a line for the curves.
                    recent = slice(-cfg.TRAIN.disp_iter, None)
                    self.journal.record(
                        kind="train",
                        epoch=epoch,
                        step=self.step,
                        loss=_mean(self.losses[recent]),
                        accuracy=_mean(self.accuracies[recent]),
                        lr_encoder=rates[0],
                        lr_decoder=rates[1],
                        skipped=self.skipped,
                        images_per_second=meter.images / elapsed,
                        data_wait=meter.waited / elapsed,
                        seconds=self.seconds,
                    )
                    if not self.progress and self.rank == 0:
                        log.info("%s, step %d of %d: %s", title, self.step, self.max_iters, figures)
                if self.step < last and (stop or save):
                    self._save_state()
                if stop:
                    self.stop.asked = self.stop.asked or "a signal to another rank"
                    return

    def _one_step(
        self, batches: Iterator[list[dict[str, Any]]], meter: _Meter
    ) -> tuple[bool, bool]:
        """One step of the optimizer; whether all ranks are to stop, and to save, after it."""
        cfg = self.cfg
        began = time.monotonic()
        self.statistics.take()
        loss = accuracy = 0.0
        stop = save = finite = True
        for part in range(cfg.TRAIN.accumulate):
            self.watchdog.progress(f"a batch of step {self.step + 1}")
            asked = time.monotonic()
            batch = next(batches)
            meter.waited += time.monotonic() - asked
            meter.images += sum(len(item["img_data"]) for item in batch) * self.world
            if not finite:  # the step is given up, but the stream goes on
                continue
            self.watchdog.progress(
                f"step {self.step + 1} to be computed" + (" by all ranks" * (self.world > 1))
            )
            size = pixels(item["img_data"] for item in batch)
            with (
                self._compilation(),
                self._unsynchronised(part),
                compiler_errors(),
                self._peers(),
                self.threads.step(size),
            ):
                part_loss, part_accuracy, stop, save = self._forward_backward(batch)
            finite = math.isfinite(part_loss)
            loss += part_loss / cfg.TRAIN.accumulate
            accuracy += part_accuracy / cfg.TRAIN.accumulate
        if finite and self._update():
            self.losses.append(loss)
            self.accuracies.append(accuracy)
            self.skipped_in_a_row = 0
        else:
            self._give_up_step()
        if self.steps_here:
            self.slowest_step = max(self.slowest_step, time.monotonic() - began)
        self.steps_here += 1
        self.step += 1
        self.position += self.batches_a_step
        return stop, save

    def _compilation(self) -> AbstractContextManager[None]:
        """Compiling, in the first steps, takes minutes, which is no reason to bark."""
        compiles = self.cfg.TRAIN.compile and self.steps_here < 10
        return self.watchdog.patient() if compiles else nullcontext()

    def _schedule(self, step: int) -> tuple[float, float]:
        cfg = self.cfg.TRAIN
        factor = poly_factor(step, self.max_iters, cfg.lr_pow, cfg.warmup_iters)
        rates = cfg.lr_encoder * factor, cfg.lr_decoder * factor
        set_learning_rates(self.optimizer, *rates)
        return rates

    def _unsynchronised(self, part: int) -> AbstractContextManager[None]:
        """Gradients are added up within each rank, until those of the last part are in."""
        ddp = nn.parallel.DistributedDataParallel
        if isinstance(self.parallel, ddp) and part + 1 < self.cfg.TRAIN.accumulate:
            return self.parallel.no_sync()
        return nullcontext()

    def _forward_backward(self, batch: list[dict[str, Any]]) -> tuple[float, float, bool, bool]:
        files = [item.pop("info") for item in batch]
        for item in batch:
            self._report(item.pop("skipped", []))
            if not self.cfg.TRAIN.channels_last:  # which the data set gives channels last
                item["img_data"] = item["img_data"].contiguous()
        feed: Any = batch
        if not isinstance(self.parallel, UserScatteredDataParallel):
            feed = async_copy_to(batch[0], self.device)
        with autocast(self.device, self.cfg.TRAIN.precision):
            loss, accuracy = self.parallel(feed)
        loss = loss.mean()
        value, right, stop, save = self._over_ranks(loss.detach(), accuracy.detach().mean())
        if math.isfinite(value):
            self.scaler.scale(loss / self.cfg.TRAIN.accumulate).backward()
        else:
            self._nonfinite(loss.item(), batch, list(itertools.chain.from_iterable(files)))
        return value, right, stop, save

    def _over_ranks(self, loss: torch.Tensor, accuracy: torch.Tensor) -> tuple[Any, ...]:
        """Means of loss and accuracy over the ranks, each weighted by its share already; and
        whether any rank was asked to stop, and the first finds it time to save."""
        minutes = self.cfg.TRAIN.checkpoint_minutes
        due = bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes
        flags = bool(self.stop.asked), due and self.rank == 0
        if self.world == 1:
            return (*torch.stack([loss.float(), accuracy.float()]).tolist(), *flags)
        together = torch.stack([loss.float(), accuracy.float(), *map(loss.new_tensor, flags)])
        dist.all_reduce(together)
        loss_sum, accuracy_sum, stop, save = together.tolist()
        return loss_sum / self.world, accuracy_sum / self.world, stop > 0, save > 0

    def _stops(self) -> bool:
        """Whether any rank was asked to stop."""
        if self.world > 1:
            with self._peers():
                asked = torch.tensor(float(bool(self.stop.asked)), device=self.device)
                dist.all_reduce(asked)
            if asked.item() and not self.stop.asked:
                self.stop.asked = "a signal to another rank"
        return bool(self.stop.asked)

    def _update(self) -> bool:
        """One step of the optimizer; False when gradients are non-finite.

        Raises:
            FloatingPointError: they are not, and TRAIN.on_nan is stop, or they have not been for
                many steps.
        """
        if self._overflows() or (self.cfg.TRAIN.clip_grad and not self._clip()):
            return False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.module)
        return True

    def _overflows(self) -> bool:
        """Take the loss scale of fp16 out of the gradients; whether it was too high for them.

        That is found on the host and the step left out here, rather than by `GradScaler.step`: it
        lets fused optimizers run and write nothing, and the momentum of a first step of SGD, which
        nothing was written to, would be whatever was in memory.
        """
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        self.scaler.update()
        lowered = self.scaler.get_scale()
        if lowered >= scale:  # always, where fp16 is not used
            return False
        text = (
            f"fp16 cannot hold the gradients of step {self.step + 1} at a loss scale of {scale:g}"
        )
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"{text}, after {self.skipped_in_a_row} skipped steps; lower TRAIN.lr_encoder and "
                "TRAIN.lr_decoder, or train with TRAIN.precision bf16 or fp32"
            )
        if self.rank == 0:  # all ranks have the same gradients
            log.warning(
                "%s: the step is skipped (%d so far), and the scale is %g now; a few such steps "
                "are normal, at the beginning most of all",
                text,
                self.skipped + 1,
                lowered,
            )
        return True

    def _clip(self) -> bool:
        """Bound the norm of the gradients; one that is infinite would spoil all of them."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.cfg.TRAIN.clip_grad)
        if bool(torch.isfinite(norm)):
            return True
        text = f"the gradients of step {self.step + 1} are no finite numbers"
        if self.cfg.TRAIN.on_nan == "stop" or self.skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"{text}; lower TRAIN.lr_encoder and TRAIN.lr_decoder, or train with "
                "TRAIN.precision fp32"
            )
        log.warning("%s; the step is skipped", text)
        return False

    def _peers(self) -> AbstractContextManager[object]:
        """What a collective says when a rank is gone, as one line."""
        return lost_peers(self.step + 1) if self.world > 1 else nullcontext()

    # ------------------------------------------------------------------ what goes wrong

    def _report(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Say once of every bad file that another sample was taken in its place."""
        for file, reason in skipped:
            if file not in self.bad_files:
                log.warning("left out, and another sample taken instead: %s", reason)
                self.bad_files[file] = reason

    def _nonfinite(self, value: float, batch: list[dict[str, Any]], files: list[str]) -> None:
        """Save a batch for replay with the weights it met; raise unless TRAIN.on_nan is skip.

        Args:
            value: this rank's own loss: it may be finite, and another rank's not.
            batch: one dict per device.
            files: the images in it.
        """
        self.statistics.put_back()
        step = f"step {self.step + 1}"
        if math.isfinite(value):
            text = f"the loss of {step} is no finite number on another rank, which names the files"
        else:
            where = self._save_batch(value, batch, files)
            text = f"the loss of {step} is {value} on {', '.join(files)} (batch {where})"
        if self.cfg.TRAIN.on_nan == "skip" and self.skipped_in_a_row < MOST_SKIPPED:
            log.warning("%s; the step is skipped", text)
            return
        again = f", after {self.skipped_in_a_row} skipped steps" if self.skipped_in_a_row else ""
        raise FloatingPointError(
            f"{text}{again}; look at these files, or lower TRAIN.lr_encoder and TRAIN.lr_decoder, "
            "or train with TRAIN.precision fp32"
        )

    def _save_batch(self, value: float, batch: list[dict[str, Any]], files: list[str]) -> str:
        """Where it was saved, in words; a run saves a few at most."""
        mark = f"_rank_{self.rank}" if self.world > 1 else ""
        file = self.folder.path / f"nonfinite_step_{self.step + 1}{mark}.pth"
        mine = re.compile(rf"nonfinite_step_\d+{mark}\.pth")
        if sum(bool(mine.fullmatch(x.name)) for x in self.folder.path.iterdir()) >= MOST_SAVED:
            return "not saved, there are enough"
        replay = {
            "step": self.step + 1,
            "loss": value,
            "files": files,
            "batch": batch,
            "encoder": self.module.encoder.state_dict(),
            "decoder": self.module.decoder.state_dict(),
        }
        atomic_save({file: replay})
        return f"saved as {file}"

    def _give_up_step(self) -> None:
        """As if the step had not been: no gradients, and the statistics of before."""
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.put_back()
        self.skipped += 1
        self.skipped_in_a_row += 1

    # ------------------------------------------------------------------ between epochs

    def _close_history(self, epoch: int) -> None:
        columns = self.history["train"]
        columns["epoch"].append(float(epoch))
        columns["loss"].append(_mean(self.losses))
        columns["acc"].append(_mean(self.accuracies))
        if self.bad_files and self.rank == 0:
            log.warning("%d files could not be used so far", len(self.bad_files))

    def _finish_epoch(self, epoch: int) -> None:
        """Write the published files of an epoch, and validate it if that has not been done."""
        if self.rank == 0:
            with self.watchdog.patient():
                self._save_weights(epoch)
                self.journal.draw()
        if self._validates(epoch):
            self._validate(epoch)
            self.journal.draw()

    def _save_weights(self, epoch: int) -> None:
        net = self.evaluated
        self.folder.save(f"epoch_{epoch}.pth", net.encoder.state_dict(), net.decoder.state_dict())
        self.folder.save_history(epoch, self.history)
        self.folder.drop_epochs(self.cfg.TRAIN.keep)

    @property
    def best(self) -> float | None:
        """The highest validated mean IoU so far."""
        return max(filter(math.isfinite, self.history["val"]["mean_iou"]), default=None)

    @property
    def best_epoch(self) -> int:
        """The last epoch with that mean IoU; 0 when nothing was validated."""
        val = self.history["val"]
        scores = dict(zip(val["mean_iou"], val["epoch"]))
        return 0 if self.best is None else int(scores[self.best])

    @property
    def _is_validated(self) -> bool:
        return not self._validates(self.cfg.TRAIN.num_epoch)

    def _validates(self, epoch: int) -> bool:
        if self.val is None or epoch in self.history["val"]["epoch"]:
            return False
        return epoch % self.cfg.TRAIN.eval_epochs == 0 or epoch == self.cfg.TRAIN.num_epoch

    @property
    def evaluated(self) -> SegmentationModule:
        """The weights that checkpoints hold: the running average when there is one."""
        net = self.module if self.average is None else self.average.module
        return cast(SegmentationModule, net)

    def _validate(self, epoch: int) -> None:
        """Score an epoch, every rank a share of the images; a request to stop gives it up, and the
        resumed run begins it again."""
        assert self.val is not None

        def stop() -> bool:
            self.watchdog.progress("an image to be validated")
            # Several ranks score their shares to the end: whoever left would wait for the others.
            return bool(self.stop.asked) and self.world == 1

        net = self.evaluated
        try:
            evaluation = evaluate_model(
                net,
                self.val,
                self.cfg,
                self.device,
                progress=self.progress,
                share=(self.rank, self.world),
                stop=stop,
            )
        except Interrupted:
            log.info("validation of epoch %d is given up", epoch)
            return
        with self._peers():
            evaluation = merged(evaluation, self.device)
        scores = evaluation.matrix.compute()
        mean_iou, accuracy = float(scores["mean_iou"]), float(scores["pixel_accuracy"])
        self.history["val"]["epoch"].append(float(epoch))
        self.history["val"]["mean_iou"].append(mean_iou)
        self.history["val"]["pixel_accuracy"].append(accuracy)
        log.info("epoch %d: mean IoU %.4f, accuracy %.2f%%", epoch, mean_iou, 100 * accuracy)
        if self.rank:
            return
        if line := single_class(evaluation.matrix, self.split.classes):
            log.warning("epoch %d: %s", epoch, line)
        for file, reason in evaluation.failed:
            log.warning("not validated: %s: %s", file, reason.removeprefix(f"{file}: "))
        # The best weights first: a run killed in between validates again, and writes them again.
        if mean_iou == self.best or "best.pth" not in self.folder.names():
            self.folder.save("best.pth", net.encoder.state_dict(), net.decoder.state_dict())
        self.journal.record(kind="val", epoch=epoch, mean_iou=mean_iou, pixel_accuracy=accuracy)
        self.folder.save_history(epoch, self.history)

    # ------------------------------------------------------------------ the state of the run

    def _save_state(self) -> None:
        """Everything that a resumed run needs, as it is after this step.

        Raises:
            FloatingPointError: there is no use in it: what was saved before is kept instead.
        """
        if not all(bool(torch.isfinite(weight).all()) for weight in self.module.parameters()):
            raise FloatingPointError(
                f"after step {self.step} the weights are no finite numbers; nothing was saved "
                "since they were: lower TRAIN.lr_encoder and TRAIN.lr_decoder, set "
                "TRAIN.clip_grad, or train with TRAIN.precision fp32"
            )
        with self.watchdog.patient():
            own = random_state(self.devices)
            everyone: list[Any] = [own]
            if self.world > 1:
                everyone = [None] * self.world
                with self._peers():
                    dist.all_gather_object(everyone, own)
            if self.rank == 0:
                self.folder.save_state(self.step, self._state(everyone))
        self.saved_at = time.monotonic()

    def _state(self, random_states: list[Any]) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": self.position,
            "epoch_iters": self.epoch_iters,
            "max_iters": self.max_iters,  # with the step all that the schedule depends on
            "encoder": self.module.encoder.state_dict(),
            "decoder": self.module.decoder.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optim": self.cfg.TRAIN.optim,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states,
            "history": self.history,
            "best": self.best,
            "losses": self.losses,
            "accuracies": self.accuracies,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
            "config": self.cfg.dump(),
        }

    def _begin(self) -> None:
        """Take up an earlier run, or start a new one; rank 0 reads, and tells the others."""
        earlier = self.search.find(self.module) if self.rank == 0 else None
        file, state = earlier or (None, None)
        here = file is not None and file.parent.resolve() == self.folder.path.resolve()
        if self.world > 1:
            found: list[Any] = [state, here]
            with self._peers():
                dist.broadcast_object_list(found, src=0)
            state, here = found
        if state is not None:
            self._restore(state, file)
        epoch = self.step // self.epoch_iters
        if self.rank == 0:
            if state is None or not here:
                self.folder.set_aside()
            else:
                newer = self.journal.best_epoch() > epoch
                self.folder.set_aside_after(state["step"], epoch, newer)
                if newer:
                    self.folder.make_best(self.best_epoch)
                self.journal.forget(self.step, epoch - 1 if self._validates(epoch) else epoch)
            self.folder.prepare(self.cfg, self.split.classes)
            self.folder.note_job(self.search.job)
        if state is None or (here and state["step"] == self.step):
            return
        # The place has another number or folder now: from here on it is found by that.
        if not here:
            self.history["val"] = {key: [] for key in self.history["val"]}  # best.pth is elsewhere
        elif self.rank == 0:
            for other in self.folder.states():
                if other != file:
                    other.unlink()
        self._save_state()
        if self.rank == 0:
            self.folder.set_aside_after(self.step, epoch, best=False)

    def _restore(self, state: dict[str, Any], file: Path | None) -> None:
        """Become the run that wrote a state; `file` is for messages."""
        try:
            self.module.encoder.load_state_dict(state["encoder"])
            self.module.decoder.load_state_dict(state["decoder"])
            if self.average is not None:
                if state.get("average"):
                    self.average.load_state_dict(state["average"])
                else:
                    self.average.module.load_state_dict(self.module.state_dict())
            if state.get("optim") == self.cfg.TRAIN.optim:
                before = "optimizers" in state  # one for each half
                saved = joined_states(state["optimizers"]) if before else state["optimizer"]
                load_optimizer(self.optimizer, saved)
            self.scaler.load_state_dict(state.get("scaler", {}) or self.scaler.state_dict())
            # An epoch may have another number of steps now: how far the run is counts in epochs.
            self.step = state["step"] * self.epoch_iters // state["epoch_iters"]
            self.position = state["position"]
            self.losses = _numbers(state.get("losses", ()))
            self.accuracies = _numbers(state.get("accuracies", ()))
            self.skipped = int(state.get("skipped", 0))
            self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
            self.seconds = float(state.get("seconds", 0.0))
            for part, columns in self.history.items():
                found = state["history"].get(part, {}).items()
                columns.update({key: _numbers(column) for key, column in found if key in columns})
            epoch = self.step // self.epoch_iters
            states = state.get("random", [])
            if len(states) == self.world:
                restore_random_state(states[self.rank], self.devices)
            else:
                seed_everything(self.cfg.TRAIN.seed + rank_seed(self.rank, epoch + 1) + self.step)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} does not fit this run ({' '.join(str(error).split())[:200]}): resume "
                "with the configuration it was written with"
            ) from error
        if self.step > self.max_iters:
            raise ValueError(
                f"{file} is in epoch {self.step / self.epoch_iters:.3g}, and TRAIN.num_epoch is "
                f"{self.cfg.TRAIN.num_epoch}: raise TRAIN.num_epoch to train on"
            )
        if self.rank == 0 and file is not None:
            log.info("resuming from %s: step %d of %d", file, self.step, self.max_iters)
            if state.get("optim", self.cfg.TRAIN.optim) != self.cfg.TRAIN.optim:
                log.warning("the state is of another optimizer: momentum starts afresh")
            for line in differences(state.get("config", ""), self.cfg):
                log.warning("since %s was written: %s", file.name, line)


@dataclass
class _Meter:
    """What the progress bar and the log say about an epoch's pace."""

    waited: float = 0.0  # seconds
    images: int = 0


def _numbers(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def freeze_batchnorm(module: nn.Module) -> None:
    """Put every BatchNorm, and nothing else, in evaluation mode."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
