"""Metrics: functions of a confusion matrix or of boundaries, and their accumulators."""

from mit_semseg.metrics.boundary import BoundaryScore, boundary_f
from mit_semseg.metrics.calibration import Calibration
from mit_semseg.metrics.confusion import ConfusionMatrix
from mit_semseg.metrics.functional import (
    class_accuracy,
    class_dice,
    class_iou,
    class_recall,
    confusion_matrix,
    fw_iou,
    mean_dice,
    mean_iou,
    mean_iou_all_classes,
    pixel_accuracy,
)

__all__ = [
    "BoundaryScore",
    "Calibration",
    "ConfusionMatrix",
    "boundary_f",
    "class_accuracy",
    "class_dice",
    "class_iou",
    "class_recall",
    "confusion_matrix",
    "fw_iou",
    "mean_dice",
    "mean_iou",
    "mean_iou_all_classes",
    "pixel_accuracy",
]
