"""`mit-semseg bench --backends`: one model in this toolkit and in exported files, on the CPU."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mit_semseg import __version__, shipped
from mit_semseg.demo.photos import pictures
from mit_semseg.engine.devices import machine
from mit_semseg.engine.export import calibration_inputs, graph_of, inputs_of
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.pretrained import load_pretrained
from mit_semseg.export import FORMATS, ExportedModule
from mit_semseg.precision import has_fast_bf16
from mit_semseg.visualize import ratio_bars

# Formats that are measured, with the precisions in which their files are run.
SIDES = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}
ROUNDS = 7
# Images that are measured, and more from which INT8 is calibrated.
IMAGES, CALIBRATED = 2, 12


@dataclass(frozen=True)
class Side:
    """One way to compute labels.

    Attributes:
        name: what computes, in which precision.
        seconds: per image, median.
        ratio: how many times as fast as this toolkit in its automatic precision.
        equal: share of pixels with the labels of this toolkit in float32.
    """

    name: str
    seconds: float
    ratio: float
    equal: float


def backends(
    model: str, out: str | Path, images: Sequence[str] = (), rounds: int = ROUNDS
) -> list[Side]:
    """Measure a model, print a table, and write backends.json, backends.md and backends.png.

    All sides compute the same images at the recipe's first scale, from bytes to labels, in turns:
    A B C A B C. With a single thread, the time of the processor is measured, which other programs
    do not lengthen.

    Args:
        model: as for `load_pretrained`; "": the shipped one.
        out: folder of the results.
        images: files, folders or globs; default: rendered scenes.
        rounds: measurements of each side.

    Raises:
        ValueError: neither ONNX Runtime nor OpenVINO is installed.
    """
    source = model or shipped.MODEL
    trained = load_pretrained(source)
    graph = graph_of(trained)
    photos = pictures(images, IMAGES + CALIBRATED)
    inputs = [next(inputs_of(photo, graph.description))[1] for photo in photos[:IMAGES]]
    data = graph.description.options.DATASET

    def ours(precision: str) -> Predictor:
        return Predictor(trained.module, data, "cpu", precision=precision, tile="off")

    runs = {"torch fp32, this toolkit": ours("fp32")}
    if has_fast_bf16(torch.device("cpu")):
        runs["torch bf16, this toolkit"] = ours("bf16")
    base = list(runs)[-1]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "photos").mkdir()
        for number, photo in enumerate(photos[IMAGES:] or photos):
            Image.fromarray(photo).save(place / "photos" / f"{number}.png")
        for kind, precisions in SIDES.items():
            form, file = FORMATS[kind], place / f"model{FORMATS[kind].suffix}"
            small = place / f"small{form.suffix}"
            try:
                form.check()
                form.need_to_run(file)
            except ValueError as error:
                print(f"{kind} is left out: {error}")
                continue
            form.write(graph, file)
            form.quantize(file, small, calibration_inputs(str(place / "photos"), graph.description))
            for precision in precisions:
                path = small if precision == "int8" else file
                network = ExportedModule(form, path)
                runs[f"{kind} {precision}"] = Predictor(
                    *(network, data, "cpu"),
                    precision="fp32" if precision == "int8" else precision,
                    tile="off",
                )
        if len(runs) == 1:
            raise ValueError("--backends needs ONNX Runtime or OpenVINO: see docs/export.md")
        sides = measured(runs, inputs, base, rounds)
    text = table(sides, base)
    print(f"\n{text}")
    _write(Path(out), source, sides, text, inputs, base)
    return sides


def measured(
    runs: dict[str, Predictor], inputs: Sequence[Tensor], base: str, rounds: int
) -> list[Side]:
    """Run all sides in turns.

    Args:
        runs: by name; the first one is in float32.
        inputs: (1, 3, h, w) uint8.
        base: the side that the ratios are relative to.
        rounds: measurements of each side.
    """
    clock: Callable[[], float] = (
        time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    )
    labels = {name: [_labels(run, x) for x in inputs] for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            for x in inputs:
                _labels(run, x)
            seconds[name].append((clock() - began) / len(inputs))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    exact = labels[next(iter(runs))]
    return [
        Side(
            name,
            medians[name],
            medians[base] / medians[name],
            float(np.mean([(a == b).mean() for a, b in zip(exact, found, strict=True)])),
        )
        for name, found in labels.items()
    ]


def _labels(run: Predictor, x: Tensor) -> np.ndarray:
    labels: np.ndarray = run.labels(run.logits([x]), (x.shape[2], x.shape[3])).numpy()
    return labels


def table(sides: Sequence[Side], base: str) -> str:
    """The sides as a Markdown table."""
    lines = [
        f"| backend | per image | speed, {base} = 1 | labels equal to torch fp32 |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {side.name} | {1000 * side.seconds:.0f} ms | {side.ratio:.2f} | {side.equal:.2%} |"
        for side in sides
    ]
    return "\n".join(lines)


def _write(
    out: Path, model: str, sides: Sequence[Side], text: str, inputs: Sequence[Tensor], base: str
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    height, width = inputs[0].shape[2:]
    about: dict[str, Any] = {
        "model": model,
        "machine": machine("cpu"),
        "threads": threads,
        "clock": "time of the processor" if threads == 1 else "time",
        "size": [height, width],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mit_semseg": __version__,
        "sides": [asdict(side) for side in sides],
    }
    (out / "backends.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (out / "backends.md").write_text(text + "\n", encoding="utf-8")
    title = f"{model}, {width} x {height}, {threads} thread{'s' * (threads > 1)}"
    bars = [(f"Speed relative to {base}", side.name, side.ratio) for side in sides]
    ratio_bars(bars, out / "backends.png", title=title)
    print(f"Results in {out}")
