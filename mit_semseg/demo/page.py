"""The report of the demo: metrics, curves and predictions of a trained model."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import torch

from mit_semseg.config import Options
from mit_semseg.dataset.images import load_image, load_mask
from mit_semseg.dataset.split import Split, build_split
from mit_semseg.engine.cpu import cpu_count
from mit_semseg.errors import counted
from mit_semseg.models import ModelBuilder
from mit_semseg.visualize.pages import write_page
from mit_semseg.visualize.sheets import Sample, contact_sheet


def show(
    options: Options,
    evaluation: str | Path,
    out: str | Path,
    count: int = 12,
    commands: list[tuple[str, float | None]] | None = None,
) -> Path:
    """Writes `index.html` and `overview.png`, a report of a trained and evaluated model.

    Args:
        options: options of the run; predictions are read from `TEST.result`, labels from
            `DATASET.list_val`.
        evaluation: folder with `eval.json`.
        out: output folder.
        count: number of images, from the start of the validation list.
        commands: commands that were run, with their seconds.

    Returns:
        Path of `index.html`.

    Raises:
        FileNotFoundError: metrics or predictions do not exist; the message names the command.
    """
    figures = json.loads(_read(Path(evaluation) / "eval.json", "eval_multipro.py"))
    lines = _read(Path(options.DIR) / "metrics.jsonl", "train.py").splitlines()
    history = [json.loads(line) for line in lines]
    split = build_split(options.DATASET, "val")
    samples = _samples(options, split, count)
    names, colors = split.classes.names, split.classes.colors
    trained = [record for record in history if record["kind"] == "train"]
    module = ModelBuilder.from_config(options, inference=True)
    weights = sum(p.numel() for p in module.parameters())
    summary = [
        ("mean IoU", f"{figures['mean_iou']:.3f}"),
        ("pixel accuracy", f"{100 * figures['pixel_accuracy']:.1f}%"),
        ("held-out images", f"{figures['images']}"),
        ("parameters", f"{weights / 1e6:.2f} M"),
    ]
    if trained:
        summary.insert(2, ("training", f"{trained[-1]['seconds']:.0f} s"))
        summary.insert(3, ("training images/s", f"{trained[-1]['images_per_second']:.1f}"))
    out = Path(out)
    contact_sheet(
        samples[:3],
        names,
        colors,
        out / "overview.png",
        title=f"{options.MODEL.name} on held-out scenes: mean IoU {figures['mean_iou']:.3f}",
    )
    return write_page(
        out / "index.html",
        samples,
        names,
        colors,
        title="Scene parsing: a model trained here, from scratch",
        lead=f"{options.MODEL.name}, randomly initialised, "
        f"trained on rendered street scenes, and evaluated on held-out scenes. "
        f"{platform.machine()}, {counted(cpu_count(), 'core')}, torch {torch.__version__}.",
        figures=summary,
        ious=[row["iou"] for row in figures["classes"]],
        history=history,
        commands=commands or [],
    )


def _samples(options: Options, split: Split, count: int) -> list[Sample]:
    """Images, labels and predictions of the first records of the validation list."""
    root, result = Path(options.DATASET.root_dataset), Path(options.TEST.result)
    samples = []
    for record in split.records[:count]:
        image, truth = root / record["fpath_img"], root / record["fpath_segm"]
        file = result / f"{image.stem}_index.png"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; run test.py with TEST.save index, color")
        samples.append(
            Sample(
                f"{image.parent.name}/{image.name}",
                load_image(image),
                np.asarray(split.label_map(load_mask(truth))),
                load_mask(file) - options.DATASET.label_offset,
            )
        )
    return samples


def _read(file: Path, command: str) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; run {command} first")
    return file.read_text(encoding="utf-8")
