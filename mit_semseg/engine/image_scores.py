"""What the report of an evaluation needs beyond the confusion matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from mit_semseg.metrics import Calibration, ConfusionMatrix

WORST = 12  # number of images whose class ids are kept


@dataclass(frozen=True)
class ImageScore:
    """The metrics of one image.

    Attributes:
        mean_iou, accuracy: NaN if nothing is labelled.
        labels: (H, W) predicted class ids, if it is one of the worst.
    """

    mean_iou: float
    accuracy: float
    labels: np.ndarray | None = None


@dataclass
class ReportCounts:
    """Calibration, and the metrics of each image; `+` merges two of them.

    Attributes:
        calibration: of all pixels.
        images: index in the list -> metrics; the `WORST` of them have their class ids.
    """

    calibration: Calibration
    images: dict[int, ImageScore] = field(default_factory=dict)

    @property
    def worst(self) -> list[int]:
        """The images with the lowest mean IoU, lowest first; those without labels left out."""
        known = (i for i, one in self.images.items() if not math.isnan(one.mean_iou))
        return sorted(known, key=lambda i: (self.images[i].mean_iou, i))[:WORST]

    def empty(self) -> ReportCounts:
        """Counts of no image."""
        return ReportCounts(Calibration(self.calibration.num_class))

    def update(self, number: int, predicted: Tensor, truth: Tensor, confidence: Tensor) -> None:
        """Add an image.

        Args:
            number: its index in the list.
            predicted: (H, W) class ids.
            truth: (H, W) class ids, -1 for ignored pixels.
            confidence: (H, W) probabilities of the predicted classes.
        """
        self.calibration.update(confidence, predicted, truth)
        matrix = ConfusionMatrix(self.calibration.num_class)
        matrix.update(predicted, truth)
        figures = matrix.compute()
        labels = predicted.numpy().astype(np.int16)
        self.images[number] = ImageScore(figures["mean_iou"], figures["pixel_accuracy"], labels)

    def __add__(self, other: ReportCounts) -> ReportCounts:
        total = ReportCounts(self.calibration + other.calibration, {**self.images, **other.images})
        total.forget()
        return total

    def forget(self) -> None:
        """Drop the class ids of images that are not among the worst."""
        drawn = [i for i, one in self.images.items() if one.labels is not None]
        if len(drawn) <= WORST:
            return
        kept = {*self.worst}
        for i in drawn:
            if i not in kept:
                self.images[i] = replace(self.images[i], labels=None)
