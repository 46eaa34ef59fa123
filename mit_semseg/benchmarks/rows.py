"""Rows of the benchmark, which compare the published procedure with this package.

A row is a small dataclass. `published` and `ours` prepare their side in a separate process and
return the function to time; both compute the same from the same weights and data.
"""

from __future__ import annotations

import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mit_semseg import scores, shipped
from mit_semseg.benchmarks import published
from mit_semseg.benchmarks.clock import Runnable
from mit_semseg.benchmarks.sides import Timing
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.demo import streets
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel
from mit_semseg.losses import build_loss
from mit_semseg.metrics import ConfusionMatrix
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.segmenter import Segmenter
from mit_semseg.visualize import color_encode, palette

CAMVID_WEIGHTS = shipped.HOME / "weights" / shipped.MODEL
# Size of an ADE20K photograph, and number of classes.
HEIGHT, WIDTH, CLASSES = 512, 683, 150
SCALES = (300, 375, 450, 525, 600)
WIDTHS = {"mobilenetv2dilated": 320, "hrnetv2": 720}  # of the last feature map; others: 2048


@dataclass(frozen=True)
class Row(ABC):
    """One comparison.

    Attributes:
        device: cpu or cuda.
        target: minimum speed-up; None: no target.
        baseline: name of the other side; "": there is none.
        repeats: timed calls of each side.
        threads: compute threads of each side; 0: all cores.
        counted: count floating-point operations, for the time / floor column.
        precision: precision of our side and of the floor.
        images: images per call, for images per second; 0: not reported.
        budget: seconds after which no further round is started.
        burst: seconds of consecutive calls that are timed together; 0: single calls.
    """

    device: str = "cpu"
    target: float | None = None
    baseline: str = "published"
    repeats: int = 5
    threads: int = 0
    counted: bool = False
    precision: str = "fp32"
    images: int = 0
    budget: float = 60.0
    burst: float = 0.0

    group = ""
    title = ""

    @property
    def missing(self) -> str:
        """Why the row cannot be run; "" if it can."""
        return ""

    def published(self) -> Runnable:
        """Prepares the other side, if there is one."""
        raise NotImplementedError(f"{self.title} has no other side")

    @abstractmethod
    def ours(self) -> Runnable:
        """Prepares our side."""

    def sides(self) -> dict[str, Callable[[], Runnable]]:
        """The sides by name: "published", if there is a baseline, and "ours"."""
        theirs = {"published": self.published} if self.baseline else {}
        return {**theirs, "ours": self.ours}

    def measured(self, timings: dict[str, Timing]) -> dict[str, Timing]:
        """Timings of the sides; overridden by rows that measure time themselves."""
        return timings

    def agreement(self, theirs: Any, ours: Any) -> float | None:
        """Fraction of equal labels, if both sides return labels."""
        return None

    def judge(self, timings: Mapping[str, Timing]) -> tuple[str, bool | None]:
        """The target as text and whether it is met; None if there is none."""
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
        """Logits as of a network with stride 8."""
        torch.manual_seed(0)
        short = min(self.size)
        made = []
        for scale in self.scales:
            h, w = (round(side * scale / short / 8) for side in self.size)
            # Neighbours are correlated, as in real scores.
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
        target, met = super().judge(timings)
        used = timings["ours"].extra_mib
        if self.limit_mib is None or used is None:
            return target, met
        both = f"{target}, at most {self.limit_mib:g} MiB".removeprefix(", ")
        return both, met is not False and used <= self.limit_mib


@dataclass(frozen=True)
class LargeClassMap(ClassMap):
    """Too large for the published procedure; the target is peak memory."""

    scales: tuple[int, ...] = (4000,)
    size: tuple[int, int] = (4000, 6000)
    limit_mib: float | None = 256
    baseline: str = ""


# ------------------------------------------------------------------------------ networks
def build(encoder: str, decoder: str, num_class: int = CLASSES) -> SegmentationModule:
    """A model with reproducible random weights."""
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
    size: tuple[int, int] = (HEIGHT, WIDTH)
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
        image = photograph(*self.size)
        return partial(published.predict, plain.to(self.device), image, self.scales)

    def ours(self) -> Runnable:
        return self._segmenter(self.precision)

    def _segmenter(self, precision: str) -> Runnable:
        segmenter = Segmenter(
            build(self.encoder, self.decoder),
            ClassTable.numbered(CLASSES),
            {"imgSizes": self.scales},
            device=self.device,
            precision=precision,
        )
        image = photograph(*self.size)
        return lambda: segmenter(image).labels

    def agreement(self, theirs: Any, ours: Any) -> float | None:
        # With random weights classes are nearly tied; labels in reduced precision have other rows.
        return equal_labels(theirs, ours) if self.precision == "fp32" else None


@dataclass(frozen=True)
class FasterPrecision(Prediction):
    """Our prediction in reduced precision and in float32."""

    baseline: str = "ours in fp32"

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{super().title}, against fp32"

    def published(self) -> Runnable:
        return self._segmenter("fp32")


# ------------------------------------------------------------------------------ around the network
@dataclass(frozen=True)
class Counting(Row):
    """Prediction and label -> confusion matrix."""

    repeats: int = 15

    group = "Metrics"
    title = f"confusion matrix of {WIDTH}x{HEIGHT}, {CLASSES} classes"

    def _maps(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        coarse = torch.randint(0, CLASSES, (1, 1, 32, 43)).float()
        label = nn.functional.interpolate(coarse, (HEIGHT, WIDTH))[0, 0].long()
        wrong = torch.rand(HEIGHT, WIDTH) < 0.2
        prediction = torch.where(wrong, torch.randint(0, CLASSES, label.shape), label)
        label[:20] = -1
        # Predictions are on the device of the network, labels are read from files.
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
    """Labels -> image."""

    repeats: int = 15

    group = "Metrics"
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
    """Forward and backward of convolutions with BatchNorm, on replicas in one process."""

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
    """A command in a new interpreter."""

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
