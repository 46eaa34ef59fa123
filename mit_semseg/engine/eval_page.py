"""The page of an evaluation: `mit-semseg eval --report`."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mit_semseg.config import DataOptions
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.loading import load_pair
from mit_semseg.dataset.split import Split
from mit_semseg.engine.image_scores import ReportCounts
from mit_semseg.metrics import ConfusionMatrix
from mit_semseg.visualize.bands import picture
from mit_semseg.visualize.charts import confusion_matrix
from mit_semseg.visualize.confidence import reliability_diagram, threshold_curves
from mit_semseg.visualize.pages import write_page
from mit_semseg.visualize.sheets import Sample

_SIDE = 640  # longest side of pictures, in pixels
_PANELS = 30  # classes with curves, those with the lowest IoU first


def sizes_text(result: Mapping[str, Any]) -> str:
    """The sizes of an evaluation, from the content of `eval.json`."""
    options = DataOptions(imgSizes=result["imgSizes"], scales=result.get("scales", ()))
    return options.sizes_text


def calibration_of(report: ReportCounts) -> dict[str, Any]:
    """The part of `eval.json` about calibration: `ece` and `calibration`, one dict per bin."""
    found = report.calibration.compute()
    keys = ("confidence", "accuracy", "share")
    rows = zip(*(found[key].tolist() for key in keys))
    return {"ece": found["ece"], "calibration": [dict(zip(keys, row)) for row in rows]}


def write_images(path: Path, report: ReportCounts, split: Split) -> None:
    """Write a CSV file with the metrics of each image, in the order of the list."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "mean_iou", "accuracy"])
        for i in sorted(report.images):
            one = report.images[i]
            figures = ["" if math.isnan(x) else x for x in (one.mean_iou, one.accuracy)]
            writer.writerow([split.records[i]["fpath_img"], *figures])


def write_eval_page(
    path: Path,
    result: Mapping[str, Any],
    matrix: ConfusionMatrix,
    report: ReportCounts,
    split: Split,
    classes: ClassTable,
    title: str,
    data: DataOptions,
) -> Path:
    """Write an evaluation as one self-contained HTML file, worst images first.

    Args:
        path: the file.
        result: content of `eval.json`.
        matrix: over all images.
        report: calibration, and metrics and class ids of the worst images.
        split: the data.
        classes: names and colours of the classes.
        title: title of the page.
        data: what images are read with.
    """
    found = report.calibration.compute()
    charts: list[tuple[str, Any]] = []
    if result["pixels"]:
        charts.append(("Confusion matrix", confusion_matrix(matrix.matrix.cpu(), classes.names)))
        note = f"expected calibration error {100 * found['ece']:.1f} %"
        diagram = (found[key] for key in ("confidence", "accuracy", "share"))
        charts.append(("Calibration", reliability_diagram(*diagram, title="", note=note)))
        rows = [row for row in result["classes"] if row["pixel_share"] > 0]
        known = [row["index"] for row in sorted(rows, key=lambda row: row["iou"])]
        shown = known[:_PANELS]
        curves = threshold_curves(
            [classes.names[k] for k in shown],
            found["precision"][shown],
            found["recall"][shown],
            title="",
        )
        name = "Precision and recall of predictions above a confidence, by class"
        if len(known) > len(shown):
            name += f", the {len(shown)} of lowest IoU"
        charts.append((name, curves))
    failed = len(result["failed"])
    return write_page(
        path,
        [_sample(report, i, split, data) for i in report.worst],
        classes.names,
        classes.colors,
        title=title,
        lead=f"{result['images']} images, {sizes_text(result)}"
        + (f"; {failed} more could not be used: {result['failed'][0]['error']}" if failed else ""),
        figures=[
            ("mean IoU", _share(result["mean_iou"])),
            ("pixel accuracy", _share(result["pixel_accuracy"])),
            ("mean Dice", _share(result["mean_dice"])),
            ("expected calibration error", _share(found["ece"])),
            ("images", f"{result['images']}"),
        ],
        ious=[row["iou"] for row in result["classes"]],
        rows_title="Worst images, by mean IoU over the classes of the image",
        more=charts,
    )


def _share(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.1f} %"


def _sample(report: ReportCounts, number: int, split: Split, data: DataOptions) -> Sample:
    """A row of the page, reduced in size."""
    record, one = split.records[number], report.images[number]
    assert one.labels is not None
    image, truth = load_pair(record, "", split.label_map, data)
    height, width = truth.shape
    share = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(share * width)), max(1, round(share * height)))

    def small(labels: np.ndarray) -> np.ndarray:
        nearest = cv2.INTER_NEAREST_EXACT
        return np.asarray(cv2.resize(labels.astype(np.int16), size, interpolation=nearest))

    colors = picture(image, data.bands)
    reduced = np.array(cv2.resize(colors, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    file = Path(record["fpath_img"])
    name = f"{file.parent.name}/{file.name}: mean IoU {one.mean_iou:.3f}"
    return Sample(name, reduced, small(truth), small(one.labels))
