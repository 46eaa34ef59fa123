"""The report of an evaluation: metrics as plain numbers, a table, and files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mit_semseg.config import Options
from mit_semseg.dataset import ClassTable
from mit_semseg.engine.eval_page import calibration_of, sizes_text
from mit_semseg.engine.scoring import Evaluation
from mit_semseg.errors import counted
from mit_semseg.metrics import BoundaryScore, ConfusionMatrix
from mit_semseg.visualize import class_bars, confusion_matrix

FIGURES = (
    "mean_iou",
    "mean_iou_all_classes",
    "pixel_accuracy",
    "class_accuracy",
    "fw_iou",
    "mean_dice",
)


def result_of(
    evaluation: Evaluation,
    count: int,
    seconds: float,
    options: Options,
    classes: ClassTable,
    checkpoint: str,
) -> dict[str, Any]:
    """The content of `eval.json`.

    Args:
        evaluation: of all ranks.
        count: number of images, including those that failed.
        seconds: of the evaluation.
        options: of the evaluation.
        classes: names of the classes.
        checkpoint: name of the checkpoint; "" for a model in memory.
    """
    used, val = count - len(evaluation.bad), options.VAL
    data = options.DATASET.at_scales(val.imgSizes, val.scales)
    return {
        "checkpoint": checkpoint,
        "images": used,
        "failed": [{"image": image, "error": reason} for image, reason in evaluation.failed],
        "imgSizes": list(data.imgSizes),
        "scales": list(data.scales),
        "flip": val.flip,
        "window": list(val.window),
        "precision": val.precision,
        "processes": evaluation.processes,
        "seconds": seconds,
        "seconds_per_image": evaluation.seconds / used,
        **summarize(evaluation.matrix, classes, evaluation.boundary),
        **(calibration_of(evaluation.report) if evaluation.report else {}),
    }


def summarize(
    matrix: ConfusionMatrix, classes: ClassTable, boundary: BoundaryScore | None = None
) -> dict[str, Any]:
    """The metrics of a confusion matrix as plain numbers, and one dict per class.

    Returns:
        `mean_iou`, `mean_iou_all_classes`, `pixel_accuracy`, `class_accuracy`, `fw_iou`,
        `mean_dice`; `pixels`, the number of labelled pixels; and `classes`, a list of dicts with
        `index`, `name`, `iou`, `dice`, `accuracy` (NaN for a class without pixels), `pixel_share`
        and `predicted_share`. With `boundary` also `mean_boundary_f`, and `boundary_f` per class.
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
    boundaries = {} if boundary is None else boundary.compute()
    for row, score in zip(rows, boundaries.pop("boundary_f", ())):
        row["boundary_f"] = float(score)
    return {
        **{key: float(figures[key]) for key in FIGURES},
        **boundaries,
        "pixels": total,
        "classes": rows,
    }


def single_class(matrix: ConfusionMatrix, classes: ClassTable) -> str:
    """A warning if a single class is predicted for all pixels; else an empty string."""
    labelled, predicted = matrix.matrix.sum(1), matrix.matrix.sum(0)
    if matrix.num_class == 1 or int((predicted > 0).sum()) != 1:
        return ""
    name = classes.names[int(predicted.argmax())]
    if int((labelled > 0).sum()) == 1:
        return (
            f"all labelled pixels are {classes.names[int(labelled.argmax())]}, and all are "
            f"predicted as {name}: check DATASET.label_map, DATASET.label_offset and "
            "DATASET.ignore_label (mit-semseg data check)"
        )
    return (
        f"all pixels of all images are predicted as {name}: check the masks (mit-semseg data "
        "check), train longer, lower TRAIN.lr_encoder and TRAIN.lr_decoder, or set "
        "TRAIN.class_weights"
    )


# Columns of the per-class table: key -> title, padded to the width of the column, and format.
COLUMNS = {
    "iou": ("    IoU", ".4f"),
    "dice": ("   Dice", ".4f"),
    "boundary_f": ("boundary F", ".4f"),
    "accuracy": ("accuracy", ".2%"),
    "pixel_share": (" pixels", ".2%"),
}


def format_report(result: Mapping[str, Any]) -> str:
    """The per-class table and the summary as text; undefined metrics are `n/a`."""
    rows = result["classes"]
    width = max(len("class"), *(len(row["name"]) for row in rows))
    columns = [key for key in COLUMNS if key in rows[0]]
    titles = "".join(f"  {COLUMNS[key][0]}" for key in columns)
    lines = [f"{'#':>4}  {'class':<{width}}{titles}"]
    for row in rows:
        cells = "".join(f"  {_cell(row[key], *COLUMNS[key])}" for key in columns)
        lines.append(f"{row['index']:>4}  {row['name']:<{width}}{cells}")
    absent = sum(math.isnan(row["iou"]) for row in rows)
    zeros = f" (as published: {counted(absent, 'absent class')} as 0)" if absent else ""
    window = ""
    if result.get("window"):
        window = ", in windows of {}x{}".format(*result["window"])
    boundary = ""
    if "mean_boundary_f" in result:
        boundary = f", mean boundary F-score: {_figure(result['mean_boundary_f'], '.4f')}"
    lines += [
        "",
        "[Eval Summary]:",
        f"Mean IoU: {result['mean_iou']:.4f}, Accuracy: {100 * result['pixel_accuracy']:.2f}%, "
        f"Inference Time: {result['seconds_per_image']:.4f}s",
        f"Mean IoU of all {counted(len(rows), 'class')}: "
        f"{result['mean_iou_all_classes']:.4f}{zeros}",
        f"Class accuracy: {100 * result['class_accuracy']:.2f}%, "
        f"frequency-weighted IoU: {result['fw_iou']:.4f}",
        f"Mean Dice: {result['mean_dice']:.4f}{boundary}",
        *(
            [f"Expected calibration error: {_figure(result['ece'], '.4f')}"]
            if "ece" in result
            else []
        ),
        f"{counted(result['images'], 'image')}, {counted(result['pixels'], 'labelled pixel')}, "
        f"{sizes_text(result)}{', flipped copies' if result['flip'] else ''}{window}, "
        f"{result['seconds']:.1f} s in "
        f"{counted(result['processes'], 'process')}",
    ]
    if result["failed"]:
        failed = result["failed"]
        total = counted(result["images"] + len(failed), "image")
        lines.append(f"{len(failed)} of {total} failed:")
        lines += [f"  {one['image']}: {one['error']}" for one in failed]
    if not result["pixels"]:
        lines.append(
            "No labelled pixels: check DATASET.label_offset and DATASET.ignore_label, or run "
            "`mit-semseg data check` on the list"
        )
    return "\n".join(lines)


def _cell(value: float, title: str, spec: str) -> str:
    return f"{_figure(value, spec):>{len(title)}}"


def _figure(value: float, spec: str) -> str:
    return "n/a" if math.isnan(value) else format(value, spec)


# Bar charts: key -> title.
BARS = {"iou": "IoU", "dice": "Dice", "boundary_f": "Boundary F-score"}


def write_report(
    result: Mapping[str, Any], matrix: ConfusionMatrix, classes: ClassTable, out: Path
) -> None:
    """Write `eval.json`, `eval.csv`, a bar chart per metric, and the confusion matrix."""
    (out / "eval.json").write_text(json.dumps(_without_nan(result), indent=2) + "\n", "utf-8")
    with open(out / "eval.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(result["classes"][0]), lineterminator="\n")
        writer.writeheader()
        # Spreadsheets and pandas read an empty cell as a missing value.
        writer.writerows(_without_nan(row, none="") for row in result["classes"])
    for key, title in BARS.items():
        values = [row[key] for row in result["classes"] if key in row]
        if values:
            picture = out / f"class_{key}.png"
            class_bars(classes.names, values, classes.colors, picture, title=f"{title} per class")
    if result["pixels"]:
        confusion_matrix(matrix.matrix.cpu(), classes.names, out / "confusion.png")


def _without_nan(value: Any, none: Any = None) -> Any:
    """Replace NaN, which JSON does not have, by `none`."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item, none) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item, none) for item in value]
    return none if isinstance(value, float) and math.isnan(value) else value
