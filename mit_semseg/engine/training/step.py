"""One optimizer step: forward, backward, gradient clipping, update."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mit_semseg.engine.training.fsdp import saved_states, whole
from mit_semseg.engine.training.optim import MovingAverage
from mit_semseg.engine.training.state import Progress, Snapshot
from mit_semseg.lib.nn import UserScatteredDataParallel, async_copy_to
from mit_semseg.models import SegmentationModule
from mit_semseg.models.compilation import compiler_errors
from mit_semseg.precision import Precision

log = logging.getLogger("mit_semseg")

# Most skipped steps in a row, for non-finite losses (TRAIN.on_nan skip) and fp16 overflows. After
# 20 overflows the loss scale has fallen from 65536 to 1/16.
MAX_SKIPPED = 20
LOWER_RATES = "lower TRAIN.lr_encoder and TRAIN.lr_decoder, or train with TRAIN.precision"


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Attributes:
        loss: mean over micro-batches, replicas and ranks.
        accuracy: likewise, in [0, 1].
        updated: False if the step was skipped; weights and buffers are then unchanged.
        stop: whether any rank received a stop signal.
        save: whether the state is to be saved.
    """

    loss: float
    accuracy: float
    updated: bool
    stop: bool
    save: bool


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch whose backward pass has been launched."""

    loss: Tensor  # scalar, on the device
    accuracy: Tensor  # scalar, on the device
    batch: list[dict[str, Any]]
    files: list[str]


@dataclass(frozen=True)
class _Figures:
    """Values of a step that are read from the device in one transfer."""

    losses: list[float]  # of the micro-batches, means over the ranks
    accuracies: list[float]
    stop: bool
    save: bool
    own: list[float]  # losses of this rank
    norm: float  # of the gradients; 0 without clipping
    overflow: bool  # of the gradients in fp16


class TrainStep:
    """Computes steps: call `add` for each micro-batch, then `finish`.

    All forward and backward passes of a step are launched before the host reads a result: on a GPU
    it waits once per step, in `finish`, for loss, accuracy, gradient norm and overflow together. A
    non-finite loss is found there, after the backward pass; the gradients are then dropped and the
    buffers restored.

    Args:
        module: the network with its loss, on its device.
        parallel: the module, or its data-parallel wrapper; called with a batch.
        optimizer: of the module's parameters.
        device: where `parallel` expects its batch.
        precision: of the computation.
        scaler: of the loss; disabled unless the precision is fp16.
        average: EMA of the weights, updated in each step.
        accumulate: micro-batches per step.
        clip_grad: largest norm of the gradients; 0 for no limit.
        channels_last: whether images keep the channels-last format in which they are loaded.
        fixed: modules whose BatchNorm stays in evaluation mode.
        on_nan: "stop" or "skip", for a non-finite loss or gradient.
        rank: of this process.
        world: number of ranks.
        save_batch: called with the number of a step and the data for replaying a batch with a
            non-finite loss; returns where it was saved, as text for a message.
    """

    def __init__(
        self,
        module: SegmentationModule,
        parallel: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: Precision,
        scaler: torch.amp.GradScaler,
        average: MovingAverage[SegmentationModule] | None,
        accumulate: int,
        clip_grad: float,
        channels_last: bool,
        fixed: Sequence[nn.Module],
        on_nan: str,
        rank: int,
        world: int,
        save_batch: Callable[[int, dict[str, Any]], str],
    ) -> None:
        self.module, self.parallel, self.optimizer = module, parallel, optimizer
        self.device, self.precision, self.scaler = device, precision, scaler
        self.average, self.accumulate, self.clip_grad = average, accumulate, clip_grad
        self.channels_last, self.on_nan = channels_last, on_nan
        norms = (layer for part in fixed for layer in part.modules())
        self.fixed = [x for x in norms if isinstance(x, nn.modules.batchnorm._BatchNorm)]
        self.rank, self.world, self.save_batch = rank, world, save_batch
        self.statistics = Snapshot(module)
        self._micro_batches: list[_MicroBatch] = []

    @property
    def evaluated(self) -> SegmentationModule:
        """The module that is validated and saved: the EMA if there is one."""
        return self.module if self.average is None else self.average.module

    def set_progress(self, share: float) -> None:
        """Tell the network how much of the training is done, from 0 to 1."""
        self.module.decoder.set_progress(share)
        self.evaluated.decoder.set_progress(share)

    def training_mode(self) -> None:
        """Set training mode, except for the BatchNorm of `fixed` modules."""
        self.parallel.train()
        for norm in self.fixed:
            norm.eval()

    def add(self, batch: list[dict[str, Any]]) -> None:
        """Launch the forward and backward pass of a micro-batch.

        Args:
            batch: one dict per device; `info`, the files, is removed from it.
        """
        if not self._micro_batches:
            self.statistics.save()
        files = [file for item in batch for file in item.pop("info")]
        with self._gradients_of_ranks(), compiler_errors(), self.precision.products():
            with self.precision.autocast():
                loss, accuracy = self.parallel(self._moved(batch))
            loss = loss.mean()
            self.scaler.scale(loss / self.accumulate).backward()
        self._micro_batches.append(
            _MicroBatch(loss.detach(), accuracy.detach().mean(), batch, files)
        )

    def _gradients_of_ranks(self) -> AbstractContextManager[None]:
        """Synchronise gradients between ranks for the last micro-batch only."""
        ddp = nn.parallel.DistributedDataParallel
        if isinstance(self.parallel, ddp) and len(self._micro_batches) + 1 < self.accumulate:
            return self.parallel.no_sync()
        return nullcontext()

    def _moved(self, batch: list[dict[str, Any]]) -> Any:
        """The batch in the form, and on the device, that `parallel` expects."""
        if isinstance(self.parallel, UserScatteredDataParallel):  # copies to its devices itself
            return batch if self.channels_last else [_contiguous(item) for item in batch]
        # Change the format on the device: on the host the result would not be in pinned memory.
        item = async_copy_to(batch[0], self.device)
        return item if self.channels_last else _contiguous(item)

    def finish(self, progress: Progress, stop: bool = False, save: bool = False) -> StepResult:
        """Read the results of the micro-batches, and update the weights if they are finite.

        Args:
            progress: of the run before this step, for messages.
            stop: whether this rank received a stop signal.
            save: whether the state is to be saved; only the value of rank 0 counts.

        Raises:
            FloatingPointError: the loss or the gradients are non-finite, and `on_nan` is stop or
                `MAX_SKIPPED` steps in a row were skipped.
        """
        self.scaler.unscale_(self.optimizer)
        figures = self._read(stop, save)
        parts, self._micro_batches = self._micro_batches, []
        updated = self._is_usable(figures, parts, progress)
        if updated:
            self.optimizer.step()
        else:
            self.statistics.restore()
        self.optimizer.zero_grad(set_to_none=True)
        if updated and self.average is not None:
            self.average.update()
        return StepResult(
            loss=sum(loss / self.accumulate for loss in figures.losses),
            accuracy=sum(accuracy / self.accumulate for accuracy in figures.accuracies),
            updated=updated,
            stop=figures.stop,
            save=figures.save,
        )

    def _read(self, stop: bool, save: bool) -> _Figures:
        """Reduce over the ranks and read from the device; the only synchronisation of a step."""
        own = torch.stack([part.loss.float() for part in self._micro_batches])
        accuracies = torch.stack([part.accuracy.float() for part in self._micro_batches])
        # Filled on the device: creating a tensor from Python numbers is a synchronous copy.
        flags = [own.new_full((1,), float(flag)) for flag in (stop, save and self.rank == 0)]
        shared = torch.cat([own, accuracies, *flags])
        if self.world > 1:
            dist.all_reduce(shared)
        norm = overflow = own.new_zeros(1)
        if self.clip_grad:
            total = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad)
            norm = whole(total.detach()).float().reshape(1)
        if self.scaler.is_enabled():
            found = self.scaler._found_inf_per_device(self.optimizer).values()
            overflow = torch.stack([one.reshape(()) for one in found]).sum().float().reshape(1)
        values = torch.cat([shared, own, norm, overflow]).tolist()
        n, world = len(self._micro_batches), self.world
        return _Figures(
            losses=[value / world for value in values[:n]],
            accuracies=[value / world for value in values[n : 2 * n]],
            stop=values[2 * n] > 0,
            save=values[2 * n + 1] > 0,
            own=values[2 * n + 2 : 3 * n + 2],
            norm=values[-2],
            overflow=values[-1] > 0,
        )

    # ------------------------------------------------------------------ non-finite values

    def _is_usable(
        self, figures: _Figures, parts: Sequence[_MicroBatch], progress: Progress
    ) -> bool:
        """Whether loss and gradients are finite; updates the loss scale."""
        for part, loss, own in zip(parts, figures.losses, figures.own, strict=True):
            if not math.isfinite(loss):
                if self.scaler.is_enabled():  # keep the scale
                    self.scaler.update(self.scaler.get_scale())
                self._nonfinite_loss(part, own, progress)
                return False
        if figures.overflow:
            self._overflow(progress)
            return False
        if self.scaler.is_enabled():
            self.scaler.update()
        if not math.isfinite(figures.norm):
            text = f"the gradients of step {progress.step + 1} are non-finite"
            self._skip(text, f"{text}; {LOWER_RATES} fp32", progress)
            return False
        return True

    def _nonfinite_loss(self, part: _MicroBatch, own: float, progress: Progress) -> None:
        """Save the batch with the weights for replay; raise unless `on_nan` is skip."""
        self.statistics.restore()
        step = progress.step + 1
        encoder, decoder = saved_states(self.module, wanted=not math.isfinite(own))
        if math.isfinite(own):
            text = f"the loss of step {step} is non-finite on another rank, which names the files"
        else:
            replay = {
                "step": step,
                "loss": own,
                "files": part.files,
                "batch": part.batch,
                "encoder": encoder,
                "decoder": decoder,
            }
            where = self.save_batch(step, replay)
            text = f"the loss of step {step} is {own} on {', '.join(part.files)} (batch {where})"
        count = progress.skipped_in_a_row
        again = f", after {count} skipped steps" if count else ""
        self._skip(text, f"{text}{again}; check these files, or {LOWER_RATES} fp32", progress)

    def _skip(self, text: str, error: str, progress: Progress) -> None:
        """Warn that the step is skipped, or raise."""
        if self.on_nan == "stop" or progress.skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(error)
        log.warning("%s; the step is skipped", text)

    def _overflow(self, progress: Progress) -> None:
        """Lower the loss scale after an fp16 overflow.

        The step is skipped here and not by `GradScaler.step`, which runs fused optimizers without
        writing: the momentum of the first SGD step would then be uninitialised memory.
        """
        scale = self.scaler.get_scale()
        self.scaler.update()
        text = (
            f"the fp16 gradients of step {progress.step + 1} overflow at a loss scale of {scale:g}"
        )
        if progress.skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"{text}, after {progress.skipped_in_a_row} skipped steps; {LOWER_RATES} bf16 or "
                "fp32"
            )
        if self.rank == 0:  # all ranks have the same gradients
            log.warning(
                "%s: the step is skipped (%d so far), the scale is now %g; a few such steps are "
                "normal, most of all at the beginning",
                text,
                progress.skipped + 1,
                self.scaler.get_scale(),
            )


def _contiguous(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "img_data": item["img_data"].contiguous()}
