"""Sheets of images, label maps and error maps, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mit_semseg.files import PathLike
from mit_semseg.visualize.charts import INK, MUTED, new_figure, save_figure
from mit_semseg.visualize.legend import percent
from mit_semseg.visualize.palette import (
    WRONG,
    check_image,
    color_encode,
    error_map,
    overlay,
    paint,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RGB = NDArray[np.uint8]  # (H, W, 3)
Labels = NDArray[Any]  # (H, W) integer class ids, -1 ignored

COLUMNS = ("image", "truth", "prediction", "errors")
# In inches: width of a sheet, margin, gap between images, line of text, line of the legend.
_WIDTH, _EDGE, _GAP, _LINE, _ENTRY = 10.0, 0.12, 0.09, 0.19, 0.22


@dataclass(frozen=True)
class Sample:
    """One evaluated image, its labels, and a prediction.

    Attributes:
        name: its name on a sheet.
        image: (H, W, 3) uint8 RGB.
        truth, prediction: (H, W) class ids, -1 for ignored pixels.
    """

    name: str
    image: RGB
    truth: Labels
    prediction: Labels

    def __post_init__(self) -> None:
        size = self.image.shape[:2]
        for what, labels in (("truth", self.truth), ("prediction", self.prediction)):
            if labels.shape != size:
                raise ValueError(f"{self.name}: {what} is {labels.shape}, the image {size}")

    @property
    def accuracy(self) -> float:
        """Pixel accuracy; NaN if no pixel is labelled."""
        known = self.truth >= 0
        return float(np.mean((self.truth == self.prediction)[known])) if known.any() else np.nan

    def views(self, colors: NDArray[Any]) -> tuple[RGB, RGB, RGB, RGB]:
        """The images of `COLUMNS`, each (H, W, 3) uint8 RGB."""
        return (
            self.image,
            paint(self.truth, colors),
            paint(self.prediction, colors),
            error_map(self.image, self.truth, self.prediction),
        )


def contact_sheet(
    samples: Sequence[Sample],
    names: Sequence[str],
    colors: NDArray[Any],
    path: PathLike | None = None,
    *,
    title: str = "",
) -> Figure:
    """Rows of image, truth, prediction and errors, with a legend of the classes that occur.

    Args:
        samples: the rows.
        names: K class names.
        colors: (K, 3) uint8 RGB.
        path: file to save, .png, .svg or .pdf.
        title: heading.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample")
    rows = [
        _row(sample, colors, COLUMNS if not n else [""] * 4) for n, sample in enumerate(samples)
    ]
    found = _occurring([x for sample in samples for x in (sample.truth, sample.prediction)])
    entries = _entries([*found, -1], [*names, "wrong"], np.array([*colors, WRONG]))
    return _sheet(rows, path, title, entries)


def image_grid(
    tiles: Sequence[tuple[str, RGB | Labels]],
    path: PathLike | None = None,
    *,
    title: str = "",
    columns: int = 6,
    names: Sequence[str] = (),
    colors: NDArray[Any] | None = None,
) -> Figure:
    """Images and label maps in rows, with captions and a legend of the classes.

    Args:
        tiles: (caption, (H, W, 3) uint8 RGB or (H, W) class ids, negative for ignored pixels); a
            caption can have two lines.
        path: file to save, .png, .svg or .pdf.
        title: heading.
        columns: maximum number of tiles in a row.
        names, colors: K class names and (K, 3) uint8 RGB, for label maps.

    Raises:
        ValueError: there are no tiles, or label maps without colours.
    """
    if not tiles:
        raise ValueError("a grid needs at least one image")
    maps = [tile for _, tile in tiles if tile.ndim == 2]
    if maps and colors is None:
        raise ValueError("label maps need colors, (K, 3) uint8 RGB")
    painted = [
        _Tile(caption, tile)
        if colors is None or tile.ndim == 3
        else _Tile(caption, paint(tile, colors), exact=True)
        for caption, tile in tiles
    ]
    columns = min(columns, len(tiles))
    rows = [painted[n : n + columns] for n in range(0, len(painted), columns)]
    entries = [] if colors is None else _entries(_occurring(maps), names, colors)
    return _sheet(rows, path, title, entries)


def prediction_sheet(
    img: np.ndarray,
    pred: np.ndarray,
    names: Sequence[str],
    colors: np.ndarray,
    truth: np.ndarray | None = None,
    *,
    path: PathLike | None = None,
    title: str = "",
) -> Figure:
    """Image, prediction and, if given, truth and errors, with a legend of the classes that occur.

    Args:
        img: (H, W, 3) uint8 RGB.
        pred: (H, W) class ids.
        names: K class names.
        colors: (K, 3) uint8 RGB.
        truth: (H, W) class ids, -1 for ignored pixels.
        path: file to save, .png, .svg or .pdf.
        title: heading, such as the file name.

    Raises:
        ValueError: sizes differ, or a class has no colour.
    """
    img, pred = check_image(img, "img"), np.asarray(pred)
    for name, other in (("pred", pred), ("truth", truth)):
        if other is not None and other.shape != img.shape[:2]:
            raise ValueError(
                f"{name} is {other.shape} but img {img.shape[:2]}; sizes must be equal"
            )
    if truth is None:
        rows = [
            [
                _Tile("image", img),
                _Tile("prediction", color_encode(pred, colors), exact=True),
                _Tile("prediction over image", overlay(img, pred, colors, 0.55, outline=True)),
            ]
        ]
    else:
        sample = Sample(title, img, truth, pred)
        accuracy = "" if np.isnan(sample.accuracy) else f", accuracy {percent(sample.accuracy)}"
        tiles = _row(sample, colors, (*COLUMNS[:3], COLUMNS[3] + accuracy))
        rows = [tiles[::2], tiles[1::2]]
    shares = np.bincount(pred[pred >= 0].reshape(-1), minlength=len(names)) / max(pred.size, 1)
    found = _occurring([pred] if truth is None else [pred, truth])
    found = sorted(found, key=lambda k: -shares[k])
    labels = [f"{name}  {percent(share)}" for name, share in zip(names, shares)]
    return _sheet(rows, path, title, _entries(found, labels, colors))


# ------------------------------------------------------------------------------ layout
class _Tile(NamedTuple):
    """An image of a sheet; `exact`: it has class colours, which must not be interpolated."""

    caption: str
    image: RGB
    exact: bool = False


def _row(sample: Sample, colors: NDArray[Any], captions: Sequence[str]) -> list[_Tile]:
    views = zip(captions, sample.views(colors), (False, True, True, False))
    return [_Tile(*view) for view in views]


def _occurring(maps: Sequence[Labels]) -> list[int]:
    """Sorted class ids that occur in any of the label maps."""
    found: set[int] = set()
    for labels in maps:
        found.update(np.unique(labels[labels >= 0]).tolist())
    return sorted(found)


def _entries(
    classes: Sequence[int], names: Sequence[str], colors: NDArray[Any]
) -> list[tuple[str, str]]:
    """(name, colour) entries of a legend; none if there are no names."""
    hexadecimal = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.asarray(colors).tolist()]
    return [(str(names[k]), hexadecimal[k]) for k in classes] if len(names) else []


def _caption_size(row: Sequence[_Tile], width: float) -> float:
    """Font size in points at which captions do not overlap; empty captions leave space."""
    size, free = 9.0, 0
    for tile in reversed(row):
        free += 1
        if tile.caption:
            longest = max(map(len, tile.caption.split("\n")))
            size, free = min(size, 72 * free * width / (0.6 * longest)), 0
    return size


def _legend_shape(names: Sequence[str], width: float) -> tuple[int, int]:
    """Rows and columns of a legend; matplotlib fills columns, of the width of the longest name."""
    inches = [0.42 + 0.073 * len(name) for name in names]
    for columns in range(len(names), 0, -1):
        rows = math.ceil(len(names) / columns)
        if sum(max(inches[n : n + rows]) for n in range(0, len(names), rows)) <= width:
            return rows, math.ceil(len(names) / rows)
    return len(names), 1


def _sheet(
    rows: Sequence[Sequence[_Tile]],
    path: PathLike | None,
    title: str,
    entries: Sequence[tuple[str, str]],
) -> Figure:
    """Rows of tiles below a title and a legend; all columns have equal width."""
    from matplotlib.patches import Patch

    columns = max(len(row) for row in rows)
    wide = min(4.5, (_WIDTH - 2 * _EDGE + _GAP) / columns - _GAP)
    across = 2 * _EDGE + columns * (wide + _GAP) - _GAP
    # Portrait images are limited to the height of a square.
    tall = [
        min(wide, wide * max(tile.image.shape[0] / tile.image.shape[1] for tile in row))
        for row in rows
    ]
    lines = [max(t.caption.count("\n") + bool(t.caption) for t in row) for row in rows]
    size = min(_caption_size(row, wide) for row in rows)
    line = _LINE * size / 9
    key_rows, key_columns = _legend_shape([name for name, _ in entries], across - 2 * _EDGE)
    head = _EDGE + (0.34 if title else 0)
    legend = head
    head += _ENTRY * key_rows
    down = head + sum(tall) + sum(line * n + _GAP for n in lines) + _EDGE

    figure = new_figure(across, down)
    figure.set_layout_engine("none")  # all positions are computed here
    if title:
        corner = _EDGE / across, 1 - _EDGE / down
        figure.text(*corner, title, va="top", size=13, weight="bold", color=INK, parse_math=False)
    if entries:
        box = figure.legend(
            [Patch(facecolor=c, edgecolor="#00000030", linewidth=0.6) for _, c in entries],
            [name for name, _ in entries],
            loc="upper left",
            bbox_to_anchor=(_EDGE / across, 1 - legend / down),
            ncols=key_columns,
            fontsize=9,
            labelcolor=INK,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handlelength=1,
            handleheight=1,
            handletextpad=0.5,
        )
        for text in box.get_texts():
            text.set_parse_math(False)
    y = head
    for row, height, count in zip(rows, tall, lines):
        y += line * count
        for n, tile in enumerate(row):
            x = _EDGE + n * (wide + _GAP)
            place = (x / across, 1 - (y + height) / down, wide / across, height / down)
            axes = figure.add_axes(place)
            axes.imshow(tile.image, interpolation="nearest" if tile.exact else "antialiased")
            axes.set_axis_off()
            axes.set_anchor("NW")
            axes.set_title(
                tile.caption, loc="left", size=size, color=MUTED, pad=3, parse_math=False
            )
        y += height + _GAP
    return save_figure(figure, path)
