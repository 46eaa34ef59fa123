"""Training curves and per-class bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mit_semseg.visualize.canvas import (
    INK,
    MUTED,
    RULE,
    Canvas,
    Color,
    PathLike,
    fit_text,
    mixed_with_white,
    text_width,
    write_png,
)

_BLUE, _ORANGE, _GREEN = (37, 99, 190), (224, 112, 32), (30, 140, 90)


@dataclass
class _Series:
    name: str
    color: Color
    points: list[tuple[float, float]] = field(default_factory=list)
    sparse: bool = False  # few points, each of which matters: drawn with dots


@dataclass
class _Panel:
    title: str
    series: list[_Series]
    percent: bool = False
    unit: str = "epoch"  # of the horizontal axis


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that enclose low..high."""
    span = high - low
    if span <= 1e-9 * abs(low) or span < 1e-30:
        span = abs(low) if abs(low) > 1e-30 else 1.0
        high = low + span
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(magnitude * m for m in (1, 2, 5, 10) if magnitude * m * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def curves(
    history: Iterable[Mapping[str, Any]],
    path: PathLike | None = None,
    *,
    title: str = "Training",
) -> np.ndarray:
    """Loss, accuracy, mean IoU and learning rates over the epochs.

    Args:
        history: one dict per figure taken, as in metrics.jsonl. `epoch` counts from 1 and is the
            epoch a figure was taken in, `step` the optimizer step, over all epochs (a record
            without it stands at the end of its epoch). Of the rest, `loss`, `accuracy`,
            `mean_iou`, `pixel_accuracy`, `lr_encoder` and `lr_decoder` are drawn; what is
            missing or not finite is left out.
        path: PNG that is written.
        title: heading.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    records = [r for r in history if "epoch" in r]
    # The steps an epoch has: the last record before its end comes closest.
    steps = max(
        (r["step"] / r["epoch"] for r in records if r.get("step") and r["epoch"]), default=1
    )

    def series(name: str, key: str, color: Color, sparse: bool = False) -> _Series:
        points = [
            (r["step"] / steps if "step" in r else float(r["epoch"]), float(r[key]))
            for r in records
            if r.get(key) is not None and math.isfinite(r[key])
        ]
        return _Series(name, color, sorted(points), sparse)

    panels = [
        _Panel("Loss", [series("training", "loss", _BLUE)]),
        _Panel(
            "Accuracy and mean IoU",
            [
                series("training accuracy", "accuracy", _BLUE),
                series("validation accuracy", "pixel_accuracy", _ORANGE, sparse=True),
                series("validation mean IoU", "mean_iou", _GREEN, sparse=True),
            ],
            percent=True,
        ),
        _Panel(
            "Learning rate",
            [series("encoder", "lr_encoder", _BLUE), series("decoder", "lr_decoder", _ORANGE)],
        ),
    ]
    for panel in panels:
        panel.series = [s for s in panel.series if s.points]
    panels = [panel for panel in panels if panel.series]
    width, height, top = 470, 330, 48
    sheet = Canvas(width * max(1, len(panels)), top + height)
    sheet.text(20, 28, title, 20, bold=True)
    best = max(
        (y for p in panels for s in p.series if "IoU" in s.name for _, y in s.points), default=None
    )
    if best is not None:
        note = f"best mean IoU {100 * best:.1f} %"
        sheet.text(sheet.width - 20, 29, note, 14, MUTED, anchor="rm")
    if not panels:
        sheet.text(20, top + height / 2, "no figures yet", 14, MUTED)
    end = max((x for p in panels for s in p.series for x, _ in s.points), default=1)
    for i, panel in enumerate(panels):
        _draw_panel(sheet, panel, width * i, top, width, height, end)
    return write_png(sheet.array(), path)


def _draw_panel(
    sheet: Canvas, panel: _Panel, x0: float, y0: float, width: float, height: float, end: float
) -> None:
    """One chart with its axes; the horizontal axis runs from 0 to `end` epochs."""
    left, right = x0 + 62, x0 + width - 20
    top, bottom = y0 + 66, y0 + height - 46
    values = [y for s in panel.series for _, y in s.points]
    # Loss, rate and share all start at 0; a share may not pass 1.
    rows = ticks(min(0.0, *values), 1.0 if panel.percent else max(*values, 1e-9))
    low, high = rows[0], rows[-1]
    columns = [t for t in ticks(0, end, 6) if t <= end * 1.001]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * x / max(end, 1e-9),
            bottom - (bottom - top) * (y - low) / (high - low),
        )

    sheet.text(left - 42, y0 + 18, panel.title, 15, bold=True)
    for row in rows:
        y = at(0, row)[1]
        sheet.line([(left, y), (right, y)], MUTED if row == low else RULE)
        label = f"{100 * row:.0f} %" if panel.percent else f"{row:g}"
        sheet.text(left - 8, y, label, 12, MUTED, anchor="rm")
    for column in columns:
        x = at(column, low)[0]
        sheet.line([(x, bottom), (x, bottom + 4)], MUTED)
        sheet.text(x, bottom + 14, f"{column:g}", 12, MUTED, anchor="mm")
    sheet.text((left + right) / 2, bottom + 33, panel.unit, 12, MUTED, anchor="mm")

    x = left - 42
    for one in panel.series:
        points = [at(*point) for point in one.points]
        if one.sparse:
            _polyline(sheet, points, one.color, 2)
            if len(points) <= 40:
                for point in points:
                    sheet.dot(*point, 3, one.color)
        elif len(points) > 12:
            # What is drawn pale is what was measured; the strong line shows where it goes.
            _polyline(sheet, points, mixed_with_white(one.color, 0.3), 1)
            _polyline(sheet, [at(*p) for p in _smooth(one.points)], one.color, 2)
        else:
            _polyline(sheet, points, one.color, 2)
        sheet.line([(x, y0 + 42), (x + 16, y0 + 42)], one.color, 3)
        sheet.text(x + 22, y0 + 42, one.name, 12)
        x += 22 + text_width(one.name, 12) + 16


def _polyline(
    sheet: Canvas, points: Sequence[tuple[float, float]], color: Color, width: float
) -> None:
    if len(points) == 1:
        sheet.dot(*points[0], 3, color)
    else:
        sheet.line(points, color, width)


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a window of about a twentieth of the points."""
    reach = max(1, len(points) // 40)
    y = [y for _, y in points]
    return [
        (x, float(np.mean(y[max(i - reach, 0) : i + reach + 1]))) for i, (x, _) in enumerate(points)
    ]


def class_bars(
    names: Sequence[str],
    iou: Any,
    colors: np.ndarray,
    path: PathLike | None = None,
    *,
    title: str = "IoU per class",
    what: str = "classes",
    widest: float = 190.0,
) -> np.ndarray:
    """One bar per class in its colour, the best first; absent classes say n/a at the end.

    Args:
        names: K class names.
        iou: K values in [0, 1]; NaN or None where the class is absent.
        colors: (K, 3) uint8 RGB.
        path: PNG that is written.
        title: heading.
        what: what the bars are of.
        widest: pixels of a name, at most; longer ones are cut.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ValueError: the lengths differ, or there are no classes.
    """
    values = [math.nan if v is None else float(v) for v in iou]
    if not len(names) == len(values) == len(colors) or not values:
        raise ValueError(
            f"there are {len(names)} names, {len(values)} values and {len(colors)} colours; "
            "give one of each per class"
        )
    known = [v for v in values if not math.isnan(v)]
    mean = sum(known) / len(known) if known else None
    order = sorted(range(len(values)), key=lambda k: (math.isnan(values[k]), -_or_zero(values[k])))
    columns = 1 if len(order) <= 30 else 2 if len(order) <= 80 else 3
    rows = math.ceil(len(order) / columns)
    pitch, bar, top, bottom = 26, 260, 96, 20
    name_width = min(widest, max(text_width(str(name), 13) for name in names))
    column = name_width + 12 + bar + 64
    sheet = Canvas(40 + column * columns + 24 * (columns - 1), top + pitch * rows + bottom)
    sheet.text(20, 28, title, 20, bold=True)
    summary = "no class occurs"
    if mean is not None:
        absent = f", {len(values) - len(known)} absent" if len(known) < len(values) else ""
        summary = f"mean {100 * mean:.1f} % over {len(known)} {what}{absent}"
    sheet.text(20, 54, summary, 14, MUTED)
    for c in range(columns):
        part = order[c * rows : (c + 1) * rows]
        x = 20 + c * (column + 24)
        start = x + name_width + 12
        foot = top + pitch * len(part)
        for share in (0, 0.25, 0.5, 0.75, 1):
            sheet.line([(start + bar * share, top - 6), (start + bar * share, foot)], RULE)
            sheet.text(start + bar * share, top - 14, f"{100 * share:.0f}", 11, MUTED, "mm")
        for r, k in enumerate(part):
            y = top + pitch * (r + 0.5)
            absent_class = math.isnan(values[k])
            name = fit_text(str(names[k]), 13, name_width)
            sheet.text(start - 12, y, name, 13, MUTED if absent_class else INK, anchor="rm")
            if absent_class:
                sheet.text(start + 6, y, "n/a", 12, MUTED)
                continue
            color = tuple(int(v) for v in colors[k])
            length = bar * min(max(values[k], 0.0), 1.0)
            # The rim keeps a very pale class visible on white.
            rim = mixed_with_white([v // 2 for v in color], 0.8)
            sheet.box(start, y - 8, max(length, 1.5), 16, color, radius=2, rim=rim)
            sheet.text(start + bar + 8, y, f"{100 * values[k]:.1f} %", 12)
        if mean is not None:
            sheet.dashed((start + bar * mean, top - 6), (start + bar * mean, foot), INK)
    return write_png(sheet.array(), path)


def ratio_bars(
    rows: Sequence[tuple[str, str, float]], path: PathLike | None = None, *, title: str = "Ratios"
) -> np.ndarray:
    """One bar per ratio, in groups, on a logarithmic axis on which 1 is no difference.

    Args:
        rows: (group, name, ratio above 0) in the order they are drawn; groups get a heading.
        path: PNG that is written.
        title: heading.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ValueError: there are no rows, or a ratio is not a number above 0.
    """
    if not rows or not all(ratio > 0 and math.isfinite(ratio) for *_, ratio in rows):
        raise ValueError("ratio_bars draws at least one ratio; each must be a number above 0")
    groups = list(dict.fromkeys(group for group, _, _ in rows))
    pitch, bar, top = 26, 320, 84
    name_width = min(620.0, max(text_width(name, 13) for _, name, _ in rows))
    start = 20 + name_width + 12
    sheet = Canvas(start + bar + 90, top + pitch * len(rows) + 34 * len(groups) + 20)
    sheet.text(20, 28, title, 20, bold=True)
    marks = (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
    ratios = [ratio for *_, ratio in rows]
    low = max((m for m in marks if m <= min(1, *ratios)), default=min(ratios))
    high = min((m for m in marks if m >= max(2, *ratios)), default=max(ratios))

    def at(ratio: float) -> float:
        return start + bar * math.log(ratio / low) / math.log(high / low)

    for mark in (m for m in marks if low <= m <= high):
        color = MUTED if mark == 1 else RULE
        sheet.line([(at(mark), top - 6), (at(mark), sheet.height - 14)], color)
        sheet.text(at(mark), top - 16, f"{mark:g} x", 11, MUTED, "mm")
    y = float(top)
    for number, group in enumerate(groups):
        sheet.text(20, y + 18, group, 14, bold=True)
        y += 34
        color = (_BLUE, _ORANGE, _GREEN)[number % 3]
        for _, name, ratio in (row for row in rows if row[0] == group):
            left, right = sorted((at(1), at(ratio)))
            sheet.text(start - 12, y + 8, fit_text(name, 13, name_width), 13, anchor="rm")
            sheet.box(left, y, max(right - left, 1.5), 16, color, radius=2)
            sheet.text(right + 8, y + 8, f"{ratio:.2f} x", 12)
            y += pitch
    return write_png(sheet.array(), path)


def loss_curves(
    runs: Mapping[str, Sequence[float]], path: PathLike | None = None, *, title: str = "Loss"
) -> np.ndarray:
    """The losses of several runs over their length, smoothed, in one chart.

    Args:
        runs: name -> losses in order, taken at equal steps; at most four runs.
        path: PNG that is written.
        title: heading.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ValueError: there are no runs, too many, or one is empty.
    """
    colors = (_ORANGE, _BLUE, _GREEN, MUTED)
    if not 0 < len(runs) <= len(colors) or not all(len(run) for run in runs.values()):
        raise ValueError(f"loss_curves draws 1 to {len(colors)} runs of at least one loss each")
    series = [
        _Series(name, color, [(float(i + 1), float(y)) for i, y in enumerate(losses)])
        for color, (name, losses) in zip(colors, runs.items())
    ]
    width, height, top = 760, 380, 48
    sheet = Canvas(width, top + height)
    sheet.text(20, 28, title, 20, bold=True)
    panel, end = _Panel("", series, unit="figure taken"), max(len(run) for run in runs.values())
    _draw_panel(sheet, panel, 0, top, width, height, end)
    return write_png(sheet.array(), path)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
