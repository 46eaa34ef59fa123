"""Writes trained models for other libraries, and compares labels and times."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mit_semseg import scores
from mit_semseg.config import DataOptions
from mit_semseg.dataset.images import load_image
from mit_semseg.dataset.transforms import Normalize, as_batch, resize_image, scaled_inputs
from mit_semseg.engine.checkpoint import make_writable
from mit_semseg.engine.inputs import find_images
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.pretrained import Pretrained, load_pretrained
from mit_semseg.export import FORMATS, LABELS, SCORES, Description, ExportedModule, Format, Graph
from mit_semseg.export.graph import multiple_of
from mit_semseg.models import SegmentationModule

# Least share of pixels whose labels must be equal in float32. The others are pixels whose two best
# classes have nearly equal scores.
EQUAL = 0.999
# Images are compared at these factors of the recipe's first scale.
FACTORS = (1.0, 0.75, 0.5)
# Most images from which the ranges of the activations are measured.
CALIBRATION = 100


@dataclass(frozen=True)
class Compared:
    """An exported file beside this toolkit, on images of one size.

    Attributes:
        size: (height, width) of the images.
        equal: share of pixels with equal labels.
        ours, theirs: seconds per image, medians.
    """

    size: tuple[int, int]
    equal: float
    ours: float
    theirs: float


def export_model(
    source: str | Path,
    kind: str,
    out: str | Path | None = None,
    *,
    raw: bool = False,
    size: tuple[int, int] | None = None,
    resize: bool = False,
    photos: Sequence[np.ndarray],
    calibration: str = "",
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Write a trained model in a format of another library, and compare their labels.

    Nothing is left behind if the labels differ.

    Args:
        source: as for `load_pretrained`, with its errors.
        kind: a key of `export.FORMATS`.
        out: the file; default: the model's name in the working folder.
        raw: the graph takes normalised images and returns scores only.
        size: (height, width) of all images; None: any multiples of the padding constant.
        resize: images of `size` are resized in the graph to the recipe's first scale.
        photos: images whose labels are compared, (H, W, 3) uint8 each.
        calibration: folder of images for an additional INT8 file; "": none.
        say: prints lines.

    Returns:
        The files: float32, and INT8 if asked for.

    Raises:
        ValueError: a library is missing, the network cannot be converted, or labels differ.
        OSError: a file cannot be read or written.
    """
    form = FORMATS[kind]
    form.check()
    if resize and size is None:
        raise ValueError("--resize needs --size HEIGHT WIDTH, the size of the images")
    if not form.dynamic and size is None:
        raise ValueError(f"--format {kind} is for images of one size: give --size HEIGHT WIDTH")
    if resize and raw:
        raise ValueError("--resize is for bytes: leave out --raw")
    target = Path(out) if out else Path(f"{Path(str(source).rstrip('/')).name}{form.suffix}")
    if target.suffix != form.suffix:
        raise ValueError(f"--out is {target}: files of {kind} end in {form.suffix}")
    make_writable(target.parent, "--out")
    model = load_pretrained(source)
    if isinstance(model.module, ExportedModule):
        raise ValueError(f"{source} is an exported file already: give the model it was made from")
    graph = graph_of(model, raw=raw, size=size, resize=resize)
    reference = Predictor(
        model.module, graph.description.options.DATASET, "cpu", tile="off", window=None
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as folder:
        made = Path(folder) / target.name
        form.write(graph, made)
        files = [made]
        if reason := form.not_run_here():
            say(f"The labels are not compared: {reason}")
        else:
            _check_labels(compare(reference, ExportedModule(form, made), photos), form, say)
        if calibration:
            small = made.with_name(f"{target.stem}.int8{form.suffix}")
            form.quantize(made, small, calibration_inputs(calibration, graph.description))
            files.append(small)
            say(table(compare(reference, ExportedModule(form, small), photos), form, "INT8"))
        return [_moved(file, target.parent) for file in files]


def _check_labels(rows: Sequence[Compared], form: Format, say: Callable[[str], object]) -> None:
    say(table(rows, form))
    least = min(row.equal for row in rows)
    if least < EQUAL:
        raise ValueError(
            f"{form.name}: {least:.2%} of the labels are equal to those of this toolkit, less "
            f"than {EQUAL:.1%}: nothing was written"
        )


def graph_of(
    model: Pretrained,
    *,
    raw: bool = False,
    size: tuple[int, int] | None = None,
    resize: bool = False,
) -> Graph:
    """The graph that is exported; arguments as for `export_model`.

    Raises:
        ValueError: the options do not fit the model.
    """
    module, classes, options = model
    data = options.DATASET
    if options.MODEL.in_channels != 3 and not raw:
        raise ValueError(
            f"the model takes {options.MODEL.in_channels} channels, not RGB images: use --raw"
        )
    normalize = module.encoder.normalization() or Normalize.of(data)
    fixed = module.encoder.fixed_size
    if fixed is not None and size not in (None, fixed):
        raise ValueError(f"--size is {size}: the network takes images of {fixed} only")
    multiple = multiple_of(module, data.padding_constant)
    if size is not None and not resize and (size[0] % multiple or size[1] % multiple):
        raise ValueError(f"--size is {size}: use multiples of {multiple}, or --resize")
    data = replace(data, padding_constant=multiple)
    if not data.bands:
        # Of a model of another library, whose encoder knows its normalisation.
        data = replace(
            data,
            mean=tuple(normalize.mean.tolist()),
            std=tuple(normalize.std.tolist()),
            color_order=normalize.color_order,
            value_range=normalize.value_range,
        )
    description = Description(
        classes=classes,
        options=replace(options, DATASET=data),
        raw=raw,
        multiple=multiple,
        size=size or fixed,
        resize=resize,
        strides=tuple(module.encoder.strides),
        pools=bool(module.decoder.pool_scales),
        mirror_pairs=module.mirror_pairs,
        architecture=_name(module),
    )
    return Graph(module, normalize, description)


def inputs_of(image: np.ndarray, description: Description) -> Iterator[tuple[Tensor, Tensor]]:
    """An image as input of the exported graph, and of this toolkit's network.

    Yields:
        (1, C, H, W) uint8 each, or normalised float32 of a model without RGB images.
    """
    data = description.data()
    if description.size is not None:
        height, width = description.size
        given = resize_image(image, (width, height))
        inner = description.network_size()
        own = resize_image(given, (inner[1], inner[0]))
        yield as_batch(given), as_batch(own)
        return
    largest = min(scaled_inputs(image, first_scale(data), normalized=False)[0].shape[2:])
    for factor in FACTORS:
        short = max(int(largest * factor), 2 * description.multiple)
        scaled = replace(data, imgSizes=(short,), scales=())
        (pixels,) = scaled_inputs(image, scaled, normalized=False)
        yield pixels, pixels


def first_scale(data: DataOptions) -> DataOptions:
    """The options with the first of their scales only."""
    return replace(data, imgSizes=data.imgSizes[:1], scales=data.scales[:1])


def compare(
    reference: Predictor, exported: ExportedModule, photos: Sequence[np.ndarray]
) -> list[Compared]:
    """Labels and time of an exported file, beside this toolkit in float32.

    Args:
        reference: this toolkit.
        exported: the file.
        photos: (H, W, 3) uint8 each.

    Returns:
        One row per size of the graph's input.
    """
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for number, photo in enumerate(photos):
        for given, own in _inputs(photo, number, exported.description):
            size = (given.shape[2], given.shape[3])
            run = _theirs(exported, given)
            expected, ours = _timed(partial(_ours, reference, own, size))
            labels, theirs = _timed(run)
            equal = float((expected == labels).mean())
            found.setdefault(size, []).append((equal, ours, theirs))
    return [
        Compared(
            size,
            float(np.mean([row[0] for row in rows])),
            statistics.median(row[1] for row in rows),
            statistics.median(row[2] for row in rows),
        )
        for size, rows in found.items()
    ]


def _inputs(
    photo: np.ndarray, number: int, description: Description
) -> Iterator[tuple[Tensor, Tensor]]:
    channels = description.options.MODEL.in_channels
    if channels == 3 and not description.options.DATASET.bands:
        yield from inputs_of(photo, description)
        return
    # No photograph has the channels of this network: noise, whose labels vary as well.
    for given, _ in inputs_of(photo, description):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(1, channels, *given.shape[2:], generator=generator)
        yield noise, noise


def _ours(reference: Predictor, pixels: Tensor, size: tuple[int, int]) -> np.ndarray:
    labels: np.ndarray = reference.labels(reference.logits([pixels]), size).numpy()
    return labels


def _theirs(exported: ExportedModule, pixels: Tensor) -> Callable[[], np.ndarray]:
    """Computes the labels of an input with the exported file."""
    if exported.runner is None:
        exported.prepare()
    runner = exported.runner
    assert runner is not None
    array = exported.pixels(pixels)
    size = (pixels.shape[2], pixels.shape[3])
    if not exported.description.raw:
        return lambda: runner(array, [LABELS])[0]

    def run() -> np.ndarray:
        (logits,) = runner(array, [SCORES])
        labels: np.ndarray = scores.class_map([torch.from_numpy(logits)], size).numpy()
        return labels

    return run


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """The result of a call, and the seconds of a second one; the first one may have to prepare."""
    call()
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def calibration_inputs(folder: str, description: Description) -> Iterator[np.ndarray]:
    """Inputs of the graph from the images of a folder, at the recipe's first scale."""
    files, _ = find_images(folder)
    # Evenly spread, since neighbouring names are often frames of one video.
    step = max(len(files) / CALIBRATION, 1)
    for at in range(min(len(files), CALIBRATION)):
        given, _ = next(inputs_of(load_image(files[int(at * step)]), description))
        if description.raw:
            normalize = Normalize.of(description.options.DATASET)
            yield normalize(given).contiguous().numpy()
        else:
            yield given.permute(0, 2, 3, 1).contiguous().numpy()


def table(rows: Sequence[Compared], form: Format, precision: str = "fp32") -> str:
    """The comparison as text."""
    name = f"{form.name} {precision}"
    lines = [f"{'image':>11}  {'equal labels':>12}  {'ours fp32':>10}  {name:>16}  {'ratio':>7}"]
    for row in rows:
        height, width = row.size
        lines.append(
            f"{f'{width} x {height}':>11}  {row.equal:>12.3%}  {1000 * row.ours:>7.1f} ms  "
            f"{1000 * row.theirs:>13.1f} ms  {row.ours / row.theirs:>5.2f} x"
        )
    return "\n".join(lines)


def _moved(file: Path, folder: Path) -> Path:
    """Move a file, and those with the same stem, such as weights in a file of their own."""
    for part in file.parent.glob(f"{file.stem}.*"):
        if part.suffix == file.suffix or part.stem == file.stem or part.stem == file.name:
            place = folder / part.name
            if place.is_dir():
                shutil.rmtree(place)
            shutil.move(part, place)
    return folder / file.name


def _name(module: SegmentationModule) -> str:
    architecture: Any = getattr(module.encoder, "architecture", None)
    if architecture is not None:
        return str(architecture.source)
    return f"{type(module.encoder).__name__} with {type(module.decoder).__name__}"
