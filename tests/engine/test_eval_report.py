"""Figures of an evaluation: added up over ranks, printed, and judged."""

import math

import numpy as np
import torch
import torch.distributed as dist

from mit_semseg.dataset import ClassTable
from mit_semseg.engine.eval_report import format_report, single_class
from mit_semseg.engine.scoring import Evaluation, merged
from mit_semseg.metrics import BoundaryScore, ConfusionMatrix

CPU = torch.device("cpu")


def test_counts_of_ranks_add_up(monkeypatch):
    """`merged` in a process group whose other rank has the same counts."""
    part = Evaluation(ConfusionMatrix(2), {3: ("x", "y")}, 2.0, boundary=BoundaryScore(2))
    part.matrix.update([0, 1, 1], [0, 0, 1])
    part.boundary.update(np.eye(8, dtype=int), np.eye(8, dtype=int))
    assert merged(part, CPU) is part, "outside a process group there is nothing to merge"

    def gather(into, own):
        into[:] = [own, ({1: ("z", "y")}, 1.0, 1)]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda counts: counts.mul_(2))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    whole = merged(part, CPU)
    assert whole.matrix.matrix.tolist() == [[2, 2], [0, 2]]
    assert whole.boundary.images.tolist() == [2, 2] and whole.processes == 2
    assert torch.equal(whole.boundary.sums, 2 * part.boundary.sums)
    assert whole.failed == [("z", "y"), ("x", "y")] and whole.seconds == 3.0
    assert part.matrix.matrix.tolist() == [[1, 1], [0, 1]]


def test_a_class_without_pixels_is_printed_as_not_available():
    figures = {"iou": 0.5, "dice": 2 / 3, "accuracy": 0.25}
    rows = [{"index": 0, "name": "road", "pixel_share": 1.0, **figures}]
    rows += [{"index": 1, "name": "tree", "pixel_share": 0.0, **dict.fromkeys(figures, math.nan)}]
    result = {"mean_iou": 0.4126, "pixel_accuracy": 0.79731, "seconds_per_image": 0.0421}
    result |= {"mean_iou_all_classes": 0.2, "class_accuracy": 0.5, "fw_iou": 0.4, "mean_dice": 0.6}
    result |= {"images": 1, "failed": [], "pixels": 7, "imgSizes": [300], "flip": False}
    lines = format_report({**result, "seconds": 1.0, "processes": 1, "classes": rows}).splitlines()
    assert lines[1].split() == ["0", "road", "0.5000", "0.6667", "25.00%", "100.00%"]
    assert lines[2].split() == ["1", "tree", "n/a", "n/a", "n/a", "0.00%"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "Mean IoU: 0.4126, Accuracy: 79.73%, Inference Time: 0.0421s" in lines


def test_single_class_warnings():
    classes, matrix = ClassTable.of(["floor", "crack"]), ConfusionMatrix(2)
    labelled = "all labelled pixels are floor, and all are predicted as floor: check DATASET"
    predicted = "all pixels of all images are predicted as flo"
    for pixels, start in (
        (([0], [-1]), ""),  # nothing was labelled
        (([0, 0, 0], [0, 0, -1]), labelled),
        (([0, 1], [1, -1]), predicted),  # predicted where nothing is labelled: not counted
        (([1], [0]), ""),
    ):
        matrix.update(*pixels)
        output = single_class(matrix, classes)
        assert output.startswith(start) and bool(output) == bool(start)
    alone = ConfusionMatrix(1)
    alone.update([0], [0])
    assert single_class(alone, ClassTable.of(["floor"])) == ""
