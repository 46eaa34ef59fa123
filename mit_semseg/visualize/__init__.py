"""Palettes, coloured label maps, legends and charts."""

from mit_semseg.visualize.charts import class_bars, curves, loss_curves, ratio_bars
from mit_semseg.visualize.palette import color_encode, overlay, palette, side_by_side
from mit_semseg.visualize.sheets import legend, prediction_sheet

__all__ = [
    "class_bars",
    "color_encode",
    "curves",
    "legend",
    "loss_curves",
    "overlay",
    "palette",
    "prediction_sheet",
    "ratio_bars",
    "side_by_side",
]
