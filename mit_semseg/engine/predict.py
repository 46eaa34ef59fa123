"""Prediction: a file, a folder, a glob or a list of images in, pictures and label files out.

Every result is named after its image: `street.jpg` gives `street.png`, below the result folder
at the same relative path as the image below the given folder. With several kinds in `TEST.save`
each file says which it is: `street_color.png`, `street_index.png`, `street_prob.npy`. Two images
that differ in extension only, or an image that already has the name of the result, give
`street_jpg.png`, so that results never collide and no input is ever overwritten.

With `DATASET.depth` each image needs its depth: `street_depth.png` beside `street.jpg`, or
`depth/street.png` beside its folder (see `dataset.records.find_depth`). Depth files are no images.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mit_semseg import scores
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, class_table
from mit_semseg.dataset.base import check_channels, load_depth_beside
from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.records import find_depth, image_extensions, is_depth
from mit_semseg.dataset.transforms import image_size, load_image
from mit_semseg.engine.checkpoint import CLASSES, load_model, resolve_checkpoint
from mit_semseg.engine.pool import in_threads
from mit_semseg.engine.predictor import Predictor, out_of_memory
from mit_semseg.engine.threads import ThreadTuner, pixels
from mit_semseg.engine.watchdog import reading_watchdog
from mit_semseg.models.tiles import Sliding
from mit_semseg.visualize import color_encode, legend, overlay

# Pillow identifies these by name but holds no decoder for them.
UNDECODABLE = {".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg"}
# Pixels that pictures are drawn by.
_BAND = 1 << 20
# Images of more pixels are not read while another is computed: both would be in memory.
_LARGE = 1 << 24
KINDS = ("color", "index", "overlay", "prob", "side", "legend")
PathLike = str | os.PathLike[str]


# ------------------------------------------------------------------------------ one image
def with_scales(dataset_cfg: Config, sizes: int | Sequence[int]) -> Config:
    """`cfg.DATASET` with other `imgSizes`, one or several; unchanged when `sizes` is empty."""
    if isinstance(sizes, Sequence) and not sizes:
        return dataset_cfg
    changed = dataset_cfg.clone()
    changed.imgSizes = list(DataOptions.read({"imgSizes": sizes}).imgSizes)
    return changed


def stacked(
    inputs: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Samples of equal shapes joined into batches; none is dropped.

    Args:
        inputs: per sample, one (1, 3, h, w) tensor per scale.
        sizes: per sample, (H, W) of its class map.

    Yields:
        Positions in `inputs`, and per scale their (N, 3, h, w) tensor.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (scales, size) in enumerate(zip(inputs, sizes, strict=True)):
        groups.setdefault((size, *(x.shape for x in scales)), []).append(i)
    for positions in groups.values():
        yield positions, [torch.cat(x) for x in zip(*(inputs[i] for i in positions), strict=True)]


def row_bands(height: int, width: int) -> Iterator[slice]:
    """Rows of a picture a million pixels at a time.

    NumPy looks up and counts by way of int64 copies; of a band these are small, and in the cache.
    """
    rows = max(1, _BAND // width)
    for y0 in range(0, height, rows):
        yield slice(y0, min(y0 + rows, height))


def class_counts(labels: np.ndarray, num_class: int) -> np.ndarray:
    """Pixels of each class, (num_class,) int64; other ids, such as -1, are not counted."""
    counts = np.zeros(num_class, dtype=np.int64)
    for rows in row_bands(*labels.shape):
        band = labels[rows]
        counts += np.bincount(band[(band >= 0) & (band < num_class)], minlength=num_class)
    return counts


def areas(labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Share of the image each class that occurs covers, in [0, 1], the largest first.

    Args:
        labels: (H, W) class ids; ids outside the names, such as -1, have no entry.
        names: class names; equal names are added up.
    """
    shares: Counter[str] = Counter()
    for name, count in zip(names, class_counts(labels, len(names)).tolist(), strict=True):
        if count:
            shares[name] += count / labels.size  # type: ignore[assignment]
    return dict(shares.most_common())


def index_image(labels: np.ndarray, colors: np.ndarray, offset: int = 0) -> Image.Image:
    """A label file: a palette PNG whose pixel values are class id + `offset`.

    With `DATASET.label_offset` as the offset it can be trained and evaluated on as it is. Beyond
    256 values it is a 16-bit grey PNG, which has no palette.

    Args:
        labels: (H, W) class ids, none below 0.
        colors: (K, 3) uint8 RGB.
        offset: what is added to every class id.
    """
    dtype = np.uint8 if len(colors) + offset <= 256 else np.uint16
    picture = Image.fromarray(labels.astype(dtype) + dtype(offset))
    if dtype is np.uint16:
        return picture
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[offset : offset + len(colors)] = colors
    picture.putpalette(palette.tobytes())
    return picture


def render(
    kind: str, image: np.ndarray, labels: np.ndarray, classes: ClassTable, offset: int = 0
) -> Image.Image:
    """One picture of a prediction.

    Args:
        kind: color, index, overlay, side (image beside its classes' colours) or legend.
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) class ids.
        classes: names and colours.
        offset: of index files, see `index_image`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "index":
        return index_image(labels, classes.colors, offset)
    if kind == "legend":
        return Image.fromarray(area_legend(labels, classes))
    if kind not in ("color", "overlay", "side"):
        choices = "color, index, overlay, side, legend"
        raise ValueError(f"{kind!r} is no kind of picture; choose {choices}")
    H, W = labels.shape
    picture = Image.new("RGB", (2 * W if kind == "side" else W, H))
    for rows in row_bands(H, W):
        band = color_encode(labels[rows], classes.colors)
        if kind == "overlay":
            band = overlay(image[rows], labels[rows], classes.colors, 0.5)
        elif kind == "side":
            band = np.concatenate([image[rows], band], axis=1)
        picture.paste(Image.fromarray(band), (0, rows.start))
    return picture


def area_legend(labels: np.ndarray, classes: ClassTable) -> np.ndarray:
    """Colour, name and area of the classes that occur, the largest first, as (h, w, 3) uint8."""
    counts = class_counts(labels, len(classes))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return legend(
        [classes.names[k] for k in order],
        classes.colors[order],
        [counts[k] / labels.size for k in order],
    )


# ------------------------------------------------------------------------------ names
def find_images(
    imgs: PathLike | Iterable[PathLike], skip: PathLike = ""
) -> tuple[list[Path], Path]:
    """Images that a file, a folder (searched recursively), a glob, or a list of these names.

    Args:
        imgs: what to look for; a file that is named itself may have any extension.
        skip: a result folder; what lies in it is left out when it lies inside a given folder.

    Returns:
        The files without duplicates, and the folder that their results keep their place below:
        the given folder, a file's folder, or what all the entries have in common.

    Raises:
        FileNotFoundError: an entry matches nothing, or no image; what is there is counted.
    """
    entries = [imgs] if isinstance(imgs, (str, os.PathLike)) else list(imgs)
    if not entries:
        raise FileNotFoundError("found 0 images: no path was given")
    found: dict[str, Path] = {}
    bases = []
    for entry in entries:
        base, files = _expand(os.fspath(entry), Path(skip).resolve() if skip else None)
        bases.append(base)
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), common_base(bases)


def without_depths(files: Sequence[Path]) -> list[Path]:
    """The colour images among some files, when depth images may lie beside them.

    Raises:
        FileNotFoundError: none of them has a depth image.
    """
    images = [file for file in files if not is_depth(file)]
    if not any(find_depth(file) for file in images):
        raise FileNotFoundError(
            f"none of {len(images)} images has depth, which DATASET.depth asks for: put "
            "x_depth.png beside x.jpg, or depth/x.png beside the folder of x.jpg"
        )
    return images


def _expand(entry: str, skip: Path | None) -> tuple[Path, list[Path]]:
    """The folder an entry stands for, and its images in order."""
    path = Path(entry).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        base, files = path, _walk(path, skip)
    elif glob.has_magic(str(path)):
        base = Path(*_plain_parts(path))
        files = []
        for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
            files += _walk(match, skip) if match.is_dir() else [match]
    else:
        raise FileNotFoundError(f"{entry}: no such file or folder")
    known = image_extensions() - UNDECODABLE
    images = [file for file in files if file.suffix.lower() in known]
    if not images:
        kinds = Counter(file.suffix.lower() or "extensionless" for file in files)
        saw = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        raise FileNotFoundError(f"{entry}: found 0 images; saw {saw or 'no files'}")
    return base, images


def _walk(folder: Path, skip: Path | None) -> list[Path]:
    """All files below a folder, but for hidden ones and a result folder inside it."""
    root = folder.resolve()
    files = []
    for directory, names, contents in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        here = Path(directory).resolve()
        if skip is not None and here != root and here == skip:
            names.clear()
            continue
        files += [Path(directory, name) for name in sorted(contents) if not name.startswith(".")]
    return files


def _plain_parts(path: Path) -> list[str]:
    """The leading folders of a glob that hold no wildcard."""
    parts: list[str] = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def common_base(folders: Iterable[PathLike]) -> Path:
    """The deepest folder that all of these lie in."""
    absolute = [os.path.abspath(folder) for folder in folders]
    return Path(os.path.commonpath(absolute))


def output_stems(
    files: Sequence[PathLike],
    base: PathLike,
    out: PathLike,
    endings: Sequence[str],
    inputs: Iterable[PathLike] | None = None,
) -> list[Path]:
    """Where each file's results go: a path to which `endings` are appended.

    Args:
        files: the images.
        base: folder they are named relative to.
        out: folder of the results.
        endings: such as `[".png"]` or `["_color.png", "_legend.png"]`.
        inputs: files that must stay as they are; default `files`.

    Returns:
        One path per file: `out/relative/stem`, or `out/relative/stem_ext` (and `_2`, `_3`, ...)
        where the stem is not unique or a result would fall on an input. Letter case counts as
        equal, since many file systems hold it so.
    """

    def key(path: str) -> str:
        return os.path.realpath(path).casefold()

    relatives = [
        Path(os.path.relpath(os.path.abspath(file), os.path.abspath(base))) for file in files
    ]
    shared = Counter(str(relative.with_suffix("")).casefold() for relative in relatives)
    taken = {key(os.fspath(file)) for file in (files if inputs is None else inputs)}
    stems = []
    for relative in relatives:
        plain = os.path.join(out, relative.with_suffix(""))
        marked = f"{plain}_{relative.suffix.lstrip('.') or 'file'}"
        alone = shared[str(relative.with_suffix("")).casefold()] == 1
        for stem in _candidates(plain, marked, alone):
            results = {key(stem + ending) for ending in endings}
            if not results & taken:
                break
        taken |= results
        stems.append(Path(stem))
    return stems


def _candidates(plain: str, marked: str, alone: bool) -> Iterator[str]:
    if alone:
        yield plain
    yield marked
    number = 2
    while True:
        yield f"{marked}_{number}"
        number += 1


def result_endings(kinds: Sequence[str]) -> dict[str, str]:
    """Kind -> end of its file's name; a single picture needs no mark, a legend always has one."""
    several = len([kind for kind in kinds if kind != "legend"]) > 1
    endings = {}
    for kind in kinds:
        mark = f"_{kind}" if several or kind == "legend" else ""
        endings[kind] = mark + (".npy" if kind == "prob" else ".png")
    return endings


# ------------------------------------------------------------------------------ the run
@dataclass
class _Task:
    """One image and where its results go."""

    path: Path
    outputs: dict[str, Path]


@dataclass
class _Loaded:
    """Images of one batch, or why they cannot be read."""

    images: list[np.ndarray | None] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def model_classes(cfg: Config, checkpoint: str) -> ClassTable:
    """Names and colours: those beside the checkpoint, else the configuration's data set's.

    Raises:
        ValueError: the table has not `DATASET.num_class` rows.
    """
    folder, _ = resolve_checkpoint(cfg.DIR, checkpoint)
    file = folder.path / CLASSES
    if not file.is_file():
        return class_table(cfg.DATASET)
    table = ClassTable.load(file)
    if len(table) != cfg.DATASET.num_class:
        raise ValueError(
            f"{file} has {len(table)} classes, but DATASET.num_class is {cfg.DATASET.num_class}; "
            "use the configuration this checkpoint was trained with"
        )
    return table


def predict(
    cfg: Config,
    imgs: PathLike | Iterable[PathLike],
    device: torch.device,
    *,
    checkpoint: str | None = None,
    result: PathLike | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Parse images, print the class areas and write what `TEST.save` asks for.

    A file that cannot be read or written is reported and does not stop the others.

    Args:
        cfg: the configuration; images of equal size among `TEST.batch_size` neighbours share a
            forward pass.
        imgs: a file, a folder, a glob, or a list of them.
        device: where to compute.
        checkpoint: instead of `TEST.checkpoint`.
        result: folder of the results, instead of `TEST.result`.
        progress: show a bar.

    Returns:
        One dict per image, in order: `image` (its path), `outputs` (kind -> path), `areas`
        (class name -> share), `size` (width, height), `seconds`; or `image` and `error`.

    Raises:
        FileNotFoundError: no images, or no checkpoint.
        ValueError: a setting that cannot work.

    When a file is not read within TEST.timeout the process is ended, with exit status 3 and a
    line that names the file.
    """
    checkpoint = checkpoint or cfg.TEST.checkpoint
    out = Path(cfg.TEST.result if result is None else result)
    kinds = list(dict.fromkeys(cfg.TEST.save))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"TEST.save is {list(cfg.TEST.save)}; choose from {', '.join(KINDS)}")
    check_channels(cfg.MODEL.in_channels, cfg.DATASET)
    files, base = find_images(imgs, skip=out)
    if cfg.DATASET.depth:
        files = without_depths(files)
    endings = result_endings(kinds)
    stems = output_stems(files, base, out, list(endings.values()))
    tasks = [
        _Task(file, {kind: Path(f"{stem}{ending}") for kind, ending in endings.items()})
        for file, stem in zip(files, stems, strict=True)
    ]
    classes = model_classes(cfg, checkpoint)
    predictor = Predictor(
        load_model(cfg, checkpoint),
        with_scales(cfg.DATASET, cfg.TEST.imgSizes),
        device,
        precision=cfg.TEST.precision,
        flip=cfg.TEST.flip,
        tile=cfg.TEST.tile,
        window=Sliding.of(cfg.TEST),
        compile=cfg.TEST.compile,
    )
    runner = _Runner(cfg, predictor, classes)
    size = cfg.TEST.batch_size
    batches = [tasks[i : i + size] for i in range(0, len(tasks), size)]
    results: list[dict[str, Any]] = []
    with (
        tqdm(total=len(tasks), desc="predicting", unit="img", disable=not progress) as bar,
        reading_watchdog(cfg.TEST.timeout, "", "look at these files, or raise TEST.timeout"),
    ):
        for batch, loaded in in_threads(runner.load, batches):
            for one in runner.run(batch, loaded.result()):
                results.append(one)
                bar.update()
    _report(results, out)
    return results


class _Runner:
    """What stays the same from image to image."""

    def __init__(self, cfg: Config, predictor: Predictor, classes: ClassTable) -> None:
        self.cfg, self.predictor, self.classes = cfg, predictor, classes
        self.computing = Lock()
        self.threads = ThreadTuner(enabled=predictor.device.type == "cpu" and not cfg.TEST.compile)

    def load(self, batch: Sequence[_Task]) -> _Loaded:
        """Read the images of a batch; runs in a thread, while the one before is computed."""
        loaded = _Loaded()
        for task in batch:
            try:
                large = math.prod(image_size(task.path)) > _LARGE
                with self.computing if large else contextlib.nullcontext():
                    image = load_image(task.path)
                    size = (image.shape[1], image.shape[0])
                    depth = load_depth_beside(
                        task.path, DataOptions.read(self.predictor.options), size
                    )
                    inputs = self.predictor.scales(image, depth)
            except (OSError, ValueError, MemoryError) as error:
                loaded.images.append(None)
                loaded.inputs.append([])
                loaded.errors.append(_reason(error))
            else:
                loaded.images.append(image)
                loaded.inputs.append(inputs)
                loaded.errors.append("")
        return loaded

    def run(self, batch: Sequence[_Task], loaded: _Loaded) -> list[dict[str, Any]]:
        """Results of a batch, in its order."""
        results: list[dict[str, Any]] = [
            {"image": str(task.path), "error": error}
            for task, error in zip(batch, loaded.errors, strict=True)
        ]
        good = [i for i, error in enumerate(loaded.errors) if not error]
        inputs = [loaded.inputs[i] for i in good]
        sizes = [_size(loaded.images[i]) for i in good]
        for positions, images in stacked(inputs, sizes):
            group = [good[p] for p in positions]
            try:
                with self.computing:
                    done = self._group([(batch[i], loaded.images[i]) for i in group], images)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                fix = "lower DATASET.imgMaxSize, TEST.imgSizes or TEST.batch_size"
                done = [
                    {"image": str(batch[i].path), "error": f"out of memory: {fix} ({error})"}
                    for i in group
                ]
            for i, one in zip(group, done, strict=True):
                results[i] = one
        return results

    def _group(
        self, group: Sequence[tuple[_Task, np.ndarray | None]], images: Sequence[Tensor]
    ) -> list[dict[str, Any]]:
        size = _size(group[0][1])
        started = time.perf_counter()
        dtype = scores.label_dtype(len(self.classes))
        with self.threads.step(pixels(images)):
            logits = self.predictor.logits(images)
            labels = self.predictor.labels(logits, size, dtype).cpu().numpy()
        if "prob" not in self.cfg.TEST.save:
            logits.clear()
        elapsed = (time.perf_counter() - started) / len(group)
        results = []
        for n, (task, image) in enumerate(group):
            assert image is not None
            one: dict[str, Any] = {
                "image": str(task.path),
                "size": (size[1], size[0]),
                "areas": areas(labels[n], self.classes.names),
                "seconds": elapsed,
                "outputs": {kind: str(path) for kind, path in task.outputs.items()},
            }
            tqdm.write(_areas_text(one))
            tqdm.write(f"  {size[1]}x{size[0]} pixels in {elapsed:.3f} s")
            try:
                self._save(task, image, labels[n], [x[n : n + 1] for x in logits])
            except OSError as error:
                one = {"image": str(task.path), "error": _reason(error)}
            results.append(one)
        return results

    def _save(
        self, task: _Task, image: np.ndarray, labels: np.ndarray, logits: Sequence[Tensor]
    ) -> None:
        offset = int(self.cfg.DATASET.label_offset)
        for kind, path in task.outputs.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "prob":
                save_probabilities(path, logits, _size(image))
            else:
                render(kind, image, labels, self.classes, offset).save(path)


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


def _areas_text(result: Mapping[str, Any]) -> str:
    lines = [f"Predictions in [{result['image']}]:"]
    for name, share in result["areas"].items():
        if 100 * share > 0.1:
            lines.append(f"  {name}: {100 * share:.2f}%")
    return "\n".join(lines)


def _report(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    failed = [one for one in results if "error" in one]
    done = len(results) - len(failed)
    if done:
        seconds = sum(one.get("seconds", 0.0) for one in results) / done
        print(
            f"{done} image{'s' if done > 1 else ''} parsed, {seconds:.3f} s each; results in {out}"
        )
    if failed:
        print(f"{len(failed)} of {len(results)} images failed:")
        for one in failed:
            # Most messages name the file themselves.
            print(f"  {one['image']}: {one['error'].removeprefix(one['image'] + ': ')}")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(image: np.ndarray | None) -> tuple[int, int]:
    assert image is not None
    return image.shape[0], image.shape[1]
