"""One step of the optimizer: forward, backward, clipping, update; one read from the device."""

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

from mit_semseg.engine.training.optim import MovingAverage
from mit_semseg.engine.training.state import Progress, Snapshot
from mit_semseg.lib.nn import UserScatteredDataParallel, async_copy_to
from mit_semseg.models import SegmentationModule
from mit_semseg.models.compilation import compiler_errors
from mit_semseg.precision import Precision

log = logging.getLogger("mit_semseg")

# Steps in a row without a finite loss after which TRAIN.on_nan skip gives up, too; and steps in a
# row whose gradients fp16 cannot hold: the loss scale, which begins at 65536, is 1/16 by then.
MOST_SKIPPED = 20
LOWER_RATES = "lower TRAIN.lr_encoder and TRAIN.lr_decoder, or train with TRAIN.precision"


@dataclass(frozen=True)
class StepResult:
    """What the host knows of a step.

    Attributes:
        loss: mean over the parts, replicas and ranks.
        accuracy: likewise, in [0, 1].
        updated: False where the step was skipped: weights and statistics are those of before.
        stop: whether any rank was asked to stop.
        save: whether rank 0 finds it time to save the run.
    """

    loss: float
    accuracy: float
    updated: bool
    stop: bool
    save: bool


@dataclass(frozen=True)
class _Part:
    """A batch whose backward pass has been launched."""

    loss: Tensor  # scalar, on the device
    accuracy: Tensor  # scalar, on the device
    batch: list[dict[str, Any]]
    files: list[str]


@dataclass(frozen=True)
class _Figures:
    """What is read of a step, in one transfer."""

    losses: list[float]  # of the parts, means over the ranks
    accuracies: list[float]
    stop: bool
    save: bool
    own: list[float]  # losses of this rank
    norm: float  # of the gradients; 0 where they are not clipped
    overflow: bool  # whether fp16 could not hold the gradients


class TrainStep:
    """Computes steps: `add` each part of the batch, then `finish`.

    Everything up to and with the backward pass of the last part is launched before the host reads
    anything of it: on a GPU it waits once a step, in `finish`, for loss, accuracy, gradient norm
    and overflow together. A non-finite loss goes through the backward pass like any other; the
    gradients are dropped and the running statistics put back when it is read.

    Args:
        module: the network with its loss, on its device.
        parallel: what is called with a batch: the module, or its wrapper for several devices or
            ranks.
        optimizer: of the module's parameters.
        device: where `parallel` takes its batch.
        precision: what it computes in.
        scaler: of the loss; disabled where the precision is not fp16.
        average: moving average of the weights, updated with them.
        accumulate: parts of a step.
        clip_grad: largest norm of the gradients; 0: any.
        channels_last: whether images stay in the layout they are loaded in.
        fixed: modules whose BatchNorm stays in evaluation mode.
        on_nan: "stop" or "skip", for steps that are non-finite.
        rank, world: place among the ranks.
        save_batch: called with the number of a step and what is needed to replay a batch with a
            non-finite loss; says in words where it was saved.
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
        self._parts: list[_Part] = []

    @property
    def evaluated(self) -> SegmentationModule:
        """The weights that checkpoints hold: the moving average when there is one."""
        return self.module if self.average is None else self.average.module

    def set_progress(self, share: float) -> None:
        """Tell the network how much of the training is done, from 0 to 1."""
        self.module.decoder.set_progress(share)
        self.evaluated.decoder.set_progress(share)

    def training_mode(self) -> None:
        """Put the network in training mode."""
        self.parallel.train()
        for norm in self.fixed:
            norm.eval()

    def add(self, batch: list[dict[str, Any]]) -> None:
        """Launch forward and backward pass of the next part of the step.

        Args:
            batch: one dict per device, of which `info`, the files, is taken out.
        """
        if not self._parts:
            self.statistics.take()
        files = [file for item in batch for file in item.pop("info")]
        with self._gradients_of_ranks(), compiler_errors(), self.precision.products():
            with self.precision.autocast():
                loss, accuracy = self.parallel(self._moved(batch))
            loss = loss.mean()
            self.scaler.scale(loss / self.accumulate).backward()
        self._parts.append(_Part(loss.detach(), accuracy.detach().mean(), batch, files))

    def _gradients_of_ranks(self) -> AbstractContextManager[None]:
        """Gradients are added up within each rank, until those of the last part are in."""
        ddp = nn.parallel.DistributedDataParallel
        if isinstance(self.parallel, ddp) and len(self._parts) + 1 < self.accumulate:
            return self.parallel.no_sync()
        return nullcontext()

    def _moved(self, batch: list[dict[str, Any]]) -> Any:
        """The batch as `parallel` takes it."""
        if isinstance(self.parallel, UserScatteredDataParallel):  # which copies to its devices
            return batch if self.channels_last else [_contiguous(item) for item in batch]
        # The layout changes on the device: on the host the copy would not be in pinned memory.
        item = async_copy_to(batch[0], self.device)
        return item if self.channels_last else _contiguous(item)

    def finish(self, progress: Progress, stop: bool = False, save: bool = False) -> StepResult:
        """Read what the parts came to, and update the weights unless it is non-finite.

        Args:
            progress: of the run before this step, for messages.
            stop: whether this rank was asked to stop.
            save: whether this rank finds it time to save the run.

        Raises:
            FloatingPointError: the loss or the gradients are non-finite, and `on_nan` is stop, or
                they have been so for many steps.
        """
        self.scaler.unscale_(self.optimizer)
        figures = self._read(stop, save)
        parts, self._parts = self._parts, []
        updated = self._is_usable(figures, parts, progress)
        if updated:
            self.optimizer.step()
        else:
            self.statistics.put_back()
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
        """The one moment of a step when the host waits for the device."""
        own = torch.stack([part.loss.float() for part in self._parts])
        accuracies = torch.stack([part.accuracy.float() for part in self._parts])
        # Filled on the device: a tensor made of Python numbers would be a copy that waits.
        flags = [own.new_full((1,), float(flag)) for flag in (stop, save and self.rank == 0)]
        shared = torch.cat([own, accuracies, *flags])
        if self.world > 1:
            dist.all_reduce(shared)
        norm = overflow = own.new_zeros(1)
        if self.clip_grad:
            total = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad)
            norm = total.detach().float().reshape(1)
        if self.scaler.is_enabled():
            found = self.scaler._found_inf_per_device(self.optimizer).values()
            overflow = torch.stack([one.reshape(()) for one in found]).sum().float().reshape(1)
        values = torch.cat([shared, own, norm, overflow]).tolist()
        n, world = len(self._parts), self.world
        return _Figures(
            losses=[value / world for value in values[:n]],
            accuracies=[value / world for value in values[n : 2 * n]],
            stop=values[2 * n] > 0,
            save=values[2 * n + 1] > 0,
            own=values[2 * n + 2 : 3 * n + 2],
            norm=values[-2],
            overflow=values[-1] > 0,
        )

    # ------------------------------------------------------------------ what is non-finite

    def _is_usable(self, figures: _Figures, parts: Sequence[_Part], progress: Progress) -> bool:
        """Whether the gradients may be taken; the loss scale follows from what was found."""
        for part, loss, own in zip(parts, figures.losses, figures.own, strict=True):
            if not math.isfinite(loss):
                if self.scaler.is_enabled():  # as if the step had not been
                    self.scaler.update(self.scaler.get_scale())
                self._nonfinite_loss(part, own, progress)
                return False
        if figures.overflow:
            self._overflow(progress)
            return False
        if self.scaler.is_enabled():
            self.scaler.update()
        if not math.isfinite(figures.norm):
            text = f"the gradients of step {progress.step + 1} are not finite"
            self._skip(text, f"{text}; {LOWER_RATES} fp32", progress)
            return False
        return True

    def _nonfinite_loss(self, part: _Part, own: float, progress: Progress) -> None:
        """Save a batch for replay with the weights it met; raise unless `on_nan` is skip."""
        self.statistics.put_back()
        step = progress.step + 1
        if math.isfinite(own):
            text = f"the loss of step {step} is not finite on another rank, which names the files"
        else:
            replay = {
                "step": step,
                "loss": own,
                "files": part.files,
                "batch": part.batch,
                "encoder": self.module.encoder.state_dict(),
                "decoder": self.module.decoder.state_dict(),
            }
            where = self.save_batch(step, replay)
            text = f"the loss of step {step} is {own} on {', '.join(part.files)} (batch {where})"
        count = progress.skipped_in_a_row
        again = f", after {count} skipped steps" if count else ""
        self._skip(text, f"{text}{again}; look at these files, or {LOWER_RATES} fp32", progress)

    def _skip(self, text: str, error: str, progress: Progress) -> None:
        """Warn that the step is skipped, or raise where it must not be."""
        if self.on_nan == "stop" or progress.skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(error)
        log.warning("%s; the step is skipped", text)

    def _overflow(self, progress: Progress) -> None:
        """Lower the loss scale of fp16, which was too high for the gradients.

        The step is left out here, rather than by `GradScaler.step`: that lets fused optimizers run
        and write nothing, and the momentum of a first step of SGD, which nothing was written to,
        would be whatever was in memory.
        """
        scale = self.scaler.get_scale()
        self.scaler.update()
        text = (
            f"fp16 cannot hold the gradients of step {progress.step + 1} at a loss scale of "
            f"{scale:g}"
        )
        if progress.skipped_in_a_row >= MOST_SKIPPED:
            raise FloatingPointError(
                f"{text}, after {progress.skipped_in_a_row} skipped steps; {LOWER_RATES} bf16 or "
                "fp32"
            )
        if self.rank == 0:  # all ranks have the same gradients
            log.warning(
                "%s: the step is skipped (%d so far), and the scale is %g now; a few such steps "
                "are normal, at the beginning most of all",
                text,
                progress.skipped + 1,
                self.scaler.get_scale(),
            )


def _contiguous(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "img_data": item["img_data"].contiguous()}
