"""Training: seeded, resumable, validated as it goes."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from mit_semseg.config.node import Config
from mit_semseg.dataset import Split, TrainDataset, build_split, check_sample
from mit_semseg.engine.balance import class_weights
from mit_semseg.engine.checkpoint import CheckpointFolder, load_whole
from mit_semseg.engine.evaluate import evaluate_model, val_dataset
from mit_semseg.engine.launch import (
    autocast,
    autocast_dtype,
    cpu_count,
    keep_freed_memory,
    set_threads,
)
from mit_semseg.engine.optim import (
    build_optimizer,
    moving_average,
    poly_factor,
    set_learning_rate,
)
from mit_semseg.lib.nn import UserScatteredDataParallel, async_copy_to, user_scattered_collate
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.compilation import compile_for_training, compiler_errors
from mit_semseg.models.recompute import recompute
from mit_semseg.visualize import curves

log = logging.getLogger("mit_semseg")

METRICS = "metrics.jsonl"
CURVES = "curves.png"


class RankSampler(Sampler[int]):
    """Indices of one rank in the endless stream of batches, from a step on.

    Every micro-step consumes one batch per device and rank; a rank with D devices of R ranks
    takes D consecutive ones out of each R x D.
    """

    def __init__(self, start: int, stop: int, devices: int, rank: int, world: int) -> None:
        self.micro_steps = range(start, stop)
        self.devices, self.rank, self.world = devices, rank, world

    def __len__(self) -> int:
        return len(self.micro_steps) * self.devices

    def __iter__(self) -> Iterator[int]:
        for step in self.micro_steps:
            first = (step * self.world + self.rank) * self.devices
            yield from range(first, first + self.devices)


def train(
    cfg: Config,
    devices: Sequence[torch.device],
    *,
    rank: int = 0,
    world: int = 1,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the configured model and leave its checkpoint folder in `cfg.DIR`.

    Args:
        cfg: a checked configuration (`launch.read_config`).
        devices: devices of this process; several are driven by UserScatteredDataParallel.
        rank, world: place in torchrun's process group (`launch.rank_devices`).
        resume: continue from the newest epoch in `cfg.DIR`, identically where its state is there.
        progress: show tqdm bars.

    Returns:
        `best_mean_iou` (None when nothing was validated), `checkpoint` (best.pth, or the last
        epoch) and `history`.

    Raises:
        ValueError: unusable data or configuration, before the first step.
        FloatingPointError: the loss is no finite number; the files of the batch are named.
        RuntimeError: no batch came for TRAIN.stall_seconds seconds, or a loader process died.
    """
    return Trainer(cfg, devices, rank, world, progress and rank == 0).run(resume)


class Trainer:
    """One run; `run` is the whole of it, the other methods its parts in order."""

    def __init__(
        self, cfg: Config, devices: Sequence[torch.device], rank: int, world: int, progress: bool
    ) -> None:
        self.cfg, self.devices = cfg, list(devices)
        self.rank, self.world, self.progress = rank, world, progress
        self.device = self.devices[0]
        self.folder = CheckpointFolder(cfg.DIR)
        self.history: dict[str, dict[str, list[float]]] = {
            "train": {"epoch": [], "loss": [], "acc": []},
            "val": {"epoch": [], "mean_iou": [], "pixel_accuracy": []},
        }
        self.seconds = 0.0
        if cfg.TRAIN.compile and (count := len(self.devices) * world) > 1:
            raise ValueError(
                f"TRAIN.compile with {count} devices: BatchNorm over all of them cannot be "
                "compiled; set TRAIN.compile False, or train on one device"
            )
        if self.device.type == "cpu":
            set_threads(max(1, cpu_count() // world))
            keep_freed_memory()
        seed_everything(cfg.TRAIN.seed)

        split = build_split(cfg.DATASET, "train")
        check_sample(split)
        self.data = TrainDataset(
            cfg.DATASET.root_dataset,
            split.records,
            cfg.DATASET,
            batch_per_gpu=cfg.TRAIN.batch_size_per_gpu,
            seed=cfg.TRAIN.seed,
            label_map=split.label_map,
            normalized=False,  # bytes travel; the module normalises them where it computes
        )
        self.split = split
        self.val = val_dataset(cfg) if cfg.TRAIN.eval_epochs and rank == 0 else None
        if self.val is not None:
            # A mask that cannot be used is to be found now, not after the first epoch.
            check_sample(build_split(cfg.DATASET, "val"), n=8)
        batches_a_step = len(self.devices) * world * cfg.TRAIN.accumulate
        self.epoch_iters: int = (
            math.ceil(self.data.batches_per_pass / batches_a_step)
            if cfg.TRAIN.epoch_iters == "auto"
            else cfg.TRAIN.epoch_iters
        )
        self.max_iters = self.epoch_iters * cfg.TRAIN.num_epoch
        self._build(split)

    def _build(self, split: Split) -> None:
        cfg = self.cfg
        weights = class_weights(cfg, split, progress=self.progress)
        self.module: SegmentationModule = ModelBuilder.from_config(
            cfg, inference=False, class_weights=weights
        )
        self.module.to(self.device)
        if cfg.TRAIN.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # fp16 overflows without loss scaling; bf16 has the range of fp32.
        fp16 = autocast_dtype(self.device, cfg.TRAIN.precision) is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.optimizers = [
            build_optimizer(cfg, self.module.encoder, cfg.TRAIN.lr_encoder),
            build_optimizer(cfg, self.module.decoder, cfg.TRAIN.lr_decoder),
        ]
        self.average = moving_average(self.module, cfg.TRAIN.ema) if cfg.TRAIN.ema else None
        if cfg.TRAIN.recompute:
            recompute(self.module.encoder)
        if cfg.TRAIN.compile:
            compile_for_training(self.module.encoder, "forward")
            compile_for_training(self.module.decoder, "log_probabilities")
        self.parallel: nn.Module = self.module
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.module, device_ids=ids)
        elif len(self.devices) > 1:
            self.parallel = UserScatteredDataParallel(
                self.module, device_ids=self.devices, timeout=cfg.TRAIN.stall_seconds
            )

    def run(self, resume: bool) -> dict[str, Any]:
        """All epochs."""
        cfg = self.cfg
        start = cfg.TRAIN.start_epoch or (self.folder.latest_epoch() if resume else 0)
        if cfg.TRAIN.start_epoch > cfg.TRAIN.num_epoch:
            raise ValueError(
                f"TRAIN.start_epoch {start} lies behind TRAIN.num_epoch {cfg.TRAIN.num_epoch}: "
                "raise TRAIN.num_epoch to train on"
            )
        if self.rank == 0 and not start and (aside := self.folder.set_aside()):
            log.warning("%s held an earlier run, which is now in %s", self.folder.path, aside)
        if start:
            self._restore(start)
        if self.rank == 0:
            self.folder.prepare(cfg, self.split.classes)
        if start and self.rank == 0 and self._validates(start):
            # The run was stopped between saving the epoch and validating it.
            self._validate(start)
        log.info(
            "training %s + %s on %d images: epochs %d, steps each %d, batch %d x %d devices, %s",
            cfg.MODEL.arch_encoder,
            cfg.MODEL.arch_decoder,
            len(self.split.records),
            cfg.TRAIN.num_epoch,
            self.epoch_iters,
            cfg.TRAIN.batch_size_per_gpu * cfg.TRAIN.accumulate,
            len(self.devices) * self.world,
            cfg.TRAIN.precision,
        )
        batches = self._batches(start * self.epoch_iters)
        for epoch in range(start + 1, cfg.TRAIN.num_epoch + 1):
            began = time.monotonic()
            # Seeding every epoch by its number makes a resumed run draw what an unbroken one does.
            seed_everything(cfg.TRAIN.seed + rank_seed(self.rank, epoch))
            self._epoch(epoch, batches)
            self.seconds += time.monotonic() - began
            self._finish_epoch(epoch)
        name = "best.pth" if self.best is not None else f"epoch_{cfg.TRAIN.num_epoch}.pth"
        return {"best_mean_iou": self.best, "checkpoint": name, "history": self.history}

    # ------------------------------------------------------------------ one epoch

    def _epoch(self, epoch: int, batches: Iterator[list[dict[str, Any]]]) -> None:
        cfg = self.cfg
        self.parallel.train()
        if cfg.TRAIN.fix_bn:
            freeze_batchnorm(self.module)
        losses, accuracies, waited, images = [], [], 0.0, 0
        began = time.monotonic()
        first = (epoch - 1) * self.epoch_iters
        title = f"epoch {epoch}/{cfg.TRAIN.num_epoch}"
        bar = tqdm(
            range(first, first + self.epoch_iters),
            desc=title,
            disable=not self.progress,
            dynamic_ncols=True,
        )
        for step in bar:
            rates = self._schedule(step)
            loss, accuracy = 0.0, 0.0
            for part in range(cfg.TRAIN.accumulate):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                images += sum(len(item["img_data"]) for item in batch) * self.world
                with self._alone(part), compiler_errors():
                    part_loss, part_accuracy = self._forward_backward(batch)
                loss += part_loss / cfg.TRAIN.accumulate
                accuracy += part_accuracy / cfg.TRAIN.accumulate
            self._step()
            losses.append(loss)
            accuracies.append(accuracy)
            elapsed = time.monotonic() - began
            figures = (
                f"loss {np.mean(losses[-20:]):.3f}, "
                f"accuracy {100 * np.mean(accuracies[-20:]):.1f}%, "
                f"lr {rates[0]:.2g}/{rates[1]:.2g}, {images / elapsed:.1f} images/s, "
                f"waiting for data {100 * waited / elapsed:.0f}%, "
                f"run done in {tqdm.format_interval(self._left(step, first, elapsed))}"
            )
            bar.set_postfix_str(figures)
            if (step + 1) % cfg.TRAIN.disp_iter == 0 or step + 1 == first + self.epoch_iters:
                # An epoch shorter than disp_iter still leaves a line for the curves.
                recent = slice(-cfg.TRAIN.disp_iter, None)
                self._record(
                    kind="train",
                    epoch=epoch,
                    step=step + 1,
                    loss=float(np.mean(losses[recent])),
                    accuracy=float(np.mean(accuracies[recent])),
                    lr_encoder=rates[0],
                    lr_decoder=rates[1],
                    images_per_second=images / elapsed,
                    data_wait=waited / elapsed,
                    seconds=self.seconds + elapsed,
                )
                if not self.progress and self.rank == 0:
                    log.info("%s, step %d of %d: %s", title, step + 1, self.max_iters, figures)
        self.history["train"]["epoch"].append(float(epoch))
        self.history["train"]["loss"].append(float(np.mean(losses)))
        self.history["train"]["acc"].append(float(np.mean(accuracies)))

    def _left(self, step: int, first: int, elapsed: float) -> float:
        """Seconds until the last step, at this epoch's pace; validations come on top."""
        return (self.max_iters - step - 1) * elapsed / (step - first + 1)

    def _schedule(self, step: int) -> tuple[float, float]:
        cfg = self.cfg.TRAIN
        factor = poly_factor(step, self.max_iters, cfg.lr_pow, cfg.warmup_iters)
        rates = cfg.lr_encoder * factor, cfg.lr_decoder * factor
        for optimizer, rate in zip(self.optimizers, rates):
            set_learning_rate(optimizer, rate)
        return rates

    def _alone(self, part: int) -> AbstractContextManager[None]:
        """Gradients are added up within each rank, until those of the last part are in."""
        ddp = nn.parallel.DistributedDataParallel
        if isinstance(self.parallel, ddp) and part + 1 < self.cfg.TRAIN.accumulate:
            return self.parallel.no_sync()
        return nullcontext()

    def _forward_backward(self, batch: list[dict[str, Any]]) -> tuple[float, float]:
        files = [item.pop("info") for item in batch]
        if not self.cfg.TRAIN.channels_last:
            for item in batch:  # which the data set gives channels last
                item["img_data"] = item["img_data"].contiguous()
        feed: Any = batch
        if not isinstance(self.parallel, UserScatteredDataParallel):
            feed = async_copy_to(batch[0], self.device)
        with autocast(self.device, self.cfg.TRAIN.precision):
            loss, accuracy = self.parallel(feed)
        loss = loss.mean()
        value, right = self._over_ranks(loss.detach(), accuracy.detach().mean())
        if not math.isfinite(value):
            names = ", ".join(itertools.chain.from_iterable(files))
            raise FloatingPointError(
                f"the loss is {value} on {names}; look at these files, or lower TRAIN.lr_encoder "
                f"and TRAIN.lr_decoder, or train with TRAIN.precision fp32"
            )
        self.scaler.scale(loss / self.cfg.TRAIN.accumulate).backward()
        return value, right

    def _over_ranks(self, *figures: torch.Tensor) -> list[float]:
        """Means over the ranks: each rank's figures are weighted by its share already."""
        together = torch.stack([figure.float() for figure in figures])
        if self.world > 1:
            dist.all_reduce(together)
            together /= self.world
        return together.tolist()

    def _step(self) -> None:
        limit = self.cfg.TRAIN.clip_grad
        for optimizer in self.optimizers:
            if limit:
                self.scaler.unscale_(optimizer)
        if limit:
            nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.module)

    # ------------------------------------------------------------------ data

    def _batches(self, start: int) -> Iterator[list[dict[str, Any]]]:
        """One list of batch dicts, one per device, for every micro-step from `start` on."""
        cfg = self.cfg
        sampler = RankSampler(
            start * cfg.TRAIN.accumulate,
            self.max_iters * cfg.TRAIN.accumulate,
            len(self.devices),
            self.rank,
            self.world,
        )
        # On the CPU the loader shares the cores with the network: more processes only get in
        # each other's way.
        cores = cpu_count() // 2 if self.device.type == "cpu" else cpu_count()
        workers = min(cfg.TRAIN.workers * len(self.devices), max(1, cores // self.world))
        loader = DataLoader(
            self.data,
            batch_size=len(self.devices),
            sampler=sampler,
            collate_fn=user_scattered_collate,
            num_workers=workers if cfg.TRAIN.workers else 0,
            pin_memory=self.device.type == "cuda",
            timeout=cfg.TRAIN.stall_seconds if cfg.TRAIN.workers else 0,
            worker_init_fn=_one_thread,
            # A generator of its own: otherwise starting the loader would draw from the one that
            # dropout uses, and a resumed run would differ.
            generator=torch.Generator().manual_seed(cfg.TRAIN.seed),
        )
        iterator = iter(loader)
        for position in range(len(loader)):
            try:
                yield next(iterator)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                files = self._files(sampler, position)
                raise RuntimeError(
                    f"no batch for {cfg.TRAIN.stall_seconds} s; the loader stands at {files}: raise "
                    f"TRAIN.stall_seconds, lower TRAIN.workers, or look at these files"
                ) from error

    def _files(self, sampler: RankSampler, position: int) -> str:
        indices = itertools.islice(sampler, position * len(self.devices), None)
        first = itertools.islice(indices, len(self.devices))
        return ", ".join(path for index in first for path in self.data.files(index))

    # ------------------------------------------------------------------ between epochs

    def _finish_epoch(self, epoch: int) -> None:
        if self.rank == 0:
            self._save(epoch)
            if self._validates(epoch):
                self._validate(epoch)
            self._draw()
        if self.world > 1:
            dist.barrier()

    @property
    def best(self) -> float | None:
        """The highest validated mean IoU so far."""
        return max(self.history["val"]["mean_iou"], default=None)

    def _validates(self, epoch: int) -> bool:
        if self.val is None or epoch in self.history["val"]["epoch"]:
            return False
        return epoch % self.cfg.TRAIN.eval_epochs == 0 or epoch == self.cfg.TRAIN.num_epoch

    @property
    def evaluated(self) -> SegmentationModule:
        """The weights that checkpoints hold: the running average when there is one."""
        net = self.module if self.average is None else self.average.module
        return cast(SegmentationModule, net)

    def _save(self, epoch: int) -> None:
        net = self.evaluated
        self.folder.save(f"epoch_{epoch}.pth", net.encoder.state_dict(), net.decoder.state_dict())
        state: dict[str, Any] = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "seconds": self.seconds,
        }
        if self.average is not None:
            state["weights"] = self.module.state_dict()
            state["average"] = self.average.state_dict()
        self.folder.save_state(epoch, state)
        self.folder.save_history(epoch, self.history)
        self.folder.drop_epochs(self.cfg.TRAIN.keep)

    def _restore(self, epoch: int) -> None:
        """Continue behind an epoch; without its state the optimizers start afresh, and say so."""
        encoder, decoder = self.folder.files(f"epoch_{epoch}.pth")
        load_whole(self.module.encoder, encoder, "encoder")
        load_whole(self.module.decoder, decoder, "decoder")
        history, state = self.folder.load_state(epoch)
        self._forget_after(epoch)
        for part, columns in self.history.items():
            columns.update({k: list(v) for k, v in history.get(part, {}).items() if k in columns})
        if not state:
            if self.average is not None:
                self.average.module.load_state_dict(self.module.state_dict())
            log.warning(
                "%s has no state_epoch_%d.pth: weights are loaded, momentum starts afresh",
                self.folder.path,
                epoch,
            )
            return
        if self.average is not None and "average" in state:
            self.module.load_state_dict(state["weights"])
            self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.seconds = state["seconds"]

    def _validate(self, epoch: int) -> None:
        assert self.val is not None
        net = self.evaluated
        matrix = evaluate_model(net, self.val, self.cfg, self.device, progress=self.progress)
        scores = matrix.compute()
        mean_iou, accuracy = float(scores["mean_iou"]), float(scores["pixel_accuracy"])
        self.history["val"]["epoch"].append(float(epoch))
        self.history["val"]["mean_iou"].append(mean_iou)
        self.history["val"]["pixel_accuracy"].append(accuracy)
        self._record(kind="val", epoch=epoch, mean_iou=mean_iou, pixel_accuracy=accuracy)
        log.info("epoch %d: mean IoU %.4f, accuracy %.2f%%", epoch, mean_iou, 100 * accuracy)
        self.folder.save_history(epoch, self.history)
        if mean_iou == self.best:
            self.folder.save("best.pth", net.encoder.state_dict(), net.decoder.state_dict())

    def _record(self, **figures: Any) -> None:
        if self.rank == 0:
            with (self.folder.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")

    def _forget_after(self, epoch: int) -> None:
        """Drop figures of steps that a resumed run does again."""
        file = self.folder.path / METRICS
        if self.rank == 0 and file.is_file():
            kept = [x for x in read_metrics(file) if x["epoch"] <= epoch]
            file.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")

    def _draw(self) -> None:
        file = self.folder.path / METRICS
        if file.is_file():
            curves(read_metrics(file), self.folder.path / CURVES)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last one that a killed run left half written is dropped."""
    lines = file.read_text(encoding="utf-8").splitlines()
    figures = []
    for number, line in enumerate(lines, 1):
        try:
            figures.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}:{number} is no JSON; mend or remove the file") from error
    return figures


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rank_seed(rank: int, epoch: int) -> int:
    """A different seed offset for every rank and epoch."""
    return 1009 * epoch + rank


def freeze_batchnorm(module: nn.Module) -> None:
    """Put every BatchNorm, and nothing else, in evaluation mode."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()


def _one_thread(worker: int) -> None:
    set_threads(1)
