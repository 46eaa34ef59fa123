"""The part of an evaluation that one process computes, and merging of the results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mit_semseg.config import Options
from mit_semseg.dataset import ValDataset
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.image_scores import ReportCounts
from mit_semseg.engine.inputs import common_base, output_stems
from mit_semseg.engine.pipeline import OrderedCalls, in_threads
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.transfer import (
    HostCopy,
    Stopwatch,
    Threads,
    on_device,
    pinned,
    stacked,
)
from mit_semseg.errors import one_line
from mit_semseg.metrics import BoundaryScore, Calibration, ConfusionMatrix
from mit_semseg.models import SegmentationModule
from mit_semseg.scores import confidence_map, label_dtype
from mit_semseg.visualize import color_encode, side_by_side
from mit_semseg.visualize.bands import picture
from mit_semseg.visualize.results import write_png

# Indices of images that share a forward pass. Results do not depend on the chunks, or on which
# process scores a chunk.
Chunk = Sequence[int]
# Number of images of a chunk, and `bad` as in `Evaluation`.
Scored = tuple[int, dict[int, tuple[str, str]]]


@dataclass
class Evaluation:
    """Counts of some images; `+` merges two evaluations.

    Attributes:
        matrix: confusion matrix of the images that could be read.
        bad: index in the list -> (image, error) of those that could not.
        seconds: of the network.
        processes: number of processes.
        boundary: boundary F-scores; None if they are not computed.
        report: calibration and metrics per image; None if they are not computed.
    """

    matrix: ConfusionMatrix
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0
    processes: int = 1
    boundary: BoundaryScore | None = None
    report: ReportCounts | None = None

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(image, error) of the skipped images, in the order of the list."""
        return [self.bad[index] for index in sorted(self.bad)]

    def counts(self) -> list[Tensor]:
        """All counts as int64 tensors (views)."""
        sums = [self.boundary.sums, self.boundary.images] if self.boundary else []
        if self.report is not None:
            sums += [self.report.calibration.counts, self.report.calibration.labelled]
        return [self.matrix.matrix, *sums]

    def empty(self) -> Evaluation:
        """An evaluation without images that counts the same quantities."""
        num_class = self.matrix.num_class
        boundary = BoundaryScore(num_class, self.boundary.tolerance) if self.boundary else None
        report = self.report.empty() if self.report else None
        matrix = ConfusionMatrix(num_class)
        return Evaluation(matrix, processes=0, boundary=boundary, report=report)

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.matrix + other.matrix,
            {**self.bad, **other.bad},
            self.seconds + other.seconds,
            self.processes + other.processes,
            self.boundary + other.boundary if self.boundary and other.boundary else None,
            self.report + other.report if self.report and other.report else None,
        )


def merged(evaluation: Evaluation, device: torch.device) -> Evaluation:
    """The sum of the evaluations of all ranks; without a process group the argument.

    Args:
        evaluation: of this rank; every rank has to call this.
        device: of the exchanged counts: this rank's GPU with NCCL, else the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return evaluation
    total = evaluation.empty()
    counts = torch.cat([own.flatten() for own in evaluation.counts()]).to(device)
    dist.all_reduce(counts)
    sizes = [sums.numel() for sums in total.counts()]
    for sums, own in zip(total.counts(), counts.cpu().split(sizes), strict=True):
        sums.copy_(own.view_as(sums))
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, (evaluation.bad, evaluation.seconds, evaluation.processes))
    bad, seconds, processes = zip(*others)
    everyone = {index: failure for part in bad for index, failure in part.items()}
    if evaluation.report is not None and total.report is not None:
        scores: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(scores, evaluation.report.images)
        for part in scores:
            total.report.images.update(part)
        total.report.forget()
    return replace(total, bad=everyone, seconds=sum(seconds), processes=sum(processes))


@dataclass(frozen=True)
class SavedPredictions:
    """Predicted class ids of selected images, in files `NUMBER.npy`, (H, W) int16."""

    folder: Path
    numbers: tuple[int, ...]

    @classmethod
    def evenly(cls, folder: Path, count: int, images: int) -> SavedPredictions:
        """Select at most `count` out of `images` images, evenly spread."""
        return cls(
            folder, tuple(sorted({(2 * k + 1) * images // (2 * count) for k in range(count)}))
        )

    def file(self, number: int) -> Path:
        """The file of image `number`."""
        return self.folder / f"{number}.npy"

    def add(self, numbers: Sequence[int], predicted: Tensor) -> None:
        """Write the class ids, (N, H, W), of the selected images among `numbers`."""
        for number, one in zip(numbers, predicted, strict=True):
            if number in self.numbers:
                self.folder.mkdir(parents=True, exist_ok=True)
                np.save(self.file(number), one.cpu().numpy().astype(np.int16))


class Figures(Protocol):
    """Takes the results of every image."""

    def add(self, index: int, image: np.ndarray, truth: Tensor, predicted: Tensor) -> None:
        """Take image number `index`, its ground truth and prediction, (H, W) class ids."""


class FigureWriter:
    """Writes figures of image, ground truth and prediction, named after their images.

    Args:
        dataset: the images.
        folder: of the figures.
        colors: of the classes, (K, 3) uint8.
    """

    def __init__(self, dataset: ValDataset, folder: Path, colors: np.ndarray) -> None:
        root, records = dataset.root_dataset, dataset.list_sample
        files = [os.path.join(root, record["fpath_img"]) for record in records]
        base = common_base(os.path.dirname(os.path.abspath(file)) for file in files)
        # From the whole list, so that all processes use the same names.
        stems = output_stems(files, base, folder, [".png"])
        self.paths = [Path(f"{stem}.png") for stem in stems]
        self.colors, self.bands = colors, dataset.options.bands

    def add(self, index: int, image: np.ndarray, truth: Tensor, predicted: Tensor) -> None:
        """Write the figure of image number `index`."""
        path = self.paths[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        maps = (color_encode(labels.numpy(), self.colors) for labels in (truth, predicted))
        write_png(path, side_by_side(picture(image, self.bands), *maps))


@dataclass
class _Group:
    """Images of a chunk with inputs of equal shapes, which share a forward pass."""

    numbers: list[int]
    scales: list[Tensor]  # (N, 3, h, w) each
    truth: Tensor  # (N, H, W), -1 where ignored


@dataclass
class _Read:
    """The images of a chunk; `bad` as in `Evaluation`."""

    groups: list[_Group] = field(default_factory=list)
    images: dict[int, np.ndarray] = field(default_factory=dict)
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)


class Scorer:
    """Computes the confusion matrix of images.

    Args:
        module: the model, on any device, in any mode.
        dataset: samples with labels.
        options: its `VAL` keys are used.
        device: where to compute.
        concurrent: chunks computed concurrently on the CPU.
        processes: of this rank, which share its cores.
        boundary: also compute boundary F-scores.
        figures: takes the results of every image.
        saved: saves class ids of selected images.
        report: also compute calibration and the metrics of each image.
    """

    def __init__(
        self,
        module: SegmentationModule,
        dataset: ValDataset,
        options: Options,
        device: torch.device,
        concurrent: int = 1,
        processes: int = 1,
        *,
        boundary: bool = False,
        figures: Figures | None = None,
        saved: SavedPredictions | None = None,
        report: bool = False,
    ) -> None:
        self.predictor = Predictor.of(module, options.DATASET, options.VAL, device)
        self.dataset, self.device = dataset, device
        self.figures, self.saved = figures, saved
        self.num_class = options.DATASET.num_class
        self.dtype = label_dtype(self.num_class)
        self.concurrent = concurrent
        self.threads = Threads.of(device, processes)
        score = BoundaryScore(self.num_class) if boundary else None
        extra = ReportCounts(Calibration(self.num_class)) if report else None
        matrix = ConfusionMatrix(self.num_class)
        self.nothing = Evaluation(matrix, processes=0, boundary=score, report=extra)

    def run(self, chunks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """Score chunks; yields an item per chunk and returns the sum."""
        on_cpu = self.device.type == "cpu"
        return (yield from (self.side_by_side(chunks) if on_cpu else self.in_order(chunks)))

    def side_by_side(self, chunks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """On the CPU: chunks concurrently, each read, computed and counted by one thread."""
        total = replace(self.nothing.empty(), processes=1)
        threads = torch.get_num_threads()
        try:
            for chunk, scored in in_threads(
                *(self._scored, chunks, self.concurrent, self.concurrent, _single_threaded)
            ):
                part = scored.result()
                total += part
                yield len(chunk), part.bad
        finally:
            # torch has one setting for all threads that have not computed yet.
            torch.set_num_threads(threads)
        return total

    def in_order(self, chunks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """On a GPU: chunks one after the other, launched by the calling thread without waiting."""
        total = replace(self.nothing.empty(), processes=1)
        counts = ConfusionMatrix(self.num_class, self.device)
        watches: list[Stopwatch] = []
        threads, enter = self.threads, partial(use_device, self.device)
        reading = in_threads(self._read, chunks, threads.readers, threads.read_ahead, enter)
        finishing = OrderedCalls[Evaluation](threads.writers, threads.unwritten, enter)
        with on_device(self.device), finishing, contextlib.closing(reading):
            for chunk, future in reading:
                read = future.result()
                total.bad.update(read.bad)
                copies = []
                for group in read.groups:
                    watch = Stopwatch(self.device)
                    predicted, sure = self._predicted(group)
                    watches.append(watch.stop())
                    if len(watches) > threads.unwritten:
                        # Limit how far launching is ahead of computing, which takes memory.
                        watches[-threads.unwritten].seconds()
                    truth = group.truth.to(self.device, non_blocking=True)
                    # Masks are checked when they are read; a check here would synchronise.
                    counts.update(predicted, truth, check=False)
                    if self._on_host:
                        copies.append(_copied(predicted, sure))
                if copies:
                    for part in finishing.add(self._finished, read, copies):
                        total += part
                yield len(chunk), read.bad
            for part in finishing.rest():
                total += part
        return replace(
            total, matrix=counts.cpu(), seconds=sum(watch.seconds() for watch in watches)
        )

    def _scored(self, chunk: Chunk) -> Evaluation:
        """The evaluation of a chunk; called in a thread of `side_by_side`."""
        read = self._read(chunk)
        part = replace(self.nothing.empty(), bad=read.bad)
        copies = []
        for group in read.groups:
            watch = Stopwatch(self.device)
            predicted, sure = self._predicted(group)
            part.seconds += watch.stop().seconds()
            part.matrix.update(predicted, group.truth)
            copies.append(_copied(predicted, sure))
        return part + self._finished(read, copies) if self._on_host else part

    @property
    def _on_host(self) -> bool:
        """Whether the class maps are needed on the host."""
        parts = (self.nothing.boundary, self.nothing.report, self.figures, self.saved)
        return any(part is not None for part in parts)

    def _finished(self, read: _Read, copies: Sequence[_Copies]) -> Evaluation:
        """Save and draw class maps on the host, and compute what needs whole class maps."""
        part = self.nothing.empty()
        for group, (copy, sure) in zip(read.groups, copies, strict=True):
            predicted = copy.wait()
            if part.report is not None and sure is not None:
                for found in zip(group.numbers, predicted, group.truth, sure.wait(), strict=True):
                    part.report.update(*found)
            if self.saved is not None:
                self.saved.add(group.numbers, predicted)
            for i, one, truth in zip(group.numbers, predicted, group.truth, strict=True):
                if part.boundary is not None:
                    part.boundary.update(one, truth)
                if self.figures is not None:
                    self.figures.add(i, read.images[i], truth, one)
        return part

    def _read(self, chunk: Chunk) -> _Read:
        """Read the images of a chunk and stack those of equal shape."""
        read, samples = _Read(), {}
        for i in chunk:
            try:
                samples[i] = self.dataset[i]
            except (OSError, ValueError) as error:
                image = str(self.dataset.list_sample[i]["fpath_img"])
                read.bad[i] = image, one_line(error).removeprefix(f"{image}: ")
        if self.figures is not None:
            read.images = {i: sample["img_ori"] for i, sample in samples.items()}
        numbers = list(samples)
        truths = [samples[i]["seg_label"] for i in numbers]
        sizes = [(truth.shape[1], truth.shape[2]) for truth in truths]
        inputs = [samples[i]["img_data"] for i in numbers]
        for positions, scales in stacked(inputs, sizes):
            truth = pinned(torch.cat([truths[p] for p in positions]), self.device)
            scales = [pinned(scale, self.device) for scale in scales]
            read.groups.append(_Group([numbers[p] for p in positions], scales, truth))
        return read

    def _predicted(self, group: _Group) -> tuple[Tensor, Tensor | None]:
        """(N, H, W) class ids, and for a report their probabilities."""
        size = (group.truth.shape[1], group.truth.shape[2])
        logits = self.predictor.logits(group.scales)
        group.scales.clear()  # frees the inputs
        predicted = self.predictor.labels(logits, size, self.dtype)
        return predicted, confidence_map(logits, size) if self.nothing.report else None


# Class ids and their probabilities, on the way to the host.
_Copies = tuple[HostCopy, HostCopy | None]


def _copied(predicted: Tensor, sure: Tensor | None) -> _Copies:
    return HostCopy(predicted), None if sure is None else HostCopy(sure)


def _single_threaded() -> None:
    torch.set_num_threads(1)
