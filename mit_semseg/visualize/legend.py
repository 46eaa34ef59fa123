"""Legends as arrays; without matplotlib, because one is written for each predicted image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mit_semseg.files import PathLike

_INK, _MUTED, _RIM = (38, 42, 51), (112, 119, 133), (205, 208, 214)
_PITCH, _SIDE = 24, 16  # height of a row, and side of a colour patch, in pixels


def legend(
    names: Sequence[str],
    colors: np.ndarray,
    areas: Sequence[float] | None = None,
    *,
    path: PathLike | None = None,
) -> np.ndarray:
    """Draws colour, name and area of each class, in the given order.

    Args:
        names: K class names.
        colors: (K, 3) uint8 RGB.
        areas: K fractions of the image in [0, 1], or None.
        path: image file to write; its folder is created.

    Returns:
        (h, w, 3) uint8 RGB; long legends have several columns.

    Raises:
        ValueError: the lengths differ.
    """
    if len(names) != len(colors) or (areas is not None and len(areas) != len(names)):
        raise ValueError(
            f"there are {len(names)} names, {len(colors)} colours and "
            f"{'no' if areas is None else len(areas)} areas; give one of each per class"
        )
    columns = max(1, math.ceil(len(names) / 30))
    rows = max(1, math.ceil(len(names) / columns))
    wide = min(240, max((_width(str(name)) for name in names), default=100))
    column = 34 + wide + (70 if areas is not None else 10)
    sheet = np.full((20 + _PITCH * rows, 24 + column * columns + 16 * (columns - 1), 3), 255, "u1")
    if not len(names):
        sheet[10 : 10 + _PITCH, 12 : 12 + wide] = _text("nothing labelled", wide, _MUTED)
    for k, name in enumerate(names):
        x, y = 12 + (k // rows) * (column + 16), 10 + _PITCH * (k % rows)
        row, top = slice(y, y + _PITCH), y + (_PITCH - _SIDE) // 2
        sheet[top : top + _SIDE, x : x + _SIDE] = _RIM  # makes very pale classes visible on white
        sheet[top + 1 : top + _SIDE - 1, x + 1 : x + _SIDE - 1] = colors[k]
        sheet[row, x + 26 : x + 26 + wide] = _text(_cut(str(name), wide), wide)
        if areas is not None:
            share = _text(percent(areas[k]), 64, _MUTED, right=True)
            sheet[row, x + column - 70 : x + column - 6] = share
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(path, optimize=True)
    return sheet


def percent(share: float) -> str:
    """A fraction in [0, 1] as text, in percent."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's built-in font, which is the same on every machine.
    return ImageFont.load_default(13)


def _width(text: str) -> int:
    return math.ceil(_font().getlength(text))


@lru_cache(maxsize=1024)
def _cut(text: str, width: int) -> str:
    """The text, shortened with an ellipsis if it is too wide."""
    if _width(text) <= width:
        return text
    return next(x for n in range(len(text), -1, -1) if _width(x := text[:n] + "...") <= width)


# Legends of a folder of images repeat the same lines of text.
@lru_cache(maxsize=4096)
def _text(text: str, width: int, color: tuple[int, ...] = _INK, right: bool = False) -> np.ndarray:
    """A line of text, (24, width, 3) uint8."""
    image = Image.new("RGB", (width, _PITCH), "white")
    place, anchor = ((width, _PITCH / 2), "rm") if right else ((0, _PITCH / 2), "lm")
    ImageDraw.Draw(image).text(place, text, color, _font(), anchor)
    return np.asarray(image)
