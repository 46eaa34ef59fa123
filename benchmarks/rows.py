"""The rows of the benchmark: what the published procedure and ours do, and what is asked of it.

A row is a small dataclass. `published` and `ours` prepare their side in a process of its own and
return what is timed; both sides compute the same thing from the same weights and data.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mit_semseg import scores
from mit_semseg.benchmarks import published
from mit_semseg.benchmarks.sides import Runnable, Timing
from mit_semseg.dataset import ClassTable, TrainDataset, streets
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.engine.launch import autocast, keep_freed_memory
from mit_semseg.engine.training.optim import build_optimizer
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel, async_copy_to
from mit_semseg.losses import build_loss
from mit_semseg.metrics import ConfusionMatrix
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.segmenter import Segmenter
from mit_semseg.visualize import color_encode, palette

# What the figures of the field are given for: an ADE20K photograph and its 150 classes.
HEIGHT, WIDTH, CLASSES = 512, 683, 150
SCALES = (300, 375, 450, 525, 600)
WIDTHS = {"mobilenetv2dilated": 320}  # of the last feature map; 2048 for the others


@dataclass(frozen=True)
class Row(ABC):
    """One comparison.

    Attributes:
        device: cpu or cuda.
        target: least ratio of the seconds, the other side's over ours; None: only reported.
        baseline: what the other side is.
        repeats: timed calls of each side.
        threads: compute threads of each side, 0 for all cores.
        counted: floating-point operations are counted, and the distance to the floor is told.
        precision: of ours, and of the floor it is held against.
        images: in one call, where images per second mean something.
    """

    device: str = "cpu"
    target: float | None = None
    baseline: str = "published"
    repeats: int = 5
    threads: int = 0
    counted: bool = False
    precision: str = "fp32"
    images: int = 0

    group = ""
    title = ""

    @property
    def missing(self) -> str:
        """Why the row cannot be run here; "" when it can."""
        return ""

    @abstractmethod
    def published(self) -> Runnable:
        """What the other side does."""

    @abstractmethod
    def ours(self) -> Runnable:
        """What we do."""

    def sides(self) -> dict[str, Callable[[], Runnable]]:
        """All that take turns: "published", unless there is no baseline, and "ours"."""
        theirs = {"published": self.published} if self.baseline else {}
        return {**theirs, "ours": self.ours}

    def agreement(self, theirs: Any, ours: Any) -> float | None:
        """Share of equal labels, where both sides give labels."""
        return None

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        """What was asked and whether it holds; None where nothing was asked."""
        if self.target is None:
            return "", None
        ratio = timings["published"].median / timings["ours"].median
        return f"at least {self.target:g} x", ratio >= self.target


def equal_labels(theirs: Any, ours: Any) -> float:
    return float((np.asarray(theirs).reshape(-1) == np.asarray(ours).reshape(-1)).mean())


# ------------------------------------------------------------------------------ scores
@dataclass(frozen=True)
class ClassMap(Row):
    """Logits of all scales -> class map."""

    scales: tuple[int, ...] = SCALES
    size: tuple[int, int] = (HEIGHT, WIDTH)
    limit_mib: float | None = None

    group = "Scores"

    @property
    def title(self) -> str:  # type: ignore[override]
        count = len(self.scales)
        scales = "one scale" if count == 1 else f"{count} scales"
        return f"class map of {self.size[1]}x{self.size[0]}, {CLASSES} classes, {scales}"

    def logits(self) -> list[Tensor]:
        """As a network with stride 8 gives them."""
        torch.manual_seed(0)
        short = min(self.size)
        made = []
        for scale in self.scales:
            h, w = (round(side * scale / short / 8) for side in self.size)
            # Neighbours resemble each other, as those of real scores do.
            coarse = torch.randn(1, CLASSES, max(1, h // 4), max(1, w // 4)) * 3
            smooth = nn.functional.interpolate(coarse, (h, w), mode="bilinear")
            made.append((smooth + 0.3 * torch.randn(1, CLASSES, h, w)).to(self.device))
        return made

    def published(self) -> Runnable:
        return partial(published.class_map, self.logits(), self.size)

    def ours(self) -> Runnable:
        return partial(scores.class_map, self.logits(), self.size)

    def agreement(self, theirs: Any, ours: Any) -> float | None:
        return equal_labels(theirs, ours)

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        asked, met = super().judge(timings)
        used = timings["ours"].extra_mib
        if self.limit_mib is None or used is None:
            return asked, met
        both = f"{asked}, at most {self.limit_mib:g} MiB".removeprefix(", ")
        return both, met is not False and used <= self.limit_mib


@dataclass(frozen=True)
class LargeClassMap(ClassMap):
    """Too large for the published procedure: memory is what counts."""

    scales: tuple[int, ...] = (4000,)
    size: tuple[int, int] = (4000, 6000)
    limit_mib: float | None = 256
    baseline: str = ""


# ------------------------------------------------------------------------------ networks
def build(encoder: str, decoder: str, num_class: int = CLASSES) -> SegmentationModule:
    """A model with random weights, always the same ones."""
    torch.manual_seed(0)
    fc_dim = WIDTHS.get(encoder, 2048)
    net_enc = ModelBuilder.build_encoder(encoder, fc_dim, weights="none")
    net_dec = ModelBuilder.build_decoder(
        decoder, fc_dim, num_class, channels=net_enc.channels, strides=net_enc.strides
    )
    return SegmentationModule(
        net_enc,
        net_dec,
        build_loss("nll", num_class, None),
        deep_sup_scale=0.4 if net_dec.auxiliary else None,
        normalize=Normalize.of({}),
    )


def photograph(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A rendered street, (height, width, 3) uint8."""
    return streets.render(7, (height, width))[0]


@dataclass(frozen=True)
class Prediction(Row):
    """One image, from bytes to class map."""

    encoder: str = "mobilenetv2dilated"
    decoder: str = "c1_deepsup"
    scales: tuple[int, ...] = SCALES
    counted: bool = True
    images: int = 1

    group = "Prediction"

    @property
    def title(self) -> str:  # type: ignore[override]
        scales = "one scale" if len(self.scales) == 1 else f"{len(self.scales)} scales"
        return f"{self.encoder} + {self.decoder}, {scales}, {self.precision}"

    def published(self) -> Runnable:
        plain = published.as_published(build(self.encoder, self.decoder)).eval()
        plain.decoder.use_softmax = True
        return partial(published.predict, plain.to(self.device), photograph(), self.scales)

    def ours(self) -> Runnable:
        segmenter = Segmenter(
            build(self.encoder, self.decoder),
            ClassTable.numbered(CLASSES),
            {"imgSizes": self.scales},
            device=self.device,
            precision=self.precision,
        )
        image = photograph()
        return lambda: segmenter(image).labels

    def agreement(self, theirs: Any, ours: Any) -> float | None:
        # Random weights leave classes nearly tied; what less precision changes is another row.
        return equal_labels(theirs, ours) if self.precision == "fp32" else None


# ------------------------------------------------------------------------------ training
@dataclass(frozen=True)
class TrainStep(Row):
    """One step on a batch that is in memory."""

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

    def _bytes(self) -> dict[str, Tensor]:
        count, height, width = self.batch
        drawn = [streets.render(k, (height, width)) for k in range(count)]
        images = torch.stack([torch.from_numpy(image) for image, _ in drawn])
        labels = torch.stack([torch.from_numpy(label.astype(np.int64)) for _, label in drawn])
        return {
            "img_data": images.permute(0, 3, 1, 2),
            "img_size": torch.tensor([[height, width]] * count),
            "seg_label": labels[:, 4::8, 4::8].contiguous() - 1,
        }

    def _pinned(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As a loader hands batches over."""
        if self.device == "cpu":
            return batch
        return {key: value.pin_memory() for key, value in batch.items()}

    def published(self) -> Runnable:
        module = published.as_published(build(self.encoder, self.decoder)).train().to(self.device)
        batch = self._bytes()
        normalize = Normalize.of({})
        batch["img_data"] = normalize(batch["img_data"], batch.pop("img_size")).contiguous()
        batch = self._pinned(batch)
        optimizers = [
            torch.optim.SGD(part.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
            for part in (module.encoder, module.decoder)
        ]
        return lambda: published.train_step(module, optimizers, async_copy_to(batch, self.device))

    def ours(self) -> Runnable:
        device = torch.device(self.device)
        if device.type == "cpu":
            keep_freed_memory()
        module = build(self.encoder, self.decoder).train().to(device)
        module = module.to(memory_format=torch.channels_last)
        optimizer = build_optimizer("SGD", (module, 0.02))
        batch = self._pinned(self._bytes())

        def step() -> float:
            with autocast(device, self.precision):
                loss, _ = module(async_copy_to(batch, device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        return step


# ------------------------------------------------------------------------------ around the network
def write_scenes(folder: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Photograph-like JPEGs of ADE20K's size, with their masks."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    pairs = []
    for k in range(count):
        image, label = streets.render((seed, k), (HEIGHT, WIDTH))
        # Film grain: a rendered picture is smoother, and so quicker to decode, than a photograph.
        grain = rng.normal(0, 6, (HEIGHT, WIDTH, 1))
        noisy = np.clip(image + grain, 0, 255).astype(np.uint8)
        paths = str(folder / f"{k}.jpg"), str(folder / f"{k}.png")
        Image.fromarray(noisy).save(paths[0], quality=90)
        Image.fromarray(label.astype(np.uint8)).save(paths[1])
        pairs.append(paths)
    return pairs


@dataclass(frozen=True)
class Loading(Row):
    """Files to training batches of two, on one core."""

    threads: int = 1
    repeats: int = 7
    images: int = 16  # on disk, and in one pass

    normalised: bool = False  # on the same core too, rather than on the device

    group = "Data"

    @property
    def title(self) -> str:  # type: ignore[override]
        place = "on the same core too" if self.normalised else "left to the device"
        return f"{WIDTH}x{HEIGHT} JPEGs to batches, one worker core, normalisation {place}"

    def _dataset(self, folder: str) -> TrainDataset:
        records = [
            {"fpath_img": image, "fpath_segm": mask, "width": WIDTH, "height": HEIGHT}
            for image, mask in write_scenes(Path(folder), self.images, 1)
        ]
        return TrainDataset("", records, {}, batch_per_gpu=2, normalized=False)

    def published(self) -> Runnable:
        folder = tempfile.TemporaryDirectory(prefix="bench-")
        data = self._dataset(folder.name)
        files = {record["fpath_img"]: record["fpath_segm"] for record in data.list_sample}
        # The same images in the same batches; sizes and flips as many times, drawn anew.
        batches = [[(x, files[x]) for x in data.files(i)] for i in range(data.batches_per_pass)]
        rng = np.random.default_rng(0)

        def one_pass() -> None:
            assert folder  # which lives as long as it is read
            for pairs in batches:
                flips = (rng.random(len(pairs)) < 0.5).tolist()
                published.training_batch(pairs, int(rng.choice(SCALES)), 1000, flips)

        return one_pass

    def ours(self) -> Runnable:
        folder = tempfile.TemporaryDirectory(prefix="bench-")
        data = self._dataset(folder.name)
        normalize = Normalize.of({})
        start = 0

        def one_pass() -> None:
            assert folder  # which lives as long as it is read
            nonlocal start
            for i in range(data.batches_per_pass):
                batch = data[start + i]
                if self.normalised:
                    normalize(batch["img_data"], batch["img_size"])
            start += data.batches_per_pass

        return one_pass


@dataclass(frozen=True)
class Counting(Row):
    """Prediction and label -> what is accumulated."""

    repeats: int = 15

    group = "Figures"
    title = f"confusion matrix of {WIDTH}x{HEIGHT}, {CLASSES} classes"

    def _maps(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        coarse = torch.randint(0, CLASSES, (1, 1, 32, 43)).float()
        label = nn.functional.interpolate(coarse, (HEIGHT, WIDTH))[0, 0].long()
        wrong = torch.rand(HEIGHT, WIDTH) < 0.2
        prediction = torch.where(wrong, torch.randint(0, CLASSES, label.shape), label)
        label[:20] = -1
        # Predictions are where the network is, labels come from files.
        return prediction.to(self.device), label

    def published(self) -> Runnable:
        prediction, label = self._maps()
        return lambda: published.count(prediction.cpu().numpy(), label.numpy(), CLASSES)

    def ours(self) -> Runnable:
        prediction, label = self._maps()
        matrix = ConfusionMatrix(CLASSES)
        return lambda: matrix.update(prediction, label.to(self.device))


@dataclass(frozen=True)
class Colours(Row):
    """Labels -> picture."""

    repeats: int = 15

    group = "Figures"
    title = f"colours of {WIDTH}x{HEIGHT}, 20 of {CLASSES} classes"

    def _labels(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        coarse = rng.choice(rng.choice(CLASSES, 20, replace=False), (16, 22))
        return np.kron(coarse, np.ones((32, 32), dtype=np.int64))[:HEIGHT, :WIDTH]

    def published(self) -> Runnable:
        return partial(published.color_encode, self._labels(), palette(CLASSES))

    def ours(self) -> Runnable:
        return partial(color_encode, self._labels(), palette(CLASSES))

    def agreement(self, theirs: Any, ours: Any) -> float | None:
        return equal_labels(theirs, ours)


@dataclass(frozen=True)
class SyncBatchNorm(Row):
    """Forward and backward of a convolution with BatchNorm, on replicas in one process."""

    target: float | None = 1 / 1.2
    baseline: str = "unsynchronised BatchNorm"
    replicas: int = 3
    repeats: int = 9

    group = "Parallel"

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"synchronised BatchNorm, {self.replicas} replicas"

    def _step(self, norm: type[nn.BatchNorm2d]) -> Runnable:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, 64), (64, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), norm(n_out), nn.ReLU()]
        net = nn.Sequential(*layers).to(self.device)
        places = [self.device] * self.replicas
        parallel = UserScatteredDataParallel(net, device_ids=places)
        inputs = [torch.randn(2, 3, 96, 128, device=self.device) for _ in places]
        return lambda: parallel(inputs).square().mean().backward()

    def published(self) -> Runnable:
        return self._step(nn.BatchNorm2d)

    def ours(self) -> Runnable:
        return self._step(SynchronizedBatchNorm2d)

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        slower = timings["ours"].median / timings["published"].median - 1
        return f"at most 20 % slower ({100 * slower:+.0f} %)", slower <= 0.2


@dataclass(frozen=True)
class Startup(Row):
    """A command in a fresh interpreter."""

    command: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    limit: float = 0.5
    repeats: int = 7
    name: str = ""

    group = "Start"

    @property
    def title(self) -> str:  # type: ignore[override]
        return self.name

    def published(self) -> Runnable:
        return partial(_run, self.against)

    def ours(self) -> Runnable:
        return partial(_run, self.command)

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        took = timings["ours"].median
        if "published" not in timings:
            return f"at most {self.limit:g} s", took <= self.limit
        added = took - timings["published"].median
        return f"adds at most {self.limit:g} s ({added:+.2f} s)", added <= self.limit


def _run(command: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode not in (0, 2):
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
