"""Evaluation: one confusion matrix per process, merged by addition; bad files are left out.

With `VAL.boundary` there is a sum of boundary F-scores beside it, merged in the same way.

On a GPU images are read by threads and computed by one thread; the counts stay there to the end.
On the CPU every image is computed by a single thread, several images side by side: convolutions
round differently with every number of threads, and the figures must depend on neither the number
of processes nor the cores they have.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, ValDataset, build_split
from mit_semseg.dataset.options import DataOptions, with_scales
from mit_semseg.engine.checkpoint import load_model, model_classes, resolve_checkpoint
from mit_semseg.engine.cpu import cpu_count, fixed_threads, local_ranks
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.eval_report import format_report, single_class, summarize, write_report
from mit_semseg.engine.inputs import common_base, output_stems
from mit_semseg.engine.peers import results_of_ranks
from mit_semseg.engine.pipeline import HandedOn, in_threads
from mit_semseg.engine.pool import run_here, run_pool
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.transfer import (
    HostCopy,
    Stopwatch,
    Threads,
    on_device,
    pinned,
    stacked,
)
from mit_semseg.engine.watchdog import reading_watchdog
from mit_semseg.errors import one_line
from mit_semseg.metrics import BoundaryScore, ConfusionMatrix
from mit_semseg.models import SegmentationModule
from mit_semseg.models.tiles import Sliding
from mit_semseg.scores import label_dtype
from mit_semseg.visualize import color_encode, side_by_side
from mit_semseg.visualize.results import write_png

log = logging.getLogger("mit_semseg")

# Most images a process works on at a time on the CPU, where each takes memory of its own.
MAX_LANES = 8

# Indices of the images that share one call of `work`; results do not depend on who gets which.
Chunk = Sequence[int]
# What is told of a chunk as soon as it is done: how many images, and which were left out.
Scored = tuple[int, dict[int, tuple[str, str]]]


class Interrupted(Exception):
    """The caller's `stop` asked for an end before the work was done."""


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


@dataclass(frozen=True)
class Job:
    """What one evaluation process needs; small, since it is sent to every one of them."""

    cfg: Config
    checkpoint: str
    device: torch.device
    lanes: int  # images that are computed side by side on the CPU
    processes: int  # among which the cores of this rank are divided
    pictures: Path | None
    colors: np.ndarray
    kept: Kept | None = None


@dataclass(frozen=True)
class Kept:
    """Class ids of some images of the list, as files `NUMBER.npy`, (H, W) int16."""

    folder: Path
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path, count: int, of: int) -> Kept:
        """At most `count` of `of` images, evenly spread."""
        return cls(folder, tuple(sorted({(2 * k + 1) * of // (2 * count) for k in range(count)})))

    def file(self, number: int) -> Path:
        """Where the class ids of image `number` are."""
        return self.folder / f"{number}.npy"

    def add(self, numbers: Sequence[int], predicted: Tensor) -> None:
        """Write those of images `numbers`, (N, H, W), that are to be kept."""
        for number, one in zip(numbers, predicted, strict=True):
            if number in self.numbers:
                self.folder.mkdir(parents=True, exist_ok=True)
                np.save(self.file(number), one.cpu().numpy().astype(np.int16))


def evaluate(
    cfg: Config,
    devices: Sequence[torch.device],
    workers: int = 1,
    *,
    checkpoint: str | None = None,
    model: SegmentationModule | None = None,
    progress: bool = True,
    out_dir: str | Path | None = None,
    keep: int = 0,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Score a model on the validation list, print the tables and write them to files.

    Every image is one task, so the figures do not depend on the number of processes. Images of
    equal size among `VAL.batch_size` neighbours of the list share a forward pass. An image or mask
    that cannot be used is reported and left out, and the figures are those of the others.

    Args:
        cfg: the configuration; `DATASET.list_val` is what is evaluated, `DATASET.imgSizes` the
            scales that are averaged over.
        devices: where to compute; one process each.
        workers: processes per device. On the CPU the cores are divided among them.
        checkpoint: instead of `VAL.checkpoint`.
        model: evaluate this one, in this process on the first device, instead of a checkpoint.
        progress: show a bar.
        out_dir: folder of `eval.json`, `eval.csv`, `class_iou.png`, `class_dice.png`,
            `class_boundary_f.png` with `VAL.boundary`, and, with `VAL.visualize`, `pictures/`;
            default `result_eval` in `cfg.DIR`.
        keep: class ids of so many images, spread over the list, are kept in its folder `labels`
            (see `Kept`).
        rank, world: place in torchrun's process group (`join_process_group`). Each rank scores its
            share of the images on its devices; rank 0 alone prints and writes.

    Returns:
        What `eval.json` holds, on every rank: the figures of `ConfusionMatrix.compute` as plain
        numbers (NaN where undefined); `classes`, one dict per class; `failed`, one dict with
        `image` and `error` for every image that was left out.

    Raises:
        ValueError: nothing to evaluate, no image that could be, or a configuration that does not
            fit.
        FileNotFoundError: a list or the checkpoint is missing.
        ChildProcessError: a worker process died.
        TimeoutError: no worker process answered for VAL.timeout.
        WorkerError: a worker process failed.
        ConnectionError: another rank was lost.

    When a single process reads a file for VAL.timeout it is ended, with exit status 3 and a line
    that names the file.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1 process per device")
    if not devices:
        raise ValueError("devices is empty; give at least torch.device('cpu')")
    checkpoint = checkpoint or cfg.VAL.checkpoint
    split = build_split(cfg.DATASET, "val")
    count = len(split.records)
    classes = split.classes
    if model is None:
        # Found missing here, it is one clear line instead of one traceback per process.
        folder, name = resolve_checkpoint(cfg.DIR, checkpoint)
        folder.files(name)
        classes = model_classes(cfg, checkpoint)
        _compare_classes(classes, split.classes, quiet=rank > 0)
    out = Path(cfg.DIR) / "result_eval" if out_dir is None else Path(out_dir)
    if rank == 0:
        # Before the work: an evaluation that cannot be written is not worth its hours.
        out.mkdir(parents=True, exist_ok=True)
    pictures = out / "pictures" if cfg.VAL.visualize else None
    kept = Kept.of(out / "labels", keep, count) if keep else None
    chunks = _chunks(count, cfg.VAL.batch_size)[rank::world]
    places = [device for device in devices for _ in range(workers)][: max(1, len(chunks))]

    started = time.perf_counter()
    name = f"rank {rank}" if world > 1 else ""
    with (
        _Progress("evaluating", chunks, progress and rank == 0, tell=True) as on_result,
        reading_watchdog(cfg.VAL.timeout, name, "look at these files, or raise VAL.timeout"),
    ):
        if model is not None:
            data = val_dataset(cfg)
            gallery = _Gallery(data, pictures, classes.colors) if pictures else None
            scorer = _Scorer(model, data, cfg, devices[0], gallery, cfg.VAL.boundary, kept)
            parts = [run_here(partial(scorer.run, _lanes(devices[:1])), chunks, on_result)]
        else:
            lanes, processes = _lanes(places), len(places)
            jobs = [
                Job(cfg, checkpoint, device, lanes, processes, pictures, classes.colors, kept)
                for device in places
            ]
            parts = _parts(jobs, chunks, split.records, on_result)
    with results_of_ranks(rank, "scored its images", "VAL.timeout", cfg.VAL.timeout):
        whole = merged(sum(parts[1:], parts[0]), devices[0])
    if len(whole.bad) == count:
        image, reason = whole.failed[0]
        raise ValueError(f"none of the {count} images can be used; the first: {image}: {reason}")
    result = {
        "checkpoint": checkpoint if model is None else "",
        "images": count - len(whole.bad),
        "failed": [{"image": image, "error": reason} for image, reason in whole.failed],
        "imgSizes": list(DataOptions.read(with_scales(cfg.DATASET, cfg.VAL.imgSizes)).imgSizes),
        "flip": bool(cfg.VAL.flip),
        "window": list(cfg.VAL.window),
        "precision": cfg.VAL.precision,
        "processes": whole.processes,
        "seconds": time.perf_counter() - started,
        "seconds_per_image": whole.seconds / (count - len(whole.bad)),
        **summarize(whole.matrix, classes, whole.boundary),
    }
    if rank == 0:
        if line := single_class(whole.matrix, classes):
            log.warning("%s", line)
        print(format_report(result))
        write_report(result, classes, out)
        print(f"Figures in {out}")
    return result


def val_dataset(cfg: Config) -> ValDataset:
    """The validation samples of a configuration, as bytes at the scales of `VAL.imgSizes`."""
    split = build_split(cfg.DATASET, "val")
    options = with_scales(cfg.DATASET, cfg.VAL.imgSizes)
    root = cfg.DATASET.root_dataset
    return ValDataset(root, split.records, options, label_map=split.label_map, normalized=False)


def evaluate_model(
    module: SegmentationModule,
    dataset: ValDataset,
    cfg: Config,
    device: torch.device,
    *,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
    stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Score a model that is in memory, in this process; the model stays as it is.

    Args:
        module: on any device, in any mode.
        dataset: samples with labels, such as `val_dataset(cfg)`.
        cfg: its `VAL` keys batch_size, precision, compile, flip, tile, window and stride
            apply.
        device: where to compute.
        progress: show a bar.
        share: (rank, ranks): the images that are this process's to score. The shares of all ranks
            have no image in common and together hold every one; `merged` adds their results.
        stop: asked before the first image and after every one.

    Returns:
        What was counted; the caller reports what `failed`.

    Raises:
        Interrupted: `stop` returned true.
    """
    rank, world = share
    chunks = _chunks(len(dataset), cfg.VAL.batch_size)[rank::world]
    with _Progress("validating", chunks, progress, stop) as on_result:
        work = partial(_Scorer(module, dataset, cfg, device).run, _lanes([device]))
        result: Evaluation = run_here(work, chunks, on_result)
    return result


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


def _compare_classes(model: ClassTable, data: ClassTable, quiet: bool = False) -> None:
    """Warn, unless `quiet`, where the names of data's classes differ from those of a model.

    Raises:
        ValueError: the same classes have other numbers.
    """
    numbered = ClassTable.numbered(len(model)).names
    if model.names == data.names or numbered in (model.names, data.names):
        return
    k = next(k for k in range(len(model)) if model.names[k] != data.names[k])
    said = (
        f"class {k} of the checkpoint is {model.names[k]!r}, of DATASET.list_val {data.names[k]!r}"
    )
    if sorted(model.names) == sorted(data.names):
        raise ValueError(f"{said}: number the classes of the data as the checkpoint does")
    if not quiet:
        log.warning("%s: the table has the checkpoint's names", said)


class _Progress:
    """A bar that also reports the images that are left out, and asks whether to go on."""

    def __init__(
        self,
        title: str,
        chunks: Sequence[Chunk],
        shown: bool,
        stop: Callable[[], bool] | None = None,
        tell: bool = False,
    ) -> None:
        self.stop, self.tell = stop, tell
        total = sum(map(len, chunks))
        self.bar = tqdm(total=total, desc=title, unit="img", disable=not shown, leave=tell)

    def __enter__(self) -> Callable[[Scored], None]:
        self._go_on()
        return self._add

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _add(self, scored: Scored) -> None:
        count, bad = scored
        self.bar.update(count)
        for image, error in bad.values() if self.tell else ():
            log.warning("left out: %s: %s", image, error)
        self._go_on()

    def _go_on(self) -> None:
        if self.stop is not None and self.stop():
            raise Interrupted("the evaluation was asked to stop")


# ------------------------------------------------------------------------------ the work
def _chunks(count: int, size: int) -> list[Chunk]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _lanes(places: Sequence[torch.device]) -> int:
    """Images that each process computes side by side on the CPU, whose cores they share."""
    # torchrun gives every rank one thread, however many cores there are.
    ranks = local_ranks()
    cores = torch.get_num_threads() if ranks == 1 else fixed_threads() or cpu_count() // ranks
    return max(1, min(MAX_LANES, cores // len(places)))


def _parts(
    jobs: Sequence[Job],
    chunks: Sequence[Chunk],
    records: Sequence[Mapping[str, Any]],
    on_result: Callable[[Scored], None],
) -> list[Evaluation]:
    """What each job has scored; a single one in this process."""
    if len(jobs) == 1:
        return [run_here(partial(_work, jobs[0]), chunks, on_result)]
    first = jobs[0]
    on_cpu = first.device.type == "cpu"
    return run_pool(
        _work,
        jobs,
        chunks,
        on_result,
        describe=lambda chunk: ", ".join(str(records[i]["fpath_img"]) for i in chunk),
        ahead=first.lanes if on_cpu else Threads.of(first.device, first.processes).held,
        timeout=first.cfg.VAL.timeout,
    )


def _work(job: Job, tasks: Iterator[Chunk]) -> Generator[Scored, None, Evaluation]:
    """A process of its own: model and data are built where they are used."""
    use_device(job.device)
    module = load_model(job.cfg, job.checkpoint)
    data = val_dataset(job.cfg)
    gallery = _Gallery(data, job.pictures, job.colors) if job.pictures else None
    scorer = _Scorer(
        *(module, data, job.cfg, job.device),
        *(gallery, job.cfg.VAL.boundary, job.kept, job.processes),
    )
    return (yield from scorer.run(job.lanes, tasks))


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


class _Scorer:
    """From the number of an image to its share of the confusion matrix."""

    def __init__(
        self,
        module: SegmentationModule,
        dataset: ValDataset,
        cfg: Config,
        device: torch.device,
        gallery: _Gallery | None = None,
        boundary: bool = False,
        kept: Kept | None = None,
        processes: int = 1,
    ) -> None:
        self.predictor = Predictor(
            *(module, with_scales(cfg.DATASET, cfg.VAL.imgSizes), device),
            precision=cfg.VAL.precision,
            flip=cfg.VAL.flip,
            tile=cfg.VAL.tile,
            window=Sliding.of(cfg.VAL),
            compile=cfg.VAL.compile,
        )
        self.dataset, self.device = dataset, device
        self.gallery, self.kept = gallery, kept
        self.num_class = cfg.DATASET.num_class
        self.dtype = label_dtype(self.num_class)
        self.threads = Threads.of(device, processes)
        score = BoundaryScore(self.num_class) if boundary else None
        self.nothing = Evaluation(ConfusionMatrix(self.num_class), processes=0, boundary=score)

    def run(self, lanes: int, chunks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """Score chunks: yields what is to be told of each, returns the sum."""
        if self.device.type == "cpu":
            return (yield from self.side_by_side(lanes, chunks))
        return (yield from self.in_order(chunks))

    def side_by_side(
        self, lanes: int, chunks: Iterable[Chunk]
    ) -> Generator[Scored, None, Evaluation]:
        """Several chunks at a time, each by one thread, which reads, computes and counts."""
        total = replace(self.nothing.empty(), processes=1)
        threads = torch.get_num_threads()
        try:
            for chunk, scored in in_threads(
                self._scored, chunks, threads=lanes, ahead=lanes, initializer=_single_threaded
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
        parts = (self.nothing.boundary, self.gallery, self.kept)
        return any(part is not None for part in parts)

    def _finished(self, read: _Read, copies: Sequence[HostCopy]) -> Evaluation:
        """What is made of the class maps on the host."""
        part = self.nothing.empty()
        for group, copy in zip(read.groups, copies, strict=True):
            predicted = copy.wait()
            if self.kept is not None:
                self.kept.add(group.numbers, predicted)
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


class _Gallery:
    """Pictures of image, truth and prediction side by side, named after their images."""

    def __init__(self, dataset: ValDataset, folder: Path, colors: np.ndarray) -> None:
        root, records = dataset.root_dataset, dataset.list_sample
        files = [os.path.join(root, record["fpath_img"]) for record in records]
        base = common_base(os.path.dirname(os.path.abspath(file)) for file in files)
        # Worked out from the whole list, so that every process comes to the same names.
        stems = output_stems(files, base, folder, [".png"])
        self.paths = [Path(f"{stem}.png") for stem in stems]
        self.colors = colors

    def add(self, index: int, image: np.ndarray, truth: Tensor, predicted: Tensor) -> None:
        """Write the picture of image number `index`."""
        path = self.paths[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        maps = (color_encode(labels.numpy(), self.colors) for labels in (truth, predicted))
        write_png(path, side_by_side(image, *maps))
