"""Prediction: a file, a folder, a glob or a list of images in, pictures and label files out.

On each device images are read by threads, computed by one thread, and drawn and written by threads
again, so that the device waits for neither. What is between reading and writing is bounded.

With `DATASET.depth` each image needs its depth: `street_depth.png` beside `street.jpg`, or
`depth/street.png` beside its folder (see `dataset.records.find_depth`). Depth files are no images.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mit_semseg import scores
from mit_semseg.config import Options
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.images import image_size, load_image
from mit_semseg.dataset.loading import load_depth_beside
from mit_semseg.engine.checkpoint import find_checkpoint, load_model, model_classes
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.inputs import (
    PathLike,
    find_images,
    output_stems,
    result_endings,
    without_depths,
)
from mit_semseg.engine.peers import found_by_rank_0, results_of_ranks
from mit_semseg.engine.pipeline import Budget, HandedOn, in_threads
from mit_semseg.engine.pool import run_here, run_pool
from mit_semseg.engine.predict_report import Report, Result, print_summary
from mit_semseg.engine.predictor import Predictor, out_of_memory
from mit_semseg.engine.threads import ThreadTuner, pixels
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
from mit_semseg.visualize.results import areas, save_result

# Pixels of images between reading and writing; a larger image than _LARGE is alone there.
_IN_MEMORY, _LARGE = 1 << 26, 1 << 24

# Number of a batch, and its images.
Batch = tuple[int, Sequence["Task"]]


@dataclass(frozen=True)
class Task:
    """One image and where its results go, by their kinds."""

    path: Path
    outputs: dict[str, Path]


@dataclass(frozen=True)
class Job:
    """What the process of one device needs; small, since it is sent there."""

    options: Options
    checkpoint: str
    device: torch.device
    classes: ClassTable
    name: str = ""  # of the process, in messages
    processes: int = 1  # among which the cores of this rank are divided


def predict(
    cfg: Options | Config,
    imgs: PathLike | Iterable[PathLike],
    device: torch.device | Sequence[torch.device],
    *,
    checkpoint: str | None = None,
    result: PathLike | None = None,
    progress: bool = True,
    rank: int = 0,
    world: int = 1,
) -> list[Result]:
    """Parse images, print the class areas and write what `TEST.save` asks for.

    A file that cannot be read or written is reported and does not stop the others.

    Args:
        cfg: the configuration; images of equal size among `TEST.batch_size` neighbours share a
            forward pass.
        imgs: a file, a folder, a glob, or a list of them.
        device: where to compute; several share the images, one process each.
        checkpoint: instead of `TEST.checkpoint`.
        result: folder of the results, instead of `TEST.result`.
        progress: show a bar.
        rank, world: place in torchrun's process group (`join_process_group`). Rank 0 looks for the
            images, each rank parses its share of them, rank 0 prints the summary.

    Returns:
        One dict per image, in order, on every rank: `image` (its path), `outputs` (kind -> path),
        `areas` (class name -> share), `size` (width, height), `seconds`, `scales` ((width, height,
        seconds) each; on a GPU without the seconds of each, None); or `image` and `error`.

    Raises:
        FileNotFoundError: no images, or no checkpoint.
        ValueError: a setting that cannot work.
        ChildProcessError: the process of one of several devices died.
        ConnectionError: another rank was lost.

    When a file is not read within TEST.timeout the process is ended, with exit status 3 and a
    line that names the file.
    """
    options = Options.read(cfg)
    checkpoint = checkpoint or options.TEST.checkpoint
    out = Path(options.TEST.result if result is None else result)
    tasks = found_by_rank_0(partial(_tasks, options, imgs, out), rank, world)
    size = options.TEST.batch_size
    batches = [(i, tasks[i : i + size]) for i in range(0, len(tasks), size)]
    share = batches[rank::world]
    report = Report(share, progress and rank == 0)
    with report:
        _run(_jobs(options, checkpoint, device, len(share), rank, world), share, report)
    parts = [report.results]
    if world > 1:
        parts = [{} for _ in range(world)]
        with results_of_ranks(rank, "parsed its images", "TEST.timeout", options.TEST.timeout):
            dist.all_gather_object(parts, report.results)
    whole = {number: results for part in parts for number, results in part.items()}
    ordered = [one for number in sorted(whole) for one in whole[number]]
    if rank == 0:
        print_summary(ordered, out)
    return ordered


def _tasks(options: Options, imgs: PathLike | Iterable[PathLike], out: Path) -> list[Task]:
    """The images, each with the names of its results."""
    files, base = find_images(imgs, skip=out)
    if options.DATASET.depth:
        files = without_depths(files)
    endings = result_endings(list(dict.fromkeys(options.TEST.save)))
    stems = output_stems(files, base, out, list(endings.values()))
    return [
        Task(file, {kind: Path(f"{stem}{ending}") for kind, ending in endings.items()})
        for file, stem in zip(files, stems, strict=True)
    ]


def _jobs(
    options: Options,
    checkpoint: str,
    device: torch.device | Sequence[torch.device],
    batches: int,
    rank: int,
    world: int,
) -> list[Job]:
    """One for each device, as long as there are batches for them."""
    devices = [device] if isinstance(device, torch.device) else list(device)
    if isinstance(device, str):
        raise ValueError(f"device is {device!r}; give torch.device({device!r}), or a list of them")
    if not devices:
        raise ValueError("device is empty; give at least torch.device('cpu')")
    devices = devices[:batches]
    names = [f"rank {rank}"] * len(devices) if world > 1 else [str(place) for place in devices]
    if len(devices) == world == 1:
        names = [""]
    # Found missing here, it is one clear line instead of one for each process.
    find_checkpoint(options, checkpoint)
    classes = model_classes(options, checkpoint)
    return [
        Job(options, checkpoint, place, classes, name, len(devices))
        for place, name in zip(devices, names, strict=True)
    ]


def _run(jobs: Sequence[Job], batches: Sequence[Batch], report: Report) -> None:
    if len(jobs) > 1:
        run_pool(
            _work,
            jobs,
            batches,
            report.add,
            describe=lambda batch: ", ".join(str(task.path) for task in batch[1]),
            ahead=max(Threads.of(job.device, job.processes).held for job in jobs),
        )
    elif jobs:
        run_here(partial(_work, jobs[0]), batches, report.add)


# ------------------------------------------------------------------------------ one device
def _work(job: Job, batches: Iterator[Batch]) -> Generator[tuple[int, list[Result]], None, None]:
    """Everything of one device, in a process of its own where there are several."""
    use_device(job.device)
    advice = "look at these files, or raise TEST.timeout"
    with reading_watchdog(job.options.TEST.timeout, job.name, advice):
        yield from _Pipeline(job).run(batches)


@dataclass
class _Read:
    """The images of one batch, or why they cannot be used."""

    number: int
    tasks: Sequence[Task]
    images: list[np.ndarray | None] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    groups: list[_Group] = field(default_factory=list)
    memory: int = 0  # to be given back to the budget


@dataclass
class _Group:
    """Images of a batch that are computed together: the scales of equal shape."""

    positions: list[int]
    size: tuple[int, int]
    scales: list[Tensor]


@dataclass
class _Computed:
    """Class maps of a group, on their way from the device."""

    positions: list[int]
    labels: HostCopy  # (N, H, W)
    watch: Stopwatch
    scales: list[tuple[int, int, float | None]]


class _Pipeline:
    """Reading, computing and writing on one device."""

    def __init__(self, job: Job) -> None:
        options, test = job.options, job.options.TEST
        self.save, self.classes, self.device = test.save, job.classes, job.device
        self.data = options.DATASET.at_scales(test.imgSizes)
        module = load_model(options, job.checkpoint)
        self.predictor = Predictor.of(module, options.DATASET, test, job.device)
        self.threads = Threads.of(job.device, job.processes)
        self.budget = Budget(_IN_MEMORY)
        self.tuner = ThreadTuner(enabled=job.device.type == "cpu" and not test.compile)

    def run(self, batches: Iterable[Batch]) -> Generator[tuple[int, list[Result]], None, None]:
        """Numbers of the batches with their results, in order; computes in the calling thread."""
        # OpenCV's own threads on top of the writers would fight for the cores.
        cv2.setNumThreads(0)
        threads, enter = self.threads, partial(use_device, self.device)
        reading = in_threads(
            self._read, enumerate(batches), threads.readers, threads.read_ahead, enter
        )
        with (
            on_device(self.device),
            HandedOn[tuple[int, list[Result]]](
                threads.writers, threads.unwritten, enter
            ) as writing,
            contextlib.closing(reading),
        ):
            try:
                for _, future in reading:
                    read = future.result()
                    computed = self._compute(read)
                    yield from writing.add(self._write, read, computed)
                yield from writing.rest()
            finally:
                self.budget.close()  # readers that wait for memory end

    def _read(self, numbered: tuple[int, Batch]) -> _Read:
        """Read a batch; in a reader."""
        turn, (number, tasks) = numbered
        read = _Read(number, tasks, [None] * len(tasks), [""] * len(tasks))
        read.memory = self.budget.take(turn, self._memory(read))
        inputs: list[list[Tensor]] = [[]] * len(tasks)
        for i, task in enumerate(tasks):
            if read.errors[i]:
                continue
            try:
                image = load_image(task.path)
                size = (image.shape[1], image.shape[0])
                depth = load_depth_beside(task.path, self.data, size)
                inputs[i] = self.predictor.scales(image, depth)
            except (OSError, ValueError, MemoryError) as error:
                read.errors[i] = one_line(error)
            else:
                read.images[i] = image
        images = [(i, image) for i, image in enumerate(read.images) if image is not None]
        sizes = [(image.shape[0], image.shape[1]) for _, image in images]
        for positions, scales in stacked([inputs[i] for i, _ in images], sizes):
            scales = [pinned(scale, self.device) for scale in scales]
            read.groups.append(
                _Group([images[p][0] for p in positions], sizes[positions[0]], scales)
            )
        return read

    def _memory(self, read: _Read) -> int:
        """Pixels of a batch, by the headers of its files; a large image is alone."""
        sizes = [0]
        for i, task in enumerate(read.tasks):
            try:
                sizes.append(math.prod(image_size(task.path)))
            except (OSError, ValueError, MemoryError) as error:
                read.errors[i] = one_line(error)
        return self.budget.total if max(sizes) > _LARGE else sum(sizes)

    def _compute(self, read: _Read) -> list[_Computed]:
        """Start what the device has to do for a batch."""
        computed = []
        for group in read.groups:
            try:
                with self.tuner.step(pixels(group.scales)):
                    computed.append(self._computed(group, read))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                for i in group.positions:
                    read.errors[i] = _no_memory(error)
        read.groups.clear()  # the scales are needed no more
        return computed

    def _computed(self, group: _Group, read: _Read) -> _Computed:
        watch = Stopwatch(self.device)
        logits, seconds = self._logits(group.scales)
        labels = self.predictor.labels(logits, group.size, scores.label_dtype(len(self.classes)))
        copy = HostCopy(labels)
        watch.stop()
        if "prob" in self.save:
            # Here, where the logits are: they are too large to wait for a writer.
            for n, i in enumerate(group.positions):
                try:
                    path = read.tasks[i].outputs["prob"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_probabilities(path, [x[n : n + 1] for x in logits], group.size)
                except OSError as error:
                    read.errors[i] = one_line(error)
        number = len(group.positions)
        scales = [
            (scale.shape[3], scale.shape[2], None if took is None else took / number)
            for scale, took in zip(group.scales, seconds, strict=True)
        ]
        return _Computed(group.positions, copy, watch, scales)

    def _logits(self, scales: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[float | None]]:
        """Of all scales, and the seconds of each where that can be told without waiting."""
        if self.device.type == "cuda":
            return self.predictor.logits(scales), [None] * len(scales)
        logits: list[Tensor] = []
        watches = []
        for scale in scales:
            watch = Stopwatch(self.device)
            logits += self.predictor.logits([scale])
            watches.append(watch.stop())
        return logits, [watch.seconds() for watch in watches]

    def _write(self, read: _Read, computed: list[_Computed]) -> tuple[int, list[Result]]:
        """Draw and write the results of a batch; in a writer."""
        try:
            results: list[Result] = [
                {"image": str(task.path), "error": error}
                for task, error in zip(read.tasks, read.errors, strict=True)
            ]
            for group in computed:
                labels = group.labels.array()
                for n, i in enumerate(group.positions):
                    image = read.images[i]
                    if not read.errors[i] and image is not None:
                        results[i] = self._written(read.tasks[i], image, labels[n], group)
            return read.number, results
        finally:
            # Others may still hold the batch, and the budget counts what it holds.
            read.images.clear()
            computed.clear()
            self.budget.give(read.memory)

    def _written(
        self, task: Task, image: np.ndarray, labels: np.ndarray, group: _Computed
    ) -> Result:
        offset = int(self.data.label_offset)
        try:
            for kind, path in task.outputs.items():
                if kind != "prob":
                    path.parent.mkdir(parents=True, exist_ok=True)
                    save_result(path, kind, image, labels, self.classes, offset)
        except OSError as error:
            return {"image": str(task.path), "error": one_line(error)}
        except MemoryError as error:
            return {"image": str(task.path), "error": _no_memory(error)}
        return {
            "image": str(task.path),
            "size": (image.shape[1], image.shape[0]),
            "areas": areas(labels, self.classes.names),
            "seconds": group.watch.seconds() / len(group.positions),
            "scales": group.scales,
            "outputs": {kind: str(path) for kind, path in task.outputs.items()},
        }


def save_probabilities(path: PathLike, logits: Sequence[Tensor], size: tuple[int, int]) -> None:
    """Write class probabilities as a (K, H, W) float16 `.npy`, band by band.

    All classes at full size are never in memory; `numpy.load(path, mmap_mode="r")` reads them so.

    Args:
        path: the file.
        logits: one (1, K, h, w) per scale.
        size: (H, W) of the image.
    """
    shape = (logits[0].shape[1], *size)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    for y0, band in scores.probability_bands(logits, size):
        file[:, y0 : y0 + band.shape[2]] = band[0].cpu().numpy()
    file.flush()


def _no_memory(error: BaseException) -> str:
    fix = "lower DATASET.imgMaxSize, TEST.imgSizes or TEST.batch_size"
    return f"out of memory: {fix} ({error})"
