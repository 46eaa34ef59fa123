"""`mit-semseg compare`: a table, a chart and example predictions of several evaluations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mit_semseg.config import Options, load_options
from mit_semseg.dataset import build_split
from mit_semseg.engine.evaluate import val_dataset
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics
from mit_semseg.errors import one_line
from mit_semseg.tools import profile
from mit_semseg.visualize import accuracy_by_speed
from mit_semseg.visualize.bands import picture
from mit_semseg.visualize.sheets import image_grid

log = logging.getLogger("mit_semseg")
# Height and width of the image whose operations are counted, as of `mit-semseg profile`.
SIZE = (512, 512)


@dataclass(frozen=True)
class Compared:
    """An evaluation.

    Attributes:
        name: of the checkpoint folder, or else of the folder of the evaluation.
        folder: of the evaluation.
        model: encoder + decoder; "" without a configuration in the parent folder.
        mean_iou, pixel_accuracy: in [0, 1]; None if undefined.
        images_per_second: of the evaluation.
        steps: of the training; 0 if unknown.
        train_minutes: time of the training without validation; 0 if unknown.
        parameters: of encoder and decoder, in 1e6; None without a configuration, or if the model
            cannot be built.
        gflops: floating-point operations for an image of 512x512 pixels, in 1e9; None likewise.
    """

    name: str
    folder: str
    model: str
    mean_iou: float | None
    pixel_accuracy: float | None
    images_per_second: float
    steps: int = 0
    train_minutes: float = 0.0
    parameters: float | None = None
    gflops: float | None = None

    @classmethod
    def read(cls, place: str | Path) -> Compared:
        """Read an evaluation from its folder or `eval.json`.

        Raises:
            FileNotFoundError: there is no `eval.json`.
            ValueError: it has other content.
        """
        folder = Path(place).parent if Path(place).suffix == ".json" else Path(place)
        file = folder / "eval.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; run mit-semseg eval with --out {folder}")
        try:
            result = json.loads(file.read_text("utf-8"))
            figures = result["mean_iou"], result["pixel_accuracy"]
            rate = result["images"] / result["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not an evaluation: {one_line(error, named=True)}"
            ) from error
        options, here = _options(folder), folder.resolve()
        of_model = options is not None or here.name in ("result_eval", "evaluation")
        steps = _trained(folder.parent)
        parameters, gflops = _costs(options) if options else (None, None)
        return cls(
            name=here.parent.name if of_model else here.name,
            folder=str(folder),
            model=options.MODEL.name if options else "",
            mean_iou=figures[0],
            pixel_accuracy=figures[1],
            images_per_second=rate,
            steps=steps.get("step", 0),
            train_minutes=steps.get("seconds", 0.0) / 60,
            parameters=parameters,
            gflops=gflops,
        )

    def __str__(self) -> str:
        trained = f", {self.steps} steps in {self.train_minutes:.1f} min" if self.steps else ""
        return (
            f"{self.name}: mean IoU {_percent(self.mean_iou)}, accuracy "
            f"{_percent(self.pixel_accuracy)}{trained}"
        )


def _options(folder: Path) -> Options | None:
    """The configuration in the parent folder of an evaluation."""
    file = folder.parent / "config.yaml"
    return load_options(file) if file.is_file() else None


def _costs(options: Options) -> tuple[float, float] | tuple[None, None]:
    """Parameters in 1e6, and GFLOP for an image of `SIZE`."""
    try:
        plan, image = profile.on_meta(options, SIZE)
        return (
            sum(p.numel() for p in profile.parameters(plan)) / 1e6,
            profile.operations(plan, image) / 1e9,
        )
    except (OSError, ValueError, RuntimeError) as error:
        log.warning("%s: its operations are not known: %s", options.MODEL.name, one_line(error))
        return None, None


def _trained(folder: Path) -> dict[str, Any]:
    """The last line of the metrics of a training."""
    file = folder / METRICS
    lines = read_metrics(file) if file.is_file() else []
    return next((x for x in reversed(lines) if x["kind"] == "train"), {})


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f} %"


def compare(
    places: Iterable[str | Path],
    out: str | Path,
    *,
    name: str = "compare",
    failed: Mapping[str, str] | None = None,
) -> list[Compared]:
    """Compare evaluations: write `NAME.md`, `NAME.json`, `NAME.png` and `NAME_pictures.png`.

    `NAME_pictures.png` shows the predictions saved with `eval --keep`, of those evaluations that
    have the same data and images as the best one.

    Args:
        places: folders of evaluations, or `eval.json` files.
        out: folder of the results.
        name: of the files.
        failed: name -> error, of failed runs.

    Returns:
        The evaluations, best first.

    Raises:
        FileNotFoundError, ValueError: not an evaluation.
    """
    found = [Compared.read(place) for place in places]
    found.sort(key=lambda x: -1.0 if x.mean_iou is None else x.mean_iou, reverse=True)
    folder, failed = Path(out), failed or {}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"evaluations": [asdict(x) for x in found], "failed": dict(failed)}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(table(found, failed) + "\n", "utf-8")
    if found:
        accuracy_by_speed(
            [x.name for x in found],
            [x.mean_iou for x in found],
            [x.images_per_second for x in found],
            folder / f"{name}.png",
        )
        _pictures(found, folder / f"{name}_pictures.png")
    return found


def table(found: Sequence[Compared], failed: Mapping[str, str] | None = None) -> str:
    """A Markdown table of evaluations."""
    head = ("name", "model", "mean IoU", "accuracy", "images/s", "parameters, 1e6", "GFLOP")
    rows = [f"| {' | '.join((*head, 'steps', 'minutes'))} |", f"|{9 * '---|'}"]
    for x in found:
        cells = [
            *(x.name, x.model, _percent(x.mean_iou), _percent(x.pixel_accuracy)),
            f"{x.images_per_second:.2f}",
            *("" if cost is None else f"{cost:.3g}" for cost in (x.parameters, x.gflops)),
            *((f"{x.steps}", f"{x.train_minutes:.1f}") if x.steps else ("", "")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    for name, reason in (failed or {}).items():
        rows.append(f"| {name} | failed: {reason.replace('|', '/')} |{7 * ' |'}")
    return "\n".join(rows)


def _pictures(found: Sequence[Compared], file: Path) -> None:
    """Draw images, ground truth and saved predictions, one row each."""
    saved: list[tuple[Compared, Options, list[int]]] = []
    for x in found:
        numbers, options = _saved(Path(x.folder)), _options(Path(x.folder))
        if numbers and options:
            saved.append((x, options, numbers))
    if not saved:
        return
    _, options, numbers = saved[0]
    try:
        data, classes = val_dataset(options), build_split(options.DATASET, "val").classes
        samples = [data[number] for number in numbers]
    except (OSError, ValueError) as error:  # the data has been moved, or an image is unreadable
        log.warning("%s is not drawn: %s", file, one_line(error, named=True))
        return
    rows = [("image", [picture(x["img_ori"], data.options.bands) for x in samples])]
    rows += [("ground truth", [x["seg_label"][0].numpy() for x in samples])]
    for x, own, own_numbers in saved:
        if own_numbers == numbers and _data(own) == _data(options):
            labels = [np.load(Path(x.folder) / "labels" / f"{n}.npy") for n in numbers]
            rows.append((f"{x.name}, mean IoU {_percent(x.mean_iou)}", labels))
    # One title per row, since it may be wider than an image.
    tiles = [("" if n else title, x) for title, row in rows for n, x in enumerate(row)]
    image_grid(tiles, file, columns=len(samples), names=classes.names, colors=classes.colors)


def _saved(folder: Path) -> list[int]:
    """Numbers of at most three images with saved predictions."""
    numbers = sorted(int(x.stem) for x in folder.glob("labels/*.npy") if x.stem.isdigit())
    return numbers[:: -(-len(numbers) // 3) or 1]


def _data(options: Options) -> tuple[Any, ...]:
    """What identifies the validation data."""
    data = options.DATASET
    return data.format, Path(data.root_dataset).resolve(), data.list_val, data.num_class
