"""Smooth lines and text for charts, with Pillow alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PathLike = str | os.PathLike[str]
Color = tuple[int, ...]

INK: Color = (38, 42, 51)
MUTED: Color = (112, 119, 133)
RULE: Color = (224, 227, 233)
PAPER: Color = (255, 255, 255)

# Pillow draws lines without smoothing: everything is drawn this many times larger, then reduced.
_SCALE = 3


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's built-in face, so that a picture looks the same on every machine.
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=4096)
def text_width(text: str, size: int) -> float:
    """Width of a line of text, in pixels."""
    return _font(size * _SCALE).getlength(text) / _SCALE


def fit_text(text: str, size: int, width: float) -> str:
    """The text, or as much of its start as fits, with an ellipsis."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..."


class Canvas:
    """A white sheet; positions and sizes are in pixels of the finished picture."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = math.ceil(width), math.ceil(height)
        self._image = Image.new("RGB", (self.width * _SCALE, self.height * _SCALE), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._pasted: list[tuple[np.ndarray, int, int]] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 13,
        color: Color = INK,
        anchor: str = "lm",
        bold: bool = False,
    ) -> None:
        """A line of text; anchor as in Pillow, such as lm = left end, vertical middle."""
        self._draw.text(
            (x * _SCALE, y * _SCALE),
            text,
            fill=color,
            font=_font(size * _SCALE),
            anchor=anchor,
            # The built-in face has one weight: a hairline around the letters makes it heavier.
            stroke_width=1 if bold else 0,
            stroke_fill=color,
        )

    def line(
        self, points: Sequence[tuple[float, float]], color: Color = INK, width: float = 1
    ) -> None:
        """A line through two or more points, with round joints."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=color, width=round(width * _SCALE), joint="curve")

    def dashed(self, start: tuple[float, float], end: tuple[float, float], color: Color) -> None:
        """A thin dashed line."""
        (x0, y0), (x1, y1) = start, end
        dashes = max(1, round(math.hypot(x1 - x0, y1 - y0) / 8))
        for i in range(dashes):
            a, b = i / dashes, (i + 0.55) / dashes
            self.line(
                [
                    (x0 + (x1 - x0) * a, y0 + (y1 - y0) * a),
                    (x0 + (x1 - x0) * b, y0 + (y1 - y0) * b),
                ],
                color,
            )

    def dot(self, x: float, y: float, radius: float, color: Color) -> None:
        """A filled circle with a white rim."""
        for r, fill in ((radius + 1, PAPER), (radius, color)):
            box = [(x - r) * _SCALE, (y - r) * _SCALE, (x + r) * _SCALE, (y + r) * _SCALE]
            self._draw.ellipse(box, fill=fill)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: Color,
        radius: float = 0,
        rim: Color | None = None,
    ) -> None:
        """A filled rectangle, rounded by radius, with a thin rim when given one."""
        if width <= 0 or height <= 0:
            return
        corners = [x * _SCALE, y * _SCALE, (x + width) * _SCALE - 1, (y + height) * _SCALE - 1]
        radius = min(radius, width / 2, height / 2) * _SCALE
        self._draw.rounded_rectangle(corners, radius, fill=fill, outline=rim, width=_SCALE // 2)

    def paste(self, picture: np.ndarray, x: int, y: int) -> None:
        """A (h, w, 3) uint8 picture, pixel by pixel as it is."""
        self._pasted.append((picture, x, y))

    def array(self) -> np.ndarray:
        """The finished sheet, (height, width, 3) uint8 RGB."""
        small = self._image.resize((self.width, self.height), Image.Resampling.BOX)
        sheet = np.array(small)
        for picture, x, y in self._pasted:
            sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
        return sheet


def write_png(picture: np.ndarray, path: PathLike | None) -> np.ndarray:
    """Write a picture when there is a path, making its folder, and return it."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, format="PNG", optimize=True)
    return picture


def mixed_with_white(color: Sequence[int], share: float) -> Color:
    """A paler version of a colour; share 1 leaves it as it is."""
    return tuple(round(255 + (int(c) - 255) * share) for c in color)
