"""Charts of calibration, and of precision and recall by confidence, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mit_semseg.visualize.charts import (
    BLUE,
    MUTED,
    ORANGE,
    PathLike,
    new_figure,
    save_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability_diagram(
    confidence: Any,
    accuracy: Any,
    share: Any,
    path: PathLike | None = None,
    *,
    title: str = "Calibration",
    note: str = "",
) -> Figure:
    """Accuracy by confidence, and the share of pixels in each bin.

    Paper: Guo et al. 2017, arXiv:1706.04599, fig. 1.

    Args:
        confidence, accuracy, share: (M,) mean confidence, accuracy and share of the pixels of each
            of M bins of equal width in [0, 1]; NaN where a bin is empty.
        path: file to save, .png, .svg or .pdf.
        title: heading.
        note: text on the right.

    Raises:
        ValueError: the lengths differ, or there are no bins.
    """
    sure, right, part = (np.asarray(x, dtype=np.float64) for x in (confidence, accuracy, share))
    if not len(sure) == len(right) == len(part) or not len(part):
        raise ValueError(
            f"there are {len(sure)} confidences, {len(right)} accuracies and {len(part)} shares; "
            "give one of each per bin"
        )
    bins = len(part)
    middle = (np.arange(bins) + 0.5) / bins
    figure = new_figure(7.2, 3.6, title, note)
    left, below = figure.subplots(1, 2)
    for axes, heights, name, top in (
        (left, np.nan_to_num(right), "accuracy", 1.0),
        (
            below,
            np.nan_to_num(part),
            "share of pixels",
            1.05 * max(np.nan_to_num(part).max(), 0.01),
        ),
    ):
        axes.bar(middle, heights, 0.92 / bins, color=BLUE)
        style_axes(axes, name)
        axes.set(xlim=(0, 1), ylim=(0, top))
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("confidence", size=9, color=MUTED)
    left.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
    known = np.isfinite(sure) & np.isfinite(right)
    ends = (sure[known], right[known], sure[known])
    left.vlines(*ends, color=ORANGE, linewidth=2, label="gap to the confidence")
    if known.any():
        left.legend(frameon=False, fontsize=9, loc="upper left")
    return save_figure(figure, path)


def threshold_curves(
    names: Sequence[str],
    precision: Any,
    recall: Any,
    path: PathLike | None = None,
    *,
    title: str = "Precision and recall by confidence",
    columns: int = 5,
) -> Figure:
    """A panel per class: precision and recall if only confident predictions count.

    Args:
        names: K class names.
        precision, recall: (K, T) in [0, 1], at T equally spaced thresholds from 0 to 1; NaN where
            they are not defined.
        path: file to save, .png, .svg or .pdf.
        title: heading.
        columns: maximum number of panels in a row.

    Raises:
        ValueError: the lengths differ, or there are no classes.
    """
    right, found = np.asarray(precision, dtype=np.float64), np.asarray(recall, dtype=np.float64)
    if not len(names) == len(right) == len(found) or not len(names) or right.shape != found.shape:
        raise ValueError(
            f"there are {len(names)} names, precision of shape {right.shape} and recall of shape "
            f"{found.shape}; give a row of each per class"
        )
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(max(5.0, 2.05 * columns), 0.9 + 1.75 * rows, title)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    at = np.linspace(0, 1, right.shape[1])
    for k, axes in enumerate(panels):
        if k >= len(names):
            axes.set_axis_off()
            continue
        axes.plot(at, right[k], color=BLUE, linewidth=1.6, label="precision")
        axes.plot(at, found[k], color=ORANGE, linewidth=1.6, label="recall")
        style_axes(axes)
        axes.set_title(str(names[k])[:24], loc="left", size=9, parse_math=False)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.yaxis.set_major_formatter("{x:.0%}")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return save_figure(figure, path)
