"""Images to counts: what one process computes of an evaluation, and how counts are added up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mit_semseg.config import Options
from mit_semseg.dataset import ValDataset
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.inputs import common_base, output_stems
from mit_semseg.engine.pipeline import HandedOn, in_threads
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
from mit_semseg.metrics import BoundaryScore, ConfusionMatrix
from mit_semseg.models import SegmentationModule
from mit_semseg.scores import label_dtype
from mit_semseg.visualize import color_encode, side_by_side
from mit_semseg.visualize.results import write_png

# Indices of the images that share one call of the network's; results do not depend on how images
# are divided into chunks, nor on which process scores which.
Chunk = Sequence[int]
# What is reported of a chunk as soon as it is done: how many images, and which were left out.
Scored = tuple[int, dict[int, tuple[str, str]]]


@dataclass
class Evaluation:
    """What scoring some images gave; adding two gives that of all their images.

    Attributes:
        matrix: the counts of the images that could be read.
        bad: number in the list -> (image, error) of those that could not.
        seconds: that the network took.
        processes: that took part.
        boundary: boundary F-scores of the same images, where they were asked for.
    """

    matrix: ConfusionMatrix
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0
    processes: int = 1
    boundary: BoundaryScore | None = None

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(image, error) of the images that were left out, in the order of the list."""
        return [self.bad[index] for index in sorted(self.bad)]

    def counts(self) -> list[Tensor]:
        """All that is merged by addition, as int64 tensors; writing to them changes the counts."""
        sums = [self.boundary.sums, self.boundary.images] if self.boundary else []
        return [self.matrix.matrix, *sums]

    def empty(self) -> Evaluation:
        """One of no images, that counts what this one does."""
        num_class = self.matrix.num_class
        boundary = BoundaryScore(num_class, self.boundary.tolerance) if self.boundary else None
        return Evaluation(ConfusionMatrix(num_class), processes=0, boundary=boundary)

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.matrix + other.matrix,
            {**self.bad, **other.bad},
            self.seconds + other.seconds,
            self.processes + other.processes,
            self.boundary + other.boundary if self.boundary and other.boundary else None,
        )


def merged(evaluation: Evaluation, device: torch.device) -> Evaluation:
    """The sum of all ranks' evaluations, on every rank; outside a process group the argument.

    Args:
        evaluation: this rank's; every rank has to call this.
        device: where the ranks exchange the counts: this rank's GPU with NCCL, else the CPU.
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
    return replace(total, bad=everyone, seconds=sum(seconds), processes=sum(processes))


@dataclass(frozen=True)
class SavedPredictions:
    """Class ids of some images of the list, as files `NUMBER.npy`, (H, W) int16."""

    folder: Path
    numbers: tuple[int, ...]

    @classmethod
    def evenly(cls, folder: Path, count: int, images: int) -> SavedPredictions:
        """Those of at most `count` images out of `images`, evenly spread."""
        return cls(
            folder, tuple(sorted({(2 * k + 1) * images // (2 * count) for k in range(count)}))
        )

    def file(self, number: int) -> Path:
        """Where the class ids of image `number` are."""
        return self.folder / f"{number}.npy"

    def add(self, numbers: Sequence[int], predicted: Tensor) -> None:
        """Write those of images `numbers`, (N, H, W), that are to be saved."""
        for number, one in zip(numbers, predicted, strict=True):
            if number in self.numbers:
                self.folder.mkdir(parents=True, exist_ok=True)
                np.save(self.file(number), one.cpu().numpy().astype(np.int16))


@dataclass(frozen=True)
class Pictures:
    """Where pictures of the evaluated images go, and the colours of the classes, (K, 3) uint8."""

    folder: Path
    colors: np.ndarray


class Gallery:
    """Pictures of image, truth and prediction side by side, named after their images."""

    def __init__(self, dataset: ValDataset, pictures: Pictures) -> None:
        root, records = dataset.root_dataset, dataset.list_sample
        files = [os.path.join(root, record["fpath_img"]) for record in records]
        base = common_base(os.path.dirname(os.path.abspath(file)) for file in files)
        # Worked out from the whole list, so that every process comes to the same names.
        stems = output_stems(files, base, pictures.folder, [".png"])
        self.paths = [Path(f"{stem}.png") for stem in stems]
        self.colors = pictures.colors

    def add(self, index: int, image: np.ndarray, truth: Tensor, predicted: Tensor) -> None:
        """Write the picture of image number `index`."""
        path = self.paths[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        maps = (color_encode(labels.numpy(), self.colors) for labels in (truth, predicted))
        write_png(path, side_by_side(image, *maps))


@dataclass
class _Group:
    """Images of a chunk that are computed together: the scales of equal shape."""

    numbers: list[int]
    scales: list[Tensor]  # (N, 3, h, w) each
    truth: Tensor  # (N, H, W), -1 where ignored


@dataclass
class _Read:
    """The images of a chunk; `bad` has (image, error) of those that cannot be used."""

    groups: list[_Group] = field(default_factory=list)
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)


class Scorer:
    """From the number of an image to its share of the confusion matrix.

    Args:
        module: the model, on any device, in any mode.
        dataset: samples with labels.
        options: its `VAL` keys apply.
        device: where to compute.
        concurrent: chunks that are computed side by side on the CPU.
        processes: among which the cores of this rank are divided.
        boundary: sum up boundary F-scores, too.
        gallery: takes a picture of every image.
        saved: takes class ids of some images.
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
        gallery: Gallery | None = None,
        saved: SavedPredictions | None = None,
    ) -> None:
        self.predictor = Predictor.of(module, options.DATASET, options.VAL, device)
        self.dataset, self.device = dataset, device
        self.gallery, self.saved = gallery, saved
        self.num_class = options.DATASET.num_class
        self.dtype = label_dtype(self.num_class)
        self.concurrent = concurrent
        self.threads = Threads.of(device, processes)
        score = BoundaryScore(self.num_class) if boundary else None
        self.nothing = Evaluation(ConfusionMatrix(self.num_class), processes=0, boundary=score)

    def run(self, chunks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """Score chunks: yields what is to be reported of each, returns the sum."""
        on_cpu = self.device.type == "cpu"
        return (yield from (self.side_by_side(chunks) if on_cpu else self.in_order(chunks)))

    def side_by_side(self, chunks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """Several chunks at a time, each by one thread, which reads, computes and counts."""
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
            # torch keeps one number for all threads that have not computed yet.
            torch.set_num_threads(threads)
        return total

    def in_order(self, chunks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """One chunk after the other, computed by the calling thread, which waits for no result."""
        total = replace(self.nothing.empty(), processes=1)
        counts = ConfusionMatrix(self.num_class, self.device)
        watches: list[Stopwatch] = []
        threads, enter = self.threads, partial(use_device, self.device)
        reading = in_threads(self._read, chunks, threads.readers, threads.read_ahead, enter)
        finishing: HandedOn[Evaluation] = HandedOn(threads.writers, threads.unwritten, enter)
        with on_device(self.device), finishing, contextlib.closing(reading):
            for chunk, future in reading:
                read = future.result()
                total.bad.update(read.bad)
                copies = []
                for group in read.groups:
                    watch = Stopwatch(self.device)
                    predicted = self._predicted(group)
                    watches.append(watch.stop())
                    if len(watches) > threads.unwritten:
                        # Launching runs far ahead of computing, and all it reads stays in memory.
                        watches[-threads.unwritten].seconds()
                    truth = group.truth.to(self.device, non_blocking=True)
                    # Masks are checked when they are read, and classes are predicted in range.
                    counts.update(predicted, truth, check=False)
                    if self._on_host:
                        copies.append(HostCopy(predicted))
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
        """The evaluation of a chunk, in one of the threads of `side_by_side`."""
        read = self._read(chunk)
        part = replace(self.nothing.empty(), bad=read.bad)
        copies = []
        for group in read.groups:
            watch = Stopwatch(self.device)
            predicted = self._predicted(group)
            part.seconds += watch.stop().seconds()
            part.matrix.update(predicted, group.truth)
            copies.append(HostCopy(predicted))
        return part + self._finished(read, copies) if self._on_host else part

    @property
    def _on_host(self) -> bool:
        """Whether anybody needs the class maps themselves."""
        parts = (self.nothing.boundary, self.gallery, self.saved)
        return any(part is not None for part in parts)

    def _finished(self, read: _Read, copies: Sequence[HostCopy]) -> Evaluation:
        """What is made of the class maps on the host."""
        part = self.nothing.empty()
        for group, copy in zip(read.groups, copies, strict=True):
            predicted = copy.wait()
            if self.saved is not None:
                self.saved.add(group.numbers, predicted)
            for i, one, truth in zip(group.numbers, predicted, group.truth, strict=True):
                if part.boundary is not None:
                    part.boundary.update(one, truth)
                if self.gallery is not None:
                    self.gallery.add(i, read.pictures[i], truth, one)
        return part

    def _read(self, chunk: Chunk) -> _Read:
        """The images of a chunk, those of equal shape stacked."""
        read, samples = _Read(), {}
        for i in chunk:
            try:
                samples[i] = self.dataset[i]
            except (OSError, ValueError) as error:
                image = str(self.dataset.list_sample[i]["fpath_img"])
                read.bad[i] = image, one_line(error).removeprefix(f"{image}: ")
        if self.gallery is not None:
            read.pictures = {i: sample["img_ori"] for i, sample in samples.items()}
        numbers = list(samples)
        truths = [samples[i]["seg_label"] for i in numbers]
        sizes = [(truth.shape[1], truth.shape[2]) for truth in truths]
        inputs = [samples[i]["img_data"] for i in numbers]
        for positions, scales in stacked(inputs, sizes):
            truth = pinned(torch.cat([truths[p] for p in positions]), self.device)
            scales = [pinned(scale, self.device) for scale in scales]
            read.groups.append(_Group([numbers[p] for p in positions], scales, truth))
        return read

    def _predicted(self, group: _Group) -> Tensor:
        """(N, H, W) class ids, on the device unless its memory was too small."""
        size = (group.truth.shape[1], group.truth.shape[2])
        predicted = self.predictor.labels(self.predictor.logits(group.scales), size, self.dtype)
        group.scales.clear()  # needed no more
        return predicted


def _single_threaded() -> None:
    torch.set_num_threads(1)
