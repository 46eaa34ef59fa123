"""Evaluation: one confusion matrix per process, merged by addition.

With `VAL.boundary` boundary F-scores are summed and merged in the same way.

On a GPU, threads read images, one thread computes, and the counts stay on the device until the end.
On the CPU each image is computed by a single thread, and several images concurrently: convolutions
round differently with each number of threads, and the metrics must not depend on the number of
processes or cores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mit_semseg.config import Options
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, ValDataset, build_split
from mit_semseg.engine.checkpoint import find_checkpoint, load_model, model_classes
from mit_semseg.engine.cpu import cpu_count, fixed_threads, local_ranks
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.eval_page import write_eval_page, write_images
from mit_semseg.engine.eval_report import format_report, result_of, single_class, write_report
from mit_semseg.engine.peers import results_of_ranks
from mit_semseg.engine.pool import run_here, run_pool
from mit_semseg.engine.scoring import (
    Chunk,
    Evaluation,
    Figures,
    FigureWriter,
    SavedPredictions,
    Scored,
    Scorer,
    merged,
)
from mit_semseg.engine.transfer import Threads
from mit_semseg.engine.watchdog import reading_watchdog
from mit_semseg.models import SegmentationModule
from mit_semseg.precision import Precision

log = logging.getLogger("mit_semseg")

# Most images that a process computes concurrently on the CPU, which limits its memory.
MAX_CONCURRENT = 8


class Interrupted(Exception):
    """The caller's `stop` returned true."""


@dataclass(frozen=True)
class Job:
    """Picklable arguments of an evaluation process."""

    options: Options
    checkpoint: str
    device: torch.device
    concurrent: int  # images computed concurrently on the CPU
    processes: int  # of this rank, which share its cores
    figures: tuple[Path, np.ndarray] | None  # folder, and colours of the classes
    saved: SavedPredictions | None
    report: bool


def evaluate(
    cfg: Options | Config,
    devices: Sequence[torch.device],
    workers: int = 1,
    *,
    checkpoint: str | None = None,
    model: SegmentationModule | None = None,
    progress: bool = True,
    out_dir: str | Path | None = None,
    keep: int = 0,
    report: bool = False,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Evaluate a model on the validation list, print the table and write the results.

    The metrics do not depend on the number of processes. Neighbouring images in the list that have
    the same size share a forward pass, up to `VAL.batch_size`. An image or mask that cannot be used
    is reported and skipped.

    If a single process takes longer than `VAL.timeout` to read a file, it is ended with exit
    status 3 and a message that names the file.

    Args:
        cfg: the configuration.
        devices: where to compute; one process each.
        workers: processes per device. On the CPU they share the cores.
        checkpoint: instead of `VAL.checkpoint`.
        model: evaluated instead of a checkpoint, in this process on the first device.
        progress: show a progress bar.
        out_dir: folder of `eval.json`, `eval.csv`, `confusion.png`, `class_iou.png`,
            `class_dice.png`, with `VAL.boundary` `class_boundary_f.png`, and with `VAL.visualize`
            `pictures/`; default `result_eval` in `cfg.DIR`.
        keep: number of images, evenly spread over the list, whose predicted class ids are saved in
            the subfolder `labels` (see `SavedPredictions`).
        report: also compute calibration and the metrics of each image, and write `report.html` and
            `images.csv`.
        rank: in torchrun's process group (`join_process_group`). Each rank evaluates a share of the
            images on its devices; rank 0 prints and writes.
        world: number of ranks.

    Returns:
        The content of `eval.json`, on every rank: the metrics of `ConfusionMatrix.compute` as plain
        numbers (NaN if undefined); `classes`, one dict per class; `failed`, one dict with `image`
        and `error` for each skipped image.

    Raises:
        ValueError: no images, none that can be used, or a wrong configuration.
        FileNotFoundError: a list or the checkpoint is missing.
        ChildProcessError: a worker process died.
        TimeoutError: no result from any worker process for `VAL.timeout`.
        WorkerError: a worker process failed.
        ConnectionError: another rank was lost.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1 process per device")
    if not devices:
        raise ValueError("devices is empty; give at least torch.device('cpu')")
    options = Options.read(cfg)
    Precision.of(options.VAL.precision, devices[0], "VAL.precision")
    checkpoint = checkpoint or options.VAL.checkpoint
    split = build_split(options.DATASET, "val")
    count, classes = len(split.records), split.classes
    if model is None:
        # A missing checkpoint is one line here, and not an error in each process.
        find_checkpoint(options, checkpoint)
        classes = model_classes(options, checkpoint)
        _compare_classes(classes, split.classes, quiet=rank > 0)
    out = Path(options.DIR) / "result_eval" if out_dir is None else Path(out_dir)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)

    chunks = _chunks(count, options.VAL.batch_size)[rank::world]
    places = [device for device in devices for _ in range(workers)][: max(1, len(chunks))]
    if model is not None:
        places = places[:1]
    figures = (out / "pictures", classes.colors) if options.VAL.visualize else None
    saved = SavedPredictions.evenly(out / "labels", keep, count) if keep else None
    jobs = [
        Job(options, checkpoint, device, _concurrent(places), len(places), figures, saved, report)
        for device in places
    ]
    started = time.perf_counter()
    with (
        _Progress("evaluating", chunks, progress and rank == 0, warn=True) as on_result,
        reading_watchdog(
            options.VAL.timeout,
            f"rank {rank}" if world > 1 else "",
            "check these files, or raise VAL.timeout",
        ),
    ):
        parts = _parts(jobs, model, chunks, split.records, on_result)
    with results_of_ranks(rank, "evaluated its images", "VAL.timeout", options.VAL.timeout):
        whole = merged(sum(parts[1:], parts[0]), devices[0])
    if len(whole.bad) == count:
        image, reason = whole.failed[0]
        raise ValueError(f"none of the {count} images can be used; the first: {image}: {reason}")

    seconds = time.perf_counter() - started
    result = result_of(whole, count, seconds, options, classes, checkpoint if model is None else "")
    if rank == 0:
        if line := single_class(whole.matrix, classes):
            log.warning("%s", line)
        print(format_report(result))
        write_report(result, whole.matrix, classes, out)
        if whole.report is not None:
            write_images(out / "images.csv", whole.report, split)
            title = f"Evaluation of {options.MODEL.name}"
            shown = (whole.matrix, whole.report, split, classes, title, options.DATASET)
            write_eval_page(out / "report.html", result, *shown)
        print(f"Results in {out}")
    return result


def val_dataset(cfg: Options | Config) -> ValDataset:
    """The validation data of a configuration: uint8 images at the sizes of `VAL`."""
    options = Options.read(cfg)
    data = options.DATASET.at_scales(options.VAL.imgSizes, options.VAL.scales)
    split = build_split(data, "val")
    return ValDataset(
        data.root_dataset, split.records, data, label_map=split.label_map, normalized=False
    )


def evaluate_model(
    module: SegmentationModule,
    dataset: ValDataset,
    cfg: Options | Config,
    device: torch.device,
    *,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
    stop: Callable[[], bool] | None = None,
    figures: Figures | None = None,
) -> Evaluation:
    """Evaluate a model in this process; the model itself is not modified.

    Args:
        module: on any device, in any mode.
        dataset: samples with labels, for example `val_dataset(cfg)`.
        cfg: its `VAL` keys batch_size, precision, compile, flip, tile, window and overlap are used.
        device: where to compute.
        progress: show a progress bar.
        share: (rank, number of ranks): evaluate this rank's share of the images; `merged` adds the
            results of all ranks.
        stop: called before the first image and after each image.
        figures: takes the results of every image.

    Returns:
        The counts; `failed` lists skipped images, which are not reported here.

    Raises:
        Interrupted: `stop` returned true.
    """
    options = Options.read(cfg)
    rank, world = share
    chunks = _chunks(len(dataset), options.VAL.batch_size)[rank::world]
    with _Progress("validating", chunks, progress, stop) as on_result:
        scorer = Scorer(module, dataset, options, device, _concurrent([device]), figures=figures)
        result: Evaluation = run_here(scorer.run, chunks, on_result)
    return result


def _compare_classes(model: ClassTable, data: ClassTable, quiet: bool = False) -> None:
    """Warn, unless `quiet`, if the class names of data and model differ.

    Raises:
        ValueError: they have the same classes in another order.
    """
    numbered = ClassTable.numbered(len(model)).names
    if model.names == data.names or numbered in (model.names, data.names):
        return
    k = next(k for k in range(len(model)) if model.names[k] != data.names[k])
    difference = (
        f"class {k} is {model.names[k]!r} in the checkpoint and {data.names[k]!r} in "
        "DATASET.list_val"
    )
    if sorted(model.names) == sorted(data.names):
        raise ValueError(f"{difference}: use the class order of the checkpoint")
    if not quiet:
        log.warning("%s: the results use the names of the checkpoint", difference)


class _Progress:
    """A progress bar; with `warn` also a warning per skipped image. Raises if `stop` is true."""

    def __init__(
        self,
        title: str,
        chunks: Sequence[Chunk],
        shown: bool,
        stop: Callable[[], bool] | None = None,
        warn: bool = False,
    ) -> None:
        self.stop, self.warn = stop, warn
        total = sum(map(len, chunks))
        self.bar = tqdm(total=total, desc=title, unit="img", disable=not shown, leave=warn)

    def __enter__(self) -> Callable[[Scored], None]:
        self._check_stop()
        return self._add

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _add(self, scored: Scored) -> None:
        count, bad = scored
        self.bar.update(count)
        for image, error in bad.values() if self.warn else ():
            log.warning("skipped: %s: %s", image, error)
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop is not None and self.stop():
            raise Interrupted("the evaluation was stopped")


# ------------------------------------------------------------------------------ processes
def _chunks(count: int, size: int) -> list[Chunk]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _concurrent(places: Sequence[torch.device]) -> int:
    """Number of images that each process computes concurrently on the CPU."""
    # torchrun sets one thread per rank, for any number of cores.
    ranks = local_ranks()
    cores = torch.get_num_threads() if ranks == 1 else fixed_threads() or cpu_count() // ranks
    return max(1, min(MAX_CONCURRENT, cores // len(places)))


def _parts(
    jobs: Sequence[Job],
    model: SegmentationModule | None,
    chunks: Sequence[Chunk],
    records: Sequence[Mapping[str, Any]],
    on_result: Callable[[Scored], None],
) -> list[Evaluation]:
    """Run the jobs, a single one in this process; returns their results."""
    first = jobs[0]
    if len(jobs) == 1:
        return [run_here(partial(_work, first, model=model), chunks, on_result)]
    on_cpu = first.device.type == "cpu"
    return run_pool(
        _work,
        jobs,
        chunks,
        on_result,
        describe=lambda chunk: ", ".join(str(records[i]["fpath_img"]) for i in chunk),
        ahead=first.concurrent if on_cpu else Threads.of(first.device, first.processes).held,
        timeout=first.options.VAL.timeout,
    )


def _work(
    job: Job, chunks: Iterator[Chunk], model: SegmentationModule | None = None
) -> Generator[Scored, None, Evaluation]:
    """Run a job: load model and data, and score chunks."""
    options = job.options
    if model is None:
        use_device(job.device)
        model = load_model(options, job.checkpoint)
    data = val_dataset(options)
    scorer = Scorer(
        *(model, data, options, job.device, job.concurrent, job.processes),
        boundary=options.VAL.boundary,
        figures=FigureWriter(data, *job.figures) if job.figures else None,
        saved=job.saved,
        report=job.report,
    )
    return (yield from scorer.run(chunks))
