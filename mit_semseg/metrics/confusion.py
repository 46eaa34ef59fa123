"""Accumulation of pixel counts, from which all metrics except the boundary F-score follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mit_semseg.metrics import functional as F


class ConfusionMatrix:
    """Pixel counts by label and prediction.

    The sum of those of several processes equals that of a single process.

    Args:
        num_class: number of classes K.
        device: device of the counts; on a GPU, only `compute` synchronises.

    Attributes:
        matrix: (K, K) int64 on `device`, row = label, column = prediction.

    Raises:
        ValueError: num_class is below 1.

    Example:
        >>> counts = ConfusionMatrix(3)
        >>> counts.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
        >>> counts.compute()["iou"]
        tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
    """

    def __init__(self, num_class: int, device: torch.device | str = "cpu") -> None:
        if num_class < 1:
            raise ValueError(f"num_class is {num_class}; give at least 1")
        self.num_class = num_class
        self.matrix = torch.zeros(num_class, num_class, dtype=torch.int64, device=device)

    def update(self, pred: Tensor | Any, label: Tensor | Any, check: bool = True) -> None:
        """Add a prediction.

        Args:
            pred: class ids in 0..K-1, integer tensor or array of any shape.
            label: class ids of the same shape, -1 for ignored pixels.
            check: see `functional.confusion_matrix`.

        Raises:
            ValueError: shapes differ, values are not integers, or an id is out of range.
        """
        counts = F.confusion_matrix(pred, label, self.num_class, check)
        self.matrix += counts.to(self.matrix.device)

    def cpu(self) -> ConfusionMatrix:
        """The same counts on the CPU."""
        result = ConfusionMatrix(self.num_class)
        result.matrix += self.matrix.cpu()
        return result

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        if other.num_class != self.num_class:
            raise ValueError(
                f"cannot add confusion matrices of {self.num_class} and {other.num_class} classes"
            )
        result = ConfusionMatrix(self.num_class, self.matrix.device)
        result.matrix = self.matrix + other.matrix
        return result

    def __radd__(self, other: Any) -> ConfusionMatrix:
        # For sum(), which starts from 0.
        return self + ConfusionMatrix(self.num_class) if other == 0 else NotImplemented

    def __repr__(self) -> str:
        return f"ConfusionMatrix(num_class={self.num_class}, pixels={int(self.matrix.sum())})"

    def compute(self) -> dict[str, Any]:
        """All metrics, in [0, 1].

        Returns:
            Per class, (K,) float64 tensors: `iou` and `dice`, NaN if the class is absent from
            labels and predictions, and `recall`, NaN if it is absent from the labels. Floats:
            `mean_iou` and `mean_dice` over the classes that occur, `mean_iou_all_classes` with 0
            for absent classes as published, `pixel_accuracy`, `class_accuracy` (mean recall),
            `fw_iou`; NaN if there are no counts.
        """
        m = self.matrix.cpu()
        return {
            "iou": F.class_iou(m),
            "dice": F.class_dice(m),
            "recall": F.class_recall(m),
            "mean_iou": F.mean_iou(m).item(),
            "mean_iou_all_classes": F.mean_iou_all_classes(m).item(),
            "pixel_accuracy": F.pixel_accuracy(m).item(),
            "class_accuracy": F.class_accuracy(m).item(),
            "fw_iou": F.fw_iou(m).item(),
            "mean_dice": F.mean_dice(m).item(),
        }
