"""Curves, bar charts and confusion matrices with matplotlib.

Every function returns a `matplotlib.figure.Figure`, and saves it if a path is given, as PNG, SVG or
PDF by its suffix. matplotlib is imported in the first call; pyplot and a display are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mit_semseg.files import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#262a33", "#707785", "#dfe2e8"
BLUE, ORANGE, GREEN = "#2563be", "#e07020", "#1e8c5a"
_DPI = 160
# A dollar sign in a class name does not start a formula.
_PLAIN: dict[str, Any] = {"parse_math": False}


def save_figure(figure: Figure, path: PathLike | None) -> Figure:
    """Saves a figure if there is a path, creates its folder, and returns the figure.

    Raises:
        ValueError: matplotlib does not support the suffix.
    """
    if path is not None:
        path = Path(path)
        if path.suffix.lower()[1:] not in figure.canvas.get_supported_filetypes():
            raise ValueError(
                f"{path}: cannot save a figure as {path.suffix!r}; use .png, .svg or .pdf"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def new_figure(width: float, height: float, title: str = "", note: str = "") -> Figure:
    """An empty figure, with size in inches, a title on the left and a note on the right."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=_DPI, facecolor="white", layout="constrained")
    if title or note:
        x, y = 0.1 / width, 1 - 0.2 / height
        text = partial(figure.text, va="center", parse_math=False)
        text(x, y, title, size=13, weight="bold", color=INK)
        text(1 - x, y, note, ha="right", size=10, color=MUTED)
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.4 / height))
    return figure


def style_axes(axes: Axes, title: str = "", grid: str = "y") -> None:
    """Axes without frame, with a grid along "x" or "y" and a title on the left."""
    if title:
        axes.set_title(title, loc="left", size=10.5, weight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(labelsize=9, length=0, labelcolor=MUTED)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=RULE, linewidth=0.8)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ curves
# Panels of `curves`: title, and for each line its name, its key in the history and its colour.
_PANELS = (
    ("Loss", (("training", "loss", BLUE),)),
    (
        "Accuracy and mean IoU",
        (
            ("training accuracy", "accuracy", BLUE),
            ("validation accuracy", "pixel_accuracy", ORANGE),
            ("validation mean IoU", "mean_iou", GREEN),
        ),
    ),
    ("Learning rate", (("encoder", "lr_encoder", BLUE), ("decoder", "lr_decoder", ORANGE))),
)
_VALIDATED = ("pixel_accuracy", "mean_iou")


def curves(
    history: Iterable[Mapping[str, Any]],
    path: PathLike | None = None,
    *,
    title: str = "Training",
) -> Figure:
    """Loss, accuracy, mean IoU and learning rates over the epochs.

    Args:
        history: one dict per record, as in metrics.jsonl. `epoch` is the epoch of the record, from
            1; `step` the optimizer step over all epochs (without it, the record is placed at the
            end of its epoch). `loss`, `accuracy`, `mean_iou`, `pixel_accuracy`, `lr_encoder` and
            `lr_decoder` are drawn; missing and non-finite values are left out.
        path: file to save, .png, .svg or .pdf.
        title: heading.
    """
    records = [r for r in history if "epoch" in r]
    # Steps per epoch, estimated from the last record of an epoch.
    steps = max(
        (r["step"] / r["epoch"] for r in records if r.get("step") and r["epoch"]), default=1
    )

    def points(key: str) -> np.ndarray:
        found = [
            (r["step"] / steps if "step" in r else float(r["epoch"]), float(r[key]))
            for r in records
            if r.get(key) is not None and math.isfinite(r[key])
        ]
        return np.array(sorted(found)).reshape(-1, 2)

    panels = []
    for name, lines in _PANELS:
        drawn = [(label, key, color, xy) for label, key, color in lines if len(xy := points(key))]
        if drawn:
            panels.append((name, drawn))
    best = points("mean_iou")
    note = f"best mean IoU {best[:, 1].max():.1%}" if len(best) else ""
    figure = new_figure(max(5.0, 3.4 * len(panels)), 3.3, title, note)
    if not panels:
        figure.text(0.5, 0.45, "no records yet", ha="center", color=MUTED)
        return save_figure(figure, path)
    for axes, (name, drawn) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, key, color, xy in drawn:
            dashed = "--" if key == "lr_decoder" else "-"  # often equal to the encoder's
            smooth = key in ("loss", "accuracy")
            _line(axes, label, xy, color, smooth, dots=key in _VALIDATED, style=dashed)
        style_axes(axes, name)
        axes.locator_params(axis="y", nbins=6)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("epoch", size=9, color=MUTED)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=min(0.0, *(xy[:, 1].min() for *_, xy in drawn)))
        if name.startswith("Accuracy"):
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter("{x:.0%}")
        if len(drawn) > 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return save_figure(figure, path)


def _line(
    axes: Axes,
    name: str,
    xy: np.ndarray,
    color: str,
    smooth: bool = True,
    dots: bool = False,
    style: str = "-",
) -> None:
    """One curve. With `smooth`, many points are drawn pale, and their running mean on top."""
    x, y = xy.T
    if smooth and len(x) > 12:
        from scipy.ndimage import uniform_filter1d

        axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
        y = uniform_filter1d(y, 2 * max(1, len(y) // 40) + 1, mode="nearest")
    marker = "o" if len(x) == 1 or (dots and len(x) <= 40) else None
    axes.plot(x, y, style, color=color, label=name, linewidth=1.7, marker=marker, markersize=4)


def loss_curves(
    runs: Mapping[str, Sequence[float]], path: PathLike | None = None, *, title: str = "Loss"
) -> Figure:
    """Smoothed losses of several runs in one chart.

    Args:
        runs: name -> losses at equal intervals; at most four runs.
        path: file to save, .png, .svg or .pdf.
        title: heading.

    Raises:
        ValueError: there are no runs, too many, or one is empty.
    """
    colors = (ORANGE, BLUE, GREEN, MUTED)
    if not 0 < len(runs) <= len(colors) or not all(len(run) for run in runs.values()):
        raise ValueError(f"loss_curves needs 1 to {len(colors)} runs with at least one loss each")
    figure = new_figure(8, 3.8, title)
    axes = figure.subplots()
    for color, (name, losses) in zip(colors, runs.items()):
        _line(axes, name, np.column_stack([np.arange(1, len(losses) + 1), losses]), color)
    style_axes(axes)
    axes.set_xlabel("record", size=9, color=MUTED)
    axes.set_ylim(bottom=min(0.0, *(min(run) for run in runs.values())))
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------ bars
def class_bars(
    names: Sequence[str],
    iou: Any,
    colors: np.ndarray | None = None,
    path: PathLike | None = None,
    *,
    title: str = "IoU per class",
) -> Figure:
    """One bar per class in descending order; absent classes are at the end, as n/a.

    Args:
        names: K class names.
        iou: K values in [0, 1]; NaN or None if the class is absent.
        colors: (K, 3) uint8 RGB of the bars; None: one colour for all.
        path: file to save, .png, .svg or .pdf.
        title: heading.

    Raises:
        ValueError: the lengths differ, or there are no classes.
    """
    values = np.array([math.nan if v is None else float(v) for v in iou])
    table = colors if colors is not None else [BLUE] * len(values)
    if not len(names) == len(values) == len(table) or not len(values):
        raise ValueError(
            f"there are {len(names)} names, {len(values)} values and {len(table)} colours; "
            "give one of each per class"
        )
    order = np.argsort(-values, kind="stable")  # NaN comes last
    known = int(np.isfinite(values).sum())
    note = "no class occurs"
    if known:
        absent = f", {len(values) - known} absent" if known < len(values) else ""
        note = f"mean {np.nanmean(values):.1%} over {known} classes{absent}"
    columns = 1 if len(order) <= 30 else 2
    rows = math.ceil(len(order) / columns)
    figure = new_figure(8 if columns == 1 else 10, 1 + 0.24 * rows, title, note)
    for axes, part in zip(
        figure.subplots(1, columns, squeeze=False)[0], np.array_split(order, columns)
    ):
        y = np.arange(len(part))
        length = np.nan_to_num(values[part])
        faces = [table[k] if colors is None else np.asarray(table[k]) / 255 for k in part]
        # The border makes very pale classes visible on white.
        bars = axes.barh(y, length, 0.72, color=faces, edgecolor="#00000040", linewidth=0.6)
        marks = ["n/a" if math.isnan(values[k]) else f"{values[k]:.1%}" for k in part]
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.bar_label(bars, marks, padding=5, size=9, color=INK, bbox=behind)
        if known:
            axes.axvline(float(np.nanmean(values)), color=INK, linestyle="--", linewidth=0.8)
        style_axes(axes, grid="x")
        axes.set(xlim=(0, 1.12), ylim=(rows - 0.4, -0.6))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_yticks(y, [_short(names[k]) for k in part], color=INK, **_PLAIN)
    return save_figure(figure, path)


def _short(name: object, most: int = 60) -> str:
    text = str(name)
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def ratio_bars(
    rows: Sequence[tuple[str, str, float]], path: PathLike | None = None, *, title: str = "Ratios"
) -> Figure:
    """One bar per ratio, in groups, on a logarithmic axis, starting at 1.

    Args:
        rows: (group, name, ratio above 0) in drawing order; groups have headings.
        path: file to save, .png, .svg or .pdf.
        title: heading.

    Raises:
        ValueError: there are no rows, or a ratio is not a number above 0.
    """
    if not rows or not all(ratio > 0 and math.isfinite(ratio) for *_, ratio in rows):
        raise ValueError("ratio_bars needs at least one ratio; each must be a number above 0")
    from matplotlib.transforms import blended_transform_factory

    groups = [group for group, *_ in rows]
    rows = sorted(rows, key=lambda row: groups.index(row[0]))
    ratios = np.array([ratio for *_, ratio in rows])
    marks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    low = max((m for m in marks if m <= min(1, *ratios)), default=min(ratios))
    high = min((m for m in marks if m >= max(2, *ratios)), default=max(ratios))
    # A heading takes the space of one and a half bars.
    begins = [n for n, row in enumerate(rows) if n == 0 or row[0] != rows[n - 1][0]]
    y = np.array([n + 1.5 * sum(n >= begin for begin in begins) for n in range(len(rows))])
    figure = new_figure(8.5, 0.8 + 0.25 * (y[-1] + 1), title)
    axes = figure.subplots()
    axes.set_xscale("log")
    faces = [BLUE if ratio >= 1 else ORANGE for ratio in ratios]
    drawn = axes.barh(y, ratios - 1, 0.68, left=1, color=faces)
    axes.bar_label(drawn, [f"{ratio:.2f} x" for ratio in ratios], padding=4, size=9, color=INK)
    style_axes(axes, grid="x")
    axes.spines[:].set_visible(False)
    axes.axvline(1, color=MUTED, linewidth=1)
    axes.set_yticks(y, [_short(name, 90) for _, name, _ in rows], color=INK, **_PLAIN)
    axes.set(ylim=(y[-1] + 0.6, 0), xlim=(low * (0.75 if min(ratios) < 1 else 1), high * 1.3))
    axes.set_xticks([m for m in marks if low <= m <= high])
    axes.xaxis.set_major_formatter("{x:g} x")
    axes.minorticks_off()
    at_left = blended_transform_factory(figure.transFigure, axes.transData)
    for begin in begins:
        text = rows[begin][0]
        heading = axes.text(0.012, y[begin] - 1, text, transform=at_left, va="center", **_PLAIN)
        heading.set(size=10.5, weight="bold", color=INK, in_layout=False)
    return save_figure(figure, path)


def accuracy_by_speed(
    names: Sequence[str],
    accuracy: Sequence[float | None],
    images_per_second: Sequence[float],
    path: PathLike | None = None,
    *,
    title: str = "Mean IoU by speed",
) -> Figure:
    """One numbered point per model, on a logarithmic axis of speed, and a list of the models.

    Args:
        names: K names of models.
        accuracy: K values in [0, 1]; models with None or NaN are only listed.
        images_per_second: K speeds above 0.
        path: file to save, .png, .svg or .pdf.
        title: heading.

    Raises:
        ValueError: the lengths differ, there are no models, or a speed is not a number above 0.
    """
    if not len(names) == len(accuracy) == len(images_per_second) or not len(names):
        raise ValueError(
            f"there are {len(names)} names, {len(accuracy)} accuracies and "
            f"{len(images_per_second)} speeds; give one of each per model"
        )
    if not all(x > 0 and math.isfinite(x) for x in images_per_second):
        raise ValueError("accuracy_by_speed needs speeds above 0 images per second")
    values = [math.nan if x is None else float(x) for x in accuracy]
    figure = new_figure(9.5, max(4.0, 0.9 + 0.22 * len(names)), title)
    axes, right = figure.subplots(1, 2, width_ratios=(3, 2))
    axes.set_xscale("log")
    axes.scatter(images_per_second, values, s=150, color=BLUE, edgecolor="white", zorder=2)
    for number, at in enumerate(zip(images_per_second, values), 1):
        axes.annotate(f"{number}", at, ha="center", va="center_baseline", size=7.5, color="white")
    style_axes(axes, grid="both")
    # Few speeds have few powers of ten between them.
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
    axes.tick_params(which="minor", labelsize=9, length=0, labelcolor=MUTED)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.margins(0.08)
    axes.set_xlabel("images per second", size=9, color=MUTED)
    right.set_axis_off()
    right.set(xlim=(0, 1), ylim=(len(names) + 0.5, 0.5))
    for number, (name, value) in enumerate(zip(names, values), 1):
        mark = "n/a" if math.isnan(value) else f"{value:.1%}"
        text = f"{number}  {_short(name, 40)}, {mark}"
        right.text(0, number, text, size=9, color=INK, va="center", **_PLAIN)
    return save_figure(figure, path)


# ------------------------------------------------------------------------------ matrices
def confusion_matrix(
    matrix: Any,
    names: Sequence[str],
    path: PathLike | None = None,
    *,
    title: str = "Confusion matrix, % of each labelled class",
) -> Figure:
    """Confusion matrix in percent of each labelled class; classes that do not occur are left out.

    Args:
        matrix: (K, K) counts; row = label, column = prediction.
        names: K class names.
        path: file to save, .png, .svg or .pdf.
        title: heading.

    Raises:
        ValueError: the matrix has the wrong shape, or no count above 0.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import StrMethodFormatter

    counts = np.asarray(matrix, dtype=np.float64)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"matrix has shape {counts.shape}, but there are {len(names)} names")
    occurs = np.flatnonzero(counts.sum(0) + counts.sum(1))
    if not len(occurs):
        raise ValueError("the confusion matrix is empty")
    counts = counts[np.ix_(occurs, occurs)]
    labelled = counts.sum(1, keepdims=True)
    share = np.divide(counts, labelled, out=np.full_like(counts, np.nan), where=labelled > 0)
    K = len(occurs)
    side = min(14.0, max(5.0, 1.8 + 0.42 * K))
    size = float(np.clip(180 / K, 3.5, 9))
    figure = new_figure(side + 0.4, side, title)
    axes = figure.subplots()
    # Square root scale, as most errors are a few per cent.
    shown = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    ticks = [_short(names[k], 24) for k in occurs.tolist()]
    axes.set_xticks(range(K), ticks, rotation=90, **_PLAIN)
    axes.set_yticks(range(K), ticks, **_PLAIN)
    axes.tick_params(length=0, labelsize=size, labelcolor=INK)
    axes.set_xlabel("predicted", size=10, color=MUTED)
    axes.set_ylabel("labelled", size=10, color=MUTED)
    axes.spines[:].set_color(RULE)
    if K <= 25:
        for row, column in zip(*np.nonzero(share >= 0.005)):
            value = share[row, column]
            axes.text(
                *(column, row, f"{100 * value:.0f}"),
                ha="center",
                va="center",
                size=size - 1,
                color="white" if value > 0.35 else INK,
                in_layout=False,
            )
    bar = figure.colorbar(
        shown,
        ax=axes,
        shrink=0.6,
        pad=0.02,
        aspect=30,
        format=StrMethodFormatter("{x:.0%}"),
        ticks=[0, 0.05, 0.25, 0.5, 1],
    )
    bar.ax.tick_params(labelsize=9, length=0, labelcolor=MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return save_figure(figure, path)
