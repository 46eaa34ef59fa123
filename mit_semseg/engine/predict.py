"""Prediction for a file, a folder, a glob, a url or a list of images.

For each device, threads read images, one thread computes, and other threads render and write the
results. The memory of images between reading and writing is limited.

With `DATASET.depth` each image needs a depth image: `street_depth.png` beside `street.jpg`, or
`depth/street.png` beside its folder (see `dataset.records.find_depth`).
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from mit_semseg.dataset.loading import load_depth_beside, load_input, open_image
from mit_semseg.dataset.rasters import missing_pixels, write_labels
from mit_semseg.engine.checkpoint import find_checkpoint, load_model, model_classes
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.inputs import (
    fetched,
    find_images,
    output_stems,
    result_endings,
    without_depths,
)
from mit_semseg.engine.peers import found_by_rank_0, results_of_ranks
from mit_semseg.engine.pipeline import Budget, OrderedCalls, in_threads
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
from mit_semseg.engine.windows import needs_windows, predict_by_windows
from mit_semseg.errors import one_line
from mit_semseg.files import PathLike
from mit_semseg.precision import Precision
from mit_semseg.visualize.bands import picture
from mit_semseg.visualize.results import areas, save_result

# Most pixels of images between reading and writing. An image with more than _LARGE is processed
# alone.
_IN_MEMORY, _LARGE = 1 << 26, 1 << 24

# Number of a batch and its images.
Batch = tuple[int, Sequence["Task"]]


@dataclass(frozen=True)
class Task:
    """An image, its output files by kind, and its name in results: the path, or the url.

    `error` says why there is no image.
    """

    path: Path
    outputs: dict[str, Path]
    name: str
    error: str = ""


@dataclass(frozen=True)
class Job:
    """Picklable arguments of the process of one device."""

    options: Options
    checkpoint: str
    device: torch.device
    classes: ClassTable
    name: str = ""  # of the process, for messages
    processes: int = 1  # of this rank, which share its cores


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
    """Segment images, print the class areas and write the outputs of `TEST.save`.

    An image that cannot be downloaded, read or written is reported and skipped. Neighbouring images
    of the same size share a forward pass, up to `TEST.batch_size`.

    If reading a file takes longer than `TEST.timeout`, the process is ended with exit status 3 and
    a message that names the file.

    Args:
        cfg: the configuration.
        imgs: a file, a folder, a glob, a url, `-` for the bytes of an image on standard input, or
            a list of these.
        device: where to compute; with several devices each has a process and a share of the images.
        checkpoint: instead of `TEST.checkpoint`.
        result: folder of the results, instead of `TEST.result`.
        progress: show a progress bar.
        rank: in torchrun's process group (`join_process_group`). Rank 0 finds the images and prints
            the summary; each rank computes a share of the images.
        world: number of ranks.

    Returns:
        One dict per image, in order, on every rank: `image` (path or url), `outputs` (kind ->
        path), `areas` (class name -> share), `size` (width, height), `seconds`, `scales` (one tuple
        (width, height, seconds) per scale; seconds is None on a GPU); or `image` and `error`.

    Raises:
        FileNotFoundError: no images, or no checkpoint.
        ValueError: a wrong configuration.
        ChildProcessError: the process of one of several devices died.
        ConnectionError: another rank was lost.
    """
    options, devices = Options.read(cfg), _devices(device)
    Precision.of(options.TEST.precision, devices[0], "TEST.precision")
    checkpoint = checkpoint or options.TEST.checkpoint
    out = Path(options.TEST.result if result is None else result)
    with tempfile.TemporaryDirectory() as folder:
        tasks = found_by_rank_0(partial(_tasks, options, imgs, out, Path(folder)), rank, world)
        jobs = partial(_jobs, options, checkpoint, devices, rank, world)
        ordered = _results(options, tasks, jobs, progress, rank, world)
    if rank == 0:
        print_summary(ordered, out)
    return ordered


def _results(
    options: Options,
    tasks: Sequence[Task],
    jobs: Callable[[int], Sequence[Job]],
    progress: bool,
    rank: int,
    world: int,
) -> list[Result]:
    """The results of all ranks; `jobs` takes the number of batches of this one."""
    size = options.TEST.batch_size
    batches = [(i, tasks[i : i + size]) for i in range(0, len(tasks), size)]
    share = batches[rank::world]
    report = Report(share, progress and rank == 0)
    with report:
        _run(jobs(len(share)), share, report)
    parts = [report.results]
    if world > 1:
        parts = [{} for _ in range(world)]
        with results_of_ranks(rank, "segmented its images", "TEST.timeout", options.TEST.timeout):
            dist.all_gather_object(parts, report.results)
    whole = {number: results for part in parts for number, results in part.items()}
    return [one for number in sorted(whole) for one in whole[number]]


def _tasks(
    options: Options, imgs: PathLike | Iterable[PathLike], out: Path, folder: Path
) -> list[Task]:
    """The images with their output files; images of urls are downloaded to `folder`."""
    found = fetched(imgs, folder)
    files, base = find_images(found.entries, out, found.names)
    if options.DATASET.depth:
        files = without_depths(files)
    index = ".tif" if options.DATASET.bands else ".png"
    endings = result_endings(list(dict.fromkeys(options.TEST.save)), index)
    stems = output_stems(files, base, out, list(endings.values()), elsewhere=found.names)
    return [
        Task(
            file,
            {kind: Path(f"{stem}{ending}") for kind, ending in endings.items()},
            found.names.get(file, str(file)),
            found.errors.get(file, ""),
        )
        for file, stem in zip(files, stems, strict=True)
    ]


def _devices(device: torch.device | Sequence[torch.device]) -> list[torch.device]:
    if isinstance(device, str):
        raise ValueError(f"device is {device!r}; give torch.device({device!r}), or a list of them")
    devices = [device] if isinstance(device, torch.device) else list(device)
    if not devices:
        raise ValueError("device is empty; give at least torch.device('cpu')")
    return devices


def _jobs(
    options: Options,
    checkpoint: str,
    devices: Sequence[torch.device],
    rank: int,
    world: int,
    batches: int,
) -> list[Job]:
    """One job per device, for at most as many devices as there are batches."""
    devices = devices[:batches]
    names = [f"rank {rank}"] * len(devices) if world > 1 else [str(place) for place in devices]
    if len(devices) == world == 1:
        names = [""]
    # A missing checkpoint is one line here, and not an error in each process.
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
            describe=lambda batch: ", ".join(task.name for task in batch[1]),
            ahead=max(Threads.of(job.device, job.processes).held for job in jobs),
        )
    elif jobs:
        run_here(partial(_work, jobs[0]), batches, report.add)


# ------------------------------------------------------------------------------ one device
def _work(job: Job, batches: Iterator[Batch]) -> Generator[tuple[int, list[Result]], None, None]:
    """Run the job of one device."""
    use_device(job.device)
    advice = "check these files, or raise TEST.timeout"
    with reading_watchdog(job.options.TEST.timeout, job.name, advice):
        yield from _Pipeline(job).run(batches)


@dataclass
class _Read:
    """The images of a batch, or the errors of those that cannot be read."""

    number: int
    tasks: Sequence[Task]
    images: list[np.ndarray | None] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height)
    done: dict[int, Result] = field(default_factory=dict)  # of images computed by windows
    groups: list[_Group] = field(default_factory=list)
    memory: int = 0  # acquired from the budget


@dataclass
class _Group:
    """Images of a batch with inputs of equal shapes, which share a forward pass."""

    positions: list[int]
    size: tuple[int, int]
    scales: list[Tensor]


@dataclass
class _Computed:
    """Class maps of a group, being copied to the host."""

    positions: list[int]
    labels: HostCopy  # (N, H, W)
    watch: Stopwatch
    scales: list[tuple[int, int, float | None]]


class _Pipeline:
    """Reading, computing and writing for one device."""

    def __init__(self, job: Job) -> None:
        options, test = job.options, job.options.TEST
        self.save, self.classes, self.device = test.save, job.classes, job.device
        self.data = options.DATASET.at_scales(test.imgSizes, test.scales)
        module = load_model(options, job.checkpoint)
        self.predictor = Predictor.of(module, options.DATASET, test, job.device)
        self.threads = Threads.of(job.device, job.processes)
        self.budget = Budget(_IN_MEMORY)
        self.tuner = ThreadTuner(enabled=job.device.type == "cpu" and not test.compile)

    def run(self, batches: Iterable[Batch]) -> Generator[tuple[int, list[Result]], None, None]:
        """Yields the number of each batch with its results; computes in the calling thread."""
        # OpenCV's own threads would compete with the writers for the cores.
        cv2.setNumThreads(0)
        threads, enter = self.threads, partial(use_device, self.device)
        reading = in_threads(
            self._read, enumerate(batches), threads.readers, threads.read_ahead, enter
        )
        with (
            on_device(self.device),
            OrderedCalls[tuple[int, list[Result]]](
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
                self.budget.close()  # ends readers that wait for memory

    def _read(self, numbered: tuple[int, Batch]) -> _Read:
        """Read a batch; called in a reader thread."""
        turn, (number, tasks) = numbered
        count, errors = len(tasks), [task.error for task in tasks]
        read = _Read(number, tasks, [None] * count, errors, [(0, 0)] * count)
        read.memory = self.budget.acquire(turn, self._memory(read))
        inputs: list[list[Tensor]] = [[]] * len(tasks)
        for i, task in enumerate(tasks):
            if read.errors[i]:
                continue
            if needs_windows(read.sizes[i], self.data):
                continue
            try:
                image = load_input(task.path, self.data)
                size = (image.shape[1], image.shape[0])
                depth = load_depth_beside(task.path, self.data, size)
                inputs[i] = self.predictor.scales(image, depth)
            except (OSError, ValueError, MemoryError) as error:
                read.errors[i] = one_line(error).replace(str(task.path), task.name)
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
        """Pixels of a batch, from the headers of its files; the whole budget for a large image."""
        for i, task in enumerate(read.tasks):
            if task.error:
                continue
            try:
                with open_image(task.path, self.data) as file:
                    read.sizes[i] = file.size
            except (OSError, ValueError, MemoryError) as error:
                read.errors[i] = one_line(error).replace(str(task.path), task.name)
        # A pixel of RGB has 3 bytes, one of C bands 4 C.
        factor = 4 * len(self.data.bands) / 3 or 1
        counts = [math.ceil(math.prod(size) * factor) for size in read.sizes]
        return self.budget.total if max(counts) > _LARGE else sum(counts)

    def _compute(self, read: _Read) -> list[_Computed]:
        """Launch the computation of a batch."""
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
        read.groups.clear()  # frees the inputs
        for i, task in enumerate(read.tasks):
            if not read.errors[i] and needs_windows(read.sizes[i], self.data):
                try:
                    read.done[i] = predict_by_windows(
                        self.predictor, task.path, task.outputs, self.classes, self.data
                    )
                except (OSError, ValueError, MemoryError) as error:
                    read.errors[i] = one_line(error)
        return computed

    def _computed(self, group: _Group, read: _Read) -> _Computed:
        watch = Stopwatch(self.device)
        logits, seconds = self._logits(group.scales)
        labels = self.predictor.labels(logits, group.size, scores.label_dtype(len(self.classes)))
        copy = HostCopy(labels)
        watch.stop()
        if "prob" in self.save:
            # Not in a writer thread: the logits are too large to be kept.
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
        """Logits and seconds per scale; on a GPU, where timing would wait, without seconds."""
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
        """Render and write the results of a batch; called in a writer thread."""
        try:
            results: list[Result] = [
                read.done.get(i) or {"image": task.name, "error": error}
                for i, (task, error) in enumerate(zip(read.tasks, read.errors, strict=True))
            ]
            for group in computed:
                labels = group.labels.array()
                for n, i in enumerate(group.positions):
                    image = read.images[i]
                    if not read.errors[i] and image is not None:
                        results[i] = self._written(read.tasks[i], image, labels[n], group)
            return read.number, results
        finally:
            # There may be other references to the batch: free its memory before releasing it.
            read.images.clear()
            computed.clear()
            self.budget.release(read.memory)

    def _written(
        self, task: Task, image: np.ndarray, labels: np.ndarray, group: _Computed
    ) -> Result:
        offset, bands = int(self.data.label_offset), self.data.bands
        try:
            if bands:
                labels = np.where(missing_pixels(image), -1, labels.astype(np.int32))
                image = picture(image, bands)
            for kind, path in task.outputs.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "index" and bands:
                    write_labels(path, task.path, self.classes.colors, offset, [(None, labels)])
                elif kind != "prob":
                    save_result(path, kind, image, labels, self.classes, offset)
        except OSError as error:
            return {"image": task.name, "error": one_line(error)}
        except MemoryError as error:
            return {"image": task.name, "error": _no_memory(error)}
        return {
            "image": task.name,
            "size": (image.shape[1], image.shape[0]),
            "areas": areas(labels, self.classes.names),
            "seconds": group.watch.seconds() / len(group.positions),
            "scales": group.scales,
            "outputs": {kind: str(path) for kind, path in task.outputs.items()},
        }


def save_probabilities(path: PathLike, logits: Sequence[Tensor], size: tuple[int, int]) -> None:
    """Write class probabilities as a (K, H, W) float16 `.npy` file.

    Computed in bands of rows, so that the whole array is never in memory;
    `numpy.load(path, mmap_mode="r")` reads it in the same way.

    Args:
        path: the file.
        logits: one (1, K, h, w) tensor per scale.
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
