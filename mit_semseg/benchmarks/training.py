"""Rows about training: steps on one shape, on new shapes, and on replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.benchmarks import published
from mit_semseg.benchmarks.clock import Runnable, clock_of
from mit_semseg.benchmarks.rows import CLASSES, SCALES, Row, build
from mit_semseg.benchmarks.sides import Timing
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.demo import streets
from mit_semseg.engine.cpu import keep_freed_memory
from mit_semseg.engine.training import step
from mit_semseg.engine.training.build import keeps_channels_last, shape_bucket
from mit_semseg.engine.training.optim import build_optimizer
from mit_semseg.engine.training.state import Progress
from mit_semseg.lib.nn import UserScatteredDataParallel, async_copy_to
from mit_semseg.precision import Precision


@dataclass(frozen=True)
class TrainStep(Row):
    """One training step on a batch in memory."""

    encoder: str = "mobilenetv2dilated"
    decoder: str = "c1_deepsup"
    batch: tuple[int, int, int] = (2, 448, 608)
    counted: bool = True
    repeats: int = 4

    group = "Training"

    @property
    def title(self) -> str:  # type: ignore[override]
        count, height, width = self.batch
        return f"{self.encoder} + {self.decoder}, {count}x{height}x{width}, {self.precision}"

    def _batch(self) -> dict[str, Tensor]:
        count, height, width = self.batch
        scenes = [streets.render(k, (height, width)) for k in range(count)]
        images = torch.stack([torch.from_numpy(image) for image, _ in scenes])
        labels = torch.stack([torch.from_numpy(label.astype(np.int64)) for _, label in scenes])
        return as_batch(images, labels[:, 4::8, 4::8].contiguous() - 1)

    def published(self) -> Runnable:
        module = published.as_published(build(self.encoder, self.decoder)).train().to(self.device)
        batch = self._batch()
        normalize = Normalize.of({})
        batch["img_data"] = normalize(batch["img_data"], batch.pop("img_size")).contiguous()
        batch = pinned(batch, self.device)
        optimizers = [
            torch.optim.SGD(part.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
            for part in (module.encoder, module.decoder)
        ]
        return lambda: published.train_step(module, optimizers, async_copy_to(batch, self.device))

    def ours(self) -> Runnable:
        training = Training(self.encoder, self.decoder, self.device, self.precision)
        return partial(training, pinned(self._batch(), self.device))


def as_batch(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A batch in the format of the loader.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N, H/8, W/8) int64, -1 ignored.
    """
    return {
        "img_data": images.permute(0, 3, 1, 2),
        "img_size": torch.tensor([images.shape[1:3]] * len(images)),
        "seg_label": labels,
    }


def pinned(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """A batch in pinned memory, unless the device is a CPU."""
    if device == "cpu":
        return batch
    return {key: value.pin_memory() for key, value in batch.items()}


class Training:
    """A model whose call runs a training step of the trainer.

    Args:
        encoder, decoder: architecture of the model.
        device: cpu or cuda.
        precision: precision of the step.
        replicas: number of replicas on the device, with one batch each.
    """

    def __init__(
        self, encoder: str, decoder: str, device: str, precision: str, replicas: int = 1
    ) -> None:
        place = torch.device(device)
        if place.type == "cpu":
            keep_freed_memory()
        found = Precision.of(precision, place)
        module = build(encoder, decoder).to(place)
        channels_last = keeps_channels_last("auto", found, module)
        if channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parallel: nn.Module = module
        if replicas > 1:
            parallel = UserScatteredDataParallel(module, device_ids=[device] * replicas)
        self.step = step.TrainStep(
            module,
            parallel,
            build_optimizer("SGD", (module, 0.02), weight_decay=1e-4),
            device=place,
            precision=found,
            scaler=torch.amp.GradScaler(place.type, enabled=found.dtype == torch.float16),
            average=None,
            accumulate=1,
            clip_grad=0.0,
            channels_last=channels_last,
            fixed=(),
            on_nan="stop",
            rank=0,
            world=1,
            save_batch=lambda number, replay: "not saved",
        )
        self.step.training_mode()
        self.progress = Progress(1, 1)

    def __call__(self, *batches: dict[str, Tensor]) -> float:
        """A step on one batch for each replica; returns the loss."""
        self.step.add([{**batch, "info": []} for batch in batches])
        return self.step.finish(self.progress).loss


@dataclass(frozen=True)
class Replicas(TrainStep):
    """Two batches of equal size: in parallel on two replicas on one device, and sequentially."""

    baseline: str = "two single steps"
    counted: bool = False  # operations in other threads are not counted
    max_ratio: float = 1.2

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{super().title}, two replicas on one device"

    def published(self) -> Runnable:
        step = Training(self.encoder, self.decoder, self.device, self.precision)
        batch = pinned(self._batch(), self.device)
        return lambda: [step(batch) for _ in range(2)]

    def ours(self) -> Runnable:
        step = Training(self.encoder, self.decoder, self.device, self.precision, replicas=2)
        batch = pinned(self._batch(), self.device)
        return partial(step, batch, batch)

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        times = timings["ours"].median / timings["published"].median
        return f"at most {self.max_ratio:g} x the time ({times:.2f} x)", times <= self.max_ratio


@dataclass(frozen=True)
class NewShapes(Row):
    """Training steps on batches of different sizes, as in ADE20K, padded as by the loader, and then
    on the same batches again."""

    baseline: str = "the same shapes again"
    repeats: int = 0
    encoder: str = "resnet50dilated"
    decoder: str = "ppm_deepsup"
    count: int = 8  # images of a batch
    shapes: int = 60
    scales: tuple[int, ...] = SCALES
    max_ratio: float = 1.5  # maximum time relative to known shapes
    rate: float | None = None  # minimum images per second of known shapes

    group = "New shapes"

    @property
    def title(self) -> str:  # type: ignore[override]
        model = f"{self.encoder} + {self.decoder}"
        return f"{model}, {self.count} images per step, {self.precision}, new shapes"

    def random_shapes(self) -> list[tuple[int, int]]:
        """Different heights and widths."""
        rng = np.random.default_rng(0)
        found: dict[tuple[int, int], None] = {}
        while len(found) < self.shapes:
            short = rng.choice(self.scales)
            # The widest image determines the shape; few of ADE20K are narrower than 5:4.
            long = min(1000, short * rng.uniform(1.25, 1.8))
            height, width = (int(-(-side // 8) * 8) for side in (short, long))
            found[height, width] = None
        return list(found)

    def sides(self) -> dict[str, Callable[[], Runnable]]:
        return {"ours": self.ours}

    def ours(self) -> Runnable:
        step = Training(self.encoder, self.decoder, self.device, self.precision)
        generator = torch.Generator().manual_seed(0)
        multiple = max(8, shape_bucket("auto", torch.device(self.device), fixed_size=False))

        def made(height: int, width: int) -> dict[str, Tensor]:
            images = torch.randint(
                256, (self.count, height, width, 3), dtype=torch.uint8, generator=generator
            )
            size = (self.count, height // 8, width // 8)
            labels = torch.randint(-1, CLASSES, size, generator=generator)
            batch = as_batch(images, labels)
            below, beside = -height % multiple, -width % multiple
            batch["img_data"] = F.pad(batch["img_data"], (0, beside, 0, below))
            batch["seg_label"] = F.pad(labels, (0, beside // 8, 0, below // 8), value=-1)
            return pinned(batch, self.device)

        batches = [made(*shape) for shape in self.random_shapes()]
        known = made(64, 64)
        clock = clock_of(self.device)

        def run() -> dict[str, Any]:
            for _ in range(3):  # warm-up that does not depend on the shape
                step(known)
            deadline = time.monotonic() + 0.7 * self.budget
            visited: list[dict[str, Tensor]] = []

            def visit() -> None:
                for batch in batches:
                    if visited and time.monotonic() > deadline:
                        return
                    step(batch)
                    visited.append(batch)

            new = clock.timed(visit)[0] / len(visited)
            again = clock.timed(lambda: [step(batch) for batch in visited])[0] / len(visited)
            few = visited[:: max(1, len(visited) // 5)]
            kernels = clock.kernel_seconds(lambda: [step(batch) for batch in few])
            return {
                "new": new,
                "known": again,
                "kernels": None if kernels is None else kernels / len(few),
                "shapes": len(visited),
            }

        return run

    def measured(self, timings: dict[str, Timing]) -> dict[str, Timing]:
        one = timings["ours"]
        found = {key: None if x is None else float(x) for key, x in one.result.items()}
        new, known, kernels = found["new"], found["known"], found["kernels"]
        assert new is not None and known is not None
        return {
            "published": Timing([known], kernel_seconds=kernels, result=one.result),
            "ours": replace(one, seconds=[new], kernel_seconds=kernels),
        }

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        new, known = timings["ours"].median, timings["published"].median
        count = int(timings["ours"].result["shapes"])
        target = f"{count} shapes: at most {self.max_ratio:g} x a known one ({new / known:.2f} x)"
        met = new / known <= self.max_ratio
        if self.rate is None:
            return target, met
        rate = self.count / known
        return f"{target}; known, {self.rate:g} images/s ({rate:.0f})", met and rate >= self.rate
