"""Evaluation: one confusion matrix per process, merged by addition; bad files are left out.

With `VAL.boundary` there is a sum of boundary F-scores beside it, merged in the same way.

On a GPU images are read by threads and computed by one thread; the counts stay there to the end.
On the CPU every image is computed by a single thread, several images side by side: convolutions
round differently with every number of threads, and the figures must depend on neither the number
of processes nor the cores they have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mit_semseg.config import Options
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, ValDataset, build_split
from mit_semseg.engine.checkpoint import find_checkpoint, load_model, model_classes
from mit_semseg.engine.cpu import cpu_count, fixed_threads, local_ranks
from mit_semseg.engine.devices import use_device
from mit_semseg.engine.eval_report import format_report, result_of, single_class, write_report
from mit_semseg.engine.peers import results_of_ranks
from mit_semseg.engine.pool import run_here, run_pool
from mit_semseg.engine.scoring import (
    Chunk,
    Evaluation,
    Gallery,
    Pictures,
    SavedPredictions,
    Scored,
    Scorer,
    merged,
)
from mit_semseg.engine.transfer import Threads
from mit_semseg.engine.watchdog import reading_watchdog
from mit_semseg.models import SegmentationModule

log = logging.getLogger("mit_semseg")

# Most images a process works on at a time on the CPU, where each takes memory of its own.
MAX_CONCURRENT = 8


class Interrupted(Exception):
    """The caller's `stop` asked for an end before the work was done."""


@dataclass(frozen=True)
class Job:
    """What one evaluation process needs; small, since it is sent to every one of them."""

    options: Options
    checkpoint: str
    device: torch.device
    concurrent: int  # images that are computed side by side on the CPU
    processes: int  # among which the cores of this rank are divided
    pictures: Pictures | None
    saved: SavedPredictions | None


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
        out_dir: folder of `eval.json`, `eval.csv`, `confusion.png`, `class_iou.png`,
            `class_dice.png`, `class_boundary_f.png` with `VAL.boundary`, and, with
            `VAL.visualize`, `pictures/`; default `result_eval` in `cfg.DIR`.
        keep: class ids of so many images, spread over the list, are saved in its folder `labels`
            (see `SavedPredictions`).
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
    options = Options.read(cfg)
    checkpoint = checkpoint or options.VAL.checkpoint
    split = build_split(options.DATASET, "val")
    count, classes = len(split.records), split.classes
    if model is None:
        # Found missing here, it is one clear line instead of one traceback per process.
        find_checkpoint(options, checkpoint)
        classes = model_classes(options, checkpoint)
        _compare_classes(classes, split.classes, quiet=rank > 0)
    out = Path(options.DIR) / "result_eval" if out_dir is None else Path(out_dir)
    if rank == 0:
        # Before the work: an evaluation that cannot be written is not worth its hours.
        out.mkdir(parents=True, exist_ok=True)

    chunks = _chunks(count, options.VAL.batch_size)[rank::world]
    places = [device for device in devices for _ in range(workers)][: max(1, len(chunks))]
    if model is not None:
        places = places[:1]
    pictures = Pictures(out / "pictures", classes.colors) if options.VAL.visualize else None
    saved = SavedPredictions.evenly(out / "labels", keep, count) if keep else None
    jobs = [
        Job(options, checkpoint, device, _concurrent(places), len(places), pictures, saved)
        for device in places
    ]
    started = time.perf_counter()
    with (
        _Progress("evaluating", chunks, progress and rank == 0, warn=True) as on_result,
        reading_watchdog(
            options.VAL.timeout,
            f"rank {rank}" if world > 1 else "",
            "look at these files, or raise VAL.timeout",
        ),
    ):
        parts = _parts(jobs, model, chunks, split.records, on_result)
    with results_of_ranks(rank, "scored its images", "VAL.timeout", options.VAL.timeout):
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
        print(f"Figures in {out}")
    return result


def val_dataset(cfg: Options | Config) -> ValDataset:
    """The validation samples of a configuration, as bytes at the scales of `VAL.imgSizes`."""
    options = Options.read(cfg)
    data = options.DATASET.at_scales(options.VAL.imgSizes)
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
) -> Evaluation:
    """Score a model that is in memory, in this process; the model stays as it is.

    Args:
        module: on any device, in any mode.
        dataset: samples with labels, such as `val_dataset(cfg)`.
        cfg: its `VAL` keys batch_size, precision, compile, flip, tile, window and
            overlap apply.
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
    options = Options.read(cfg)
    rank, world = share
    chunks = _chunks(len(dataset), options.VAL.batch_size)[rank::world]
    with _Progress("validating", chunks, progress, stop) as on_result:
        scorer = Scorer(module, dataset, options, device, _concurrent([device]))
        result: Evaluation = run_here(scorer.run, chunks, on_result)
    return result


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
    """A bar, with `warn` also a line for each image that is left out; ends where `stop` says so."""

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
            log.warning("left out: %s: %s", image, error)
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop is not None and self.stop():
            raise Interrupted("the evaluation was asked to stop")


# ------------------------------------------------------------------------------ the work
def _chunks(count: int, size: int) -> list[Chunk]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _concurrent(places: Sequence[torch.device]) -> int:
    """Images that each process computes side by side on the CPU, whose cores they share."""
    # torchrun gives every rank one thread, however many cores there are.
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
    """What each job has scored; a single one in this process."""
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
    """One process: model and data are built where they are used."""
    options = job.options
    if model is None:
        use_device(job.device)
        model = load_model(options, job.checkpoint)
    data = val_dataset(options)
    scorer = Scorer(
        *(model, data, options, job.device, job.concurrent, job.processes),
        boundary=options.VAL.boundary,
        gallery=Gallery(data, job.pictures) if job.pictures else None,
        saved=job.saved,
    )
    return (yield from scorer.run(chunks))
