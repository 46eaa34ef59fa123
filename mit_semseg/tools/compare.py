"""`mit-semseg compare`: evaluations side by side, as a table, a chart and pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mit_semseg.config import load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import build_split
from mit_semseg.engine.evaluate import val_dataset
from mit_semseg.engine.training.metrics_log import METRICS, read_metrics
from mit_semseg.errors import one_line
from mit_semseg.visualize import class_bars
from mit_semseg.visualize.sheets import image_grid

log = logging.getLogger("mit_semseg")


@dataclass(frozen=True)
class Compared:
    """One evaluation.

    Attributes:
        name: of the folder that the model was trained in, else of that of the figures.
        folder: of the figures.
        model: encoder + decoder; "" where there is no configuration in the folder or above it.
        mean_iou, pixel_accuracy: in [0, 1]; None where no class occurs.
        images_per_second: of the evaluation.
        steps: of the training, and its minutes without validation; 0 where they are not known.
    """

    name: str
    folder: str
    model: str
    mean_iou: float | None
    pixel_accuracy: float | None
    images_per_second: float
    steps: int = 0
    train_minutes: float = 0.0

    @classmethod
    def read(cls, place: str | Path) -> Compared:
        """An evaluation from its folder or `eval.json`.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is of another kind.
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
                f"{file} holds no evaluation: {one_line(error, named=True)}"
            ) from error
        cfg, here = _config(folder), folder.resolve()
        of_model = cfg is not None or here.name in ("result_eval", "evaluation")
        steps = _trained(folder.parent)
        return cls(
            name=here.parent.name if of_model else here.name,
            folder=str(folder),
            model="" if cfg is None else f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}",
            mean_iou=figures[0],
            pixel_accuracy=figures[1],
            images_per_second=rate,
            steps=steps.get("step", 0),
            train_minutes=steps.get("seconds", 0.0) / 60,
        )

    def __str__(self) -> str:
        trained = f", {self.steps} steps in {self.train_minutes:.1f} min" if self.steps else ""
        return (
            f"{self.name}: mean IoU {_percent(self.mean_iou)}, accuracy "
            f"{_percent(self.pixel_accuracy)}{trained}"
        )


def _config(folder: Path) -> Config | None:
    """The configuration of a model whose checkpoint folder holds this one."""
    file = folder.parent / "config.yaml"
    return load_config(file) if file.is_file() else None


def _trained(folder: Path) -> dict[str, Any]:
    """The last figures of a training."""
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

    The pictures are images whose class ids all evaluations have kept (`eval --keep`), as each
    model sees them; evaluations of other data than the best one's are left out there.

    Args:
        places: folders of evaluations, or `eval.json` files.
        out: folder of the results.
        name: of the files.
        failed: name -> reason, of what has no evaluation.

    Returns:
        The evaluations, the best first.

    Raises:
        FileNotFoundError, ValueError: a place holds no evaluation.
    """
    found = [Compared.read(place) for place in places]
    found.sort(key=lambda x: -1.0 if x.mean_iou is None else x.mean_iou, reverse=True)
    folder, failed = Path(out), failed or {}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"evaluations": [asdict(x) for x in found], "failed": dict(failed)}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(table(found, failed) + "\n", "utf-8")
    if found:
        class_bars(
            [x.name for x in found],
            [x.mean_iou for x in found],
            path=folder / f"{name}.png",
            title="Mean IoU",
            what="models",
        )
        _pictures(found, folder / f"{name}_pictures.png")
    return found


def table(found: Sequence[Compared], failed: Mapping[str, str] | None = None) -> str:
    """Evaluations in Markdown."""
    rows = ["| name | model | mean IoU | accuracy | steps | minutes | images/s |", f"|{7 * '---|'}"]
    for x in found:
        trained = f"{x.steps} | {x.train_minutes:.1f}" if x.steps else " | "
        figures = f"{_percent(x.mean_iou)} | {_percent(x.pixel_accuracy)} | {trained}"
        rows.append(f"| {x.name} | {x.model} | {figures} | {x.images_per_second:.2f} |")
    for name, reason in (failed or {}).items():
        rows.append(f"| {name} | failed: {reason.replace('|', '/')} | | | | | |")
    return "\n".join(rows)


def _pictures(found: Sequence[Compared], file: Path) -> None:
    """Images, truth, and what the models make of them, a row each; nothing without kept ids."""
    kept = {x: _kept(Path(x.folder)) for x in found}
    kept = {x: numbers for x, numbers in kept.items() if numbers and _config(Path(x.folder))}
    if not kept:
        return
    cfgs = {x: _config(Path(x.folder)) for x in kept}
    first = next(iter(kept))
    same = [x for x in kept if kept[x] == kept[first] and _data(cfgs[x]) == _data(cfgs[first])]
    cfg = cfgs[first]
    assert cfg is not None
    try:
        data, classes = val_dataset(cfg), build_split(cfg.DATASET, "val").classes
        samples = [data[number] for number in kept[first]]
    except (OSError, ValueError) as error:  # the data have moved, or an image cannot be read
        log.warning("%s is not drawn: %s", file, one_line(error, named=True))
        return
    rows = [("image", [x["img_ori"] for x in samples])]
    rows += [("truth", [x["seg_label"][0].numpy() for x in samples])]
    for x in same:
        labels = [np.load(Path(x.folder) / "labels" / f"{number}.npy") for number in kept[x]]
        rows.append((f"{x.name}, mean IoU {_percent(x.mean_iou)}", labels))
    # A name may be wider than a picture: it has the row to itself.
    tiles = [("" if n else title, x) for title, row in rows for n, x in enumerate(row)]
    image_grid(tiles, file, columns=len(samples), names=classes.names, colors=classes.colors)


def _kept(folder: Path) -> list[int]:
    """Numbers of the images whose class ids were kept, at most as many as a row can show."""
    numbers = sorted(int(x.stem) for x in folder.glob("labels/*.npy") if x.stem.isdigit())
    return numbers[:: -(-len(numbers) // 3) or 1]


def _data(cfg: Config | None) -> tuple[Any, ...]:
    """What tells validation data apart."""
    assert cfg is not None
    data = cfg.DATASET
    return data.format, Path(data.root_dataset).resolve(), data.list_val, data.num_class
