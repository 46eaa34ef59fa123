"""Evaluation: one confusion matrix per process, merged by addition; bad files are left out.

With `VAL.boundary` there is a sum of boundary F-scores beside it, merged in the same way.

On the CPU every image is computed by a single thread, several images side by side: convolutions
round differently with every number of threads, and the figures must depend on neither the number
of processes nor the cores they have.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, ValDataset, build_split
from mit_semseg.dataset.options import DataOptions, with_scales
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.engine.checkpoint import load_model, model_classes, resolve_checkpoint
from mit_semseg.engine.inputs import common_base, output_stems
from mit_semseg.engine.launch import autocast, cpu_count, fixed_threads, local_ranks
from mit_semseg.engine.pipeline import in_threads, stacked
from mit_semseg.engine.pool import run_here, run_pool
from mit_semseg.engine.watchdog import reading_watchdog
from mit_semseg.metrics import BoundaryScore, ConfusionMatrix
from mit_semseg.models import SegmentationModule
from mit_semseg.models.inference import inference_copy
from mit_semseg.models.tiles import Sliding
from mit_semseg.visualize import class_bars, color_encode

log = logging.getLogger("mit_semseg")

# Most images a process works on at a time on the CPU, where each takes memory of its own.
MAX_LANES = 8
# On a GPU one is computed while the others are read.
GPU_LANES = 3

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
    lanes: int  # images at work side by side
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
        rank, world: place in torchrun's process group (`launch.rank_devices`). Each rank scores its
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
        lanes = _lanes(places)
        if model is not None:
            data = val_dataset(cfg)
            gallery = _Gallery(data, pictures, classes.colors) if pictures else None
            scorer = _Scorer(model, data, cfg, devices[0], gallery, cfg.VAL.boundary, kept)
            work = partial(scorer.run, _lanes(devices[:1]))
            parts = [run_here(work, chunks, on_result)]
        elif len(places) == 1:
            job = Job(cfg, checkpoint, places[0], lanes, pictures, classes.colors, kept)
            parts = [run_here(partial(_work, job), chunks, on_result)]
        else:
            parts = run_pool(
                _work,
                [
                    Job(cfg, checkpoint, device, lanes, pictures, classes.colors, kept)
                    for device in places
                ],
                chunks,
                on_result,
                describe=lambda chunk: ", ".join(str(split.records[i]["fpath_img"]) for i in chunk),
                ahead=lanes,
                timeout=cfg.VAL.timeout,
            )
    try:
        whole = merged(sum(parts[1:], parts[0]), devices[0])
    except RuntimeError as error:
        if world == 1:
            raise
        raise ConnectionError(
            f"rank {rank} has scored its images, but lost another rank "
            f"({' '.join(str(error).split())[:120]}); what that one printed says why. Ranks wait "
            f"for each other for VAL.timeout {cfg.VAL.timeout:g} s"
        ) from error
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
        _write(result, classes, out)
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
    """Images at work side by side in each process: the cores are divided among the processes."""
    if any(place.type != "cpu" for place in places):
        return GPU_LANES
    # torchrun gives every rank one thread, however many cores there are.
    ranks = local_ranks()
    cores = torch.get_num_threads() if ranks == 1 else fixed_threads() or cpu_count() // ranks
    return max(1, min(MAX_LANES, cores // len(places)))


def _work(job: Job, tasks: Iterator[Chunk]) -> Generator[Scored, None, Evaluation]:
    """A process of its own: model and data are built where they are used."""
    module = load_model(job.cfg, job.checkpoint)
    data = val_dataset(job.cfg)
    gallery = _Gallery(data, job.pictures, job.colors) if job.pictures else None
    scorer = _Scorer(module, data, job.cfg, job.device, gallery, job.cfg.VAL.boundary, job.kept)
    return (yield from scorer.run(job.lanes, tasks))


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
    ) -> None:
        # Without graphs: images come in all sizes, and from several threads.
        self.module = inference_copy(
            module,
            device,
            Normalize.of(cfg.DATASET),
            cfg.VAL.compile,
            replay=False,
            tile=cfg.VAL.tile,
            window=Sliding.of(cfg.VAL),
        )
        self.dataset, self.cfg, self.device = dataset, cfg, device
        self.gallery, self.kept = gallery, kept
        num_class = cfg.DATASET.num_class
        scores = BoundaryScore(num_class) if boundary else None
        self.nothing = Evaluation(ConfusionMatrix(num_class), processes=0, boundary=scores)
        # One forward pass at a time on a GPU, whose memory must hold it.
        self.turn = Lock() if device.type != "cpu" else nullcontext()

    def run(self, lanes: int, tasks: Iterable[Chunk]) -> Generator[Scored, None, Evaluation]:
        """Score chunks: yields what is to be told of each, returns the sum."""
        total = replace(self.nothing.empty(), processes=1)
        threads = torch.get_num_threads()
        try:
            for chunk, scored in in_threads(
                self.score, tasks, threads=lanes, ahead=lanes, initializer=self._single_threaded
            ):
                part = scored.result()
                total += part
                yield len(chunk), part.bad
        finally:
            # torch keeps one number for all threads that have not computed yet.
            torch.set_num_threads(threads)
        return total

    def _single_threaded(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(1)

    def score(self, chunk: Chunk) -> Evaluation:
        """The evaluation of some images; those whose files cannot be used are left out."""
        part = self.nothing.empty()
        samples, part.bad = self._read(chunk)
        labels = {i: sample["seg_label"] for i, sample in samples.items()}
        numbers = list(samples)
        sizes = [(labels[i].shape[1], labels[i].shape[2]) for i in numbers]
        for positions, images in stacked([samples[i]["img_data"] for i in numbers], sizes):
            with self.turn:
                started = time.perf_counter()
                predicted = self._predict(images, sizes[positions[0]])
                if self.device.type == "cuda":  # the call returns before the GPU is done
                    torch.cuda.synchronize(self.device)
                part.seconds += time.perf_counter() - started
            # Counted where it was computed: only the counts come back from a GPU.
            indices = [numbers[position] for position in positions]
            truth = torch.cat([labels[i] for i in indices]).to(self.device)
            part.matrix.update(predicted, truth)
            if self.kept is not None:
                self.kept.add(indices, predicted)
            if part.boundary is None and self.gallery is None:
                continue
            for i, one in zip(indices, predicted.cpu(), strict=True):
                if part.boundary is not None:
                    part.boundary.update(one, labels[i][0])
                if self.gallery is not None:
                    self.gallery.add(i, samples[i], one)
        return part

    def _read(self, chunk: Chunk) -> tuple[dict[int, dict[str, Any]], dict[int, tuple[str, str]]]:
        """Samples by their number in the list, and (image, error) of those that cannot be read."""
        samples, bad = {}, {}
        for i in chunk:
            try:
                samples[i] = self.dataset[i]
            except (OSError, ValueError) as error:
                image = str(self.dataset.list_sample[i]["fpath_img"])
                bad[i] = image, _reason(error, image)
        return samples, bad

    @torch.no_grad()
    def _predict(self, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(N, H, W) class ids."""
        with autocast(self.device, self.cfg.VAL.precision):
            images = [image.to(self.device) for image in images]
            return self.module.predict(images, size, flip=self.cfg.VAL.flip)


def _reason(error: BaseException, image: str) -> str:
    """One line, without the name that stands in front of it anyway."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line.removeprefix(f"{image}: ")


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

    def add(self, index: int, sample: Mapping[str, Any], predicted: Tensor) -> None:
        """Write the picture of image number `index`."""
        path = self.paths[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        truth = color_encode(sample["seg_label"][0].numpy(), self.colors)
        picture = [sample["img_ori"], truth, color_encode(predicted.numpy(), self.colors)]
        Image.fromarray(np.concatenate(picture, axis=1)).save(path)


# ------------------------------------------------------------------------------ figures
FIGURES = (
    "mean_iou",
    "mean_iou_all_classes",
    "pixel_accuracy",
    "class_accuracy",
    "fw_iou",
    "mean_dice",
)


def summarize(
    matrix: ConfusionMatrix, classes: ClassTable, boundary: BoundaryScore | None = None
) -> dict[str, Any]:
    """The figures of a confusion matrix as plain numbers, and one dict per class.

    Returns:
        `mean_iou`, `mean_iou_all_classes`, `pixel_accuracy`, `class_accuracy`, `fw_iou`,
        `mean_dice`; `pixels`, the number of labelled ones; and `classes`, a list of `index`,
        `name`, `iou`, `dice`, `accuracy` (NaN where the class does not occur), `pixel_share` and
        `predicted_share`. With `boundary` also `mean_boundary_f`, and `boundary_f` of each class.
    """
    figures = matrix.compute()
    labelled, predicted = matrix.matrix.sum(1), matrix.matrix.sum(0)
    total = int(labelled.sum())
    rows = [
        {
            "index": k,
            "name": name,
            "iou": float(figures["iou"][k]),
            "dice": float(figures["dice"][k]),
            "accuracy": float(figures["recall"][k]),
            "pixel_share": int(labelled[k]) / total if total else math.nan,
            "predicted_share": int(predicted[k]) / total if total else math.nan,
        }
        for k, name in enumerate(classes.names)
    ]
    outlines = {} if boundary is None else boundary.compute()
    for row, score in zip(rows, outlines.pop("boundary_f", ())):
        row["boundary_f"] = float(score)
    return {
        **{key: float(figures[key]) for key in FIGURES},
        **outlines,
        "pixels": total,
        "classes": rows,
    }


def single_class(matrix: ConfusionMatrix, classes: ClassTable) -> str:
    """What to say when one class is predicted everywhere; "" when it is not."""
    labelled, predicted = matrix.matrix.sum(1), matrix.matrix.sum(0)
    if matrix.num_class == 1 or int((predicted > 0).sum()) != 1:
        return ""
    name = classes.names[int(predicted.argmax())]
    if int((labelled > 0).sum()) == 1:
        return (
            f"every labelled pixel is {classes.names[int(labelled.argmax())]}, and every one is "
            f"predicted as {name}: check DATASET.label_map, DATASET.label_offset and "
            "DATASET.ignore_label (mit-semseg data check)"
        )
    return (
        f"every pixel of all images is predicted as {name}: look at the masks (mit-semseg data "
        "check), train for longer or at a lower TRAIN.lr_encoder and TRAIN.lr_decoder, or set "
        "TRAIN.class_weights"
    )


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


# Of the table of classes: key -> title, as wide as its column, and how a figure is written.
COLUMNS = {
    "iou": ("    IoU", ".4f"),
    "dice": ("   Dice", ".4f"),
    "boundary_f": ("boundary F", ".4f"),
    "accuracy": ("accuracy", ".2%"),
    "pixel_share": (" pixels", ".2%"),
}


def format_report(result: Mapping[str, Any]) -> str:
    """The per-class table and the summary, as text; figures without meaning read `n/a`."""
    rows = result["classes"]
    width = max(len("class"), *(len(row["name"]) for row in rows))
    columns = [key for key in COLUMNS if key in rows[0]]
    titles = "".join(f"  {COLUMNS[key][0]}" for key in columns)
    lines = [f"{'#':>4}  {'class':<{width}}{titles}"]
    for row in rows:
        cells = "".join(f"  {_cell(row[key], *COLUMNS[key])}" for key in columns)
        lines.append(f"{row['index']:>4}  {row['name']:<{width}}{cells}")
    absent = sum(math.isnan(row["iou"]) for row in rows)
    window = ""
    if result.get("window"):
        window = ", in windows of {}x{}".format(*result["window"])
    outlines = ""
    if "mean_boundary_f" in result:
        outlines = f", mean boundary F-score: {_figure(result['mean_boundary_f'], '.4f')}"
    lines += [
        "",
        "[Eval Summary]:",
        f"Mean IoU: {result['mean_iou']:.4f}, Accuracy: {100 * result['pixel_accuracy']:.2f}%, "
        f"Inference Time: {result['seconds_per_image']:.4f}s",
        f"Mean IoU of all {len(rows)} classes: {result['mean_iou_all_classes']:.4f} "
        f"(as published: the {absent} absent ones count as 0)",
        f"Class accuracy: {100 * result['class_accuracy']:.2f}%, "
        f"frequency-weighted IoU: {result['fw_iou']:.4f}",
        f"Mean Dice: {result['mean_dice']:.4f}{outlines}",
        f"{result['images']} images, {result['pixels']} labelled pixels, scales "
        f"{', '.join(map(str, result['imgSizes']))}{', flipped too' if result['flip'] else ''}"
        f"{window}, "
        f"{result['seconds']:.1f} s in {result['processes']} "
        f"process{'es' if result['processes'] > 1 else ''}",
    ]
    if result["failed"]:
        failed = result["failed"]
        lines.append(f"{len(failed)} of {result['images'] + len(failed)} images failed:")
        lines += [f"  {one['image']}: {one['error']}" for one in failed]
    if not result["pixels"]:
        lines.append(
            "No pixel is labelled: check DATASET.label_offset and DATASET.ignore_label, or run "
            "`mit-semseg data check` on the list"
        )
    return "\n".join(lines)


def _cell(value: float, title: str, spec: str) -> str:
    return f"{_figure(value, spec):>{len(title)}}"


def _figure(value: float, spec: str) -> str:
    return "n/a" if math.isnan(value) else format(value, spec)


# Pictures: key -> what it is called.
BARS = {"iou": "IoU", "dice": "Dice", "boundary_f": "Boundary F-score"}


def _write(result: Mapping[str, Any], classes: ClassTable, out: Path) -> None:
    (out / "eval.json").write_text(json.dumps(_without_nan(result), indent=2) + "\n", "utf-8")
    with open(out / "eval.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(result["classes"][0]), lineterminator="\n")
        writer.writeheader()
        # An empty cell is what spreadsheets and pandas read as "no value".
        writer.writerows(_without_nan(row, none="") for row in result["classes"])
    for key, title in BARS.items():
        values = [row[key] for row in result["classes"] if key in row]
        if values:
            picture = out / f"class_{key}.png"
            class_bars(classes.names, values, classes.colors, picture, title=f"{title} per class")


def _without_nan(value: Any, none: Any = None) -> Any:
    """NaN is no JSON."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item, none) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item, none) for item in value]
    return none if isinstance(value, float) and math.isnan(value) else value
