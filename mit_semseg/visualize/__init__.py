"""Palettes, coloured label maps and legends as arrays; charts and sheets as matplotlib figures."""

from mit_semseg.visualize.charts import (
    accuracy_by_speed,
    class_bars,
    confusion_matrix,
    curves,
    loss_curves,
    ratio_bars,
)
from mit_semseg.visualize.legend import legend
from mit_semseg.visualize.palette import color_encode, overlay, palette, side_by_side
from mit_semseg.visualize.sheets import prediction_sheet

__all__ = [
    "accuracy_by_speed",
    "class_bars",
    "color_encode",
    "confusion_matrix",
    "curves",
    "legend",
    "loss_curves",
    "overlay",
    "palette",
    "prediction_sheet",
    "ratio_bars",
    "side_by_side",
]
