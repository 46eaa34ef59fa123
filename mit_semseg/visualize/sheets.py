"""Legends, and one sheet that shows a prediction whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from mit_semseg.visualize.canvas import (
    MUTED,
    RULE,
    Canvas,
    PathLike,
    fit_text,
    text_width,
    write_png,
)
from mit_semseg.visualize.palette import _check_picture, color_encode, overlay

_PITCH = 24


def legend(
    names: Sequence[str],
    colors: np.ndarray,
    areas: Sequence[float] | None = None,
    *,
    path: PathLike | None = None,
) -> np.ndarray:
    """Colour, name and share of the image of each class, in the order given.

    Args:
        names: K class names.
        colors: (K, 3) uint8 RGB.
        areas: K shares in [0, 1], or None to leave them out.
        path: PNG that is written.

    Returns:
        (h, w, 3) uint8 RGB; long tables are set in several columns.

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
    name_width = min(240, max((math.ceil(text_width(str(name), 13)) for name in names), default=80))
    column = 34 + name_width + (70 if areas is not None else 10)
    size = (20 + _PITCH * rows, 24 + column * columns + 16 * (columns - 1))
    if not len(names):
        empty = Canvas(size[1], size[0])
        empty.text(12, 10 + _PITCH / 2, "nothing labelled", 13, MUTED)
        return write_png(empty.array(), path)
    sheet = np.full((*size, 3), 255, dtype=np.uint8)
    for k, name in enumerate(names):
        x, y = 12 + (k // rows) * (column + 16), 10 + _PITCH * (k % rows)
        color = tuple(int(v) for v in colors[k])
        row = _row(fit_text(str(name), 13, name_width), color, 26 + name_width)
        sheet[y : y + _PITCH, x : x + row.shape[1]] = row
        if areas is not None:
            share = _share(_percent(areas[k]))
            sheet[y : y + _PITCH, x + column - share.shape[1] : x + column] = share
    return write_png(sheet, path)


# Legends of a folder of images are made of the same pieces: they are drawn once.
@lru_cache(maxsize=1024)
def _row(name: str, color: tuple[int, ...], width: int) -> np.ndarray:
    """Colour and name of a class, (24, width, 3) uint8."""
    sheet = Canvas(width, _PITCH)
    _entry(sheet, 0, _PITCH / 2, name, color)
    return sheet.array()


@lru_cache(maxsize=2048)
def _share(text: str) -> np.ndarray:
    """The area of a class, (24, 70, 3) uint8, at the right end."""
    sheet = Canvas(70, _PITCH)
    sheet.text(64, _PITCH / 2, text, 13, MUTED, anchor="rm")
    return sheet.array()


def prediction_sheet(
    img: np.ndarray,
    pred: np.ndarray,
    names: Sequence[str],
    colors: np.ndarray,
    truth: np.ndarray | None = None,
    *,
    path: PathLike | None = None,
    title: str = "",
) -> np.ndarray:
    """Image, prediction and, where known, truth and mistakes, with a legend of what occurs.

    Args:
        img: (H, W, 3) uint8 RGB.
        pred: (H, W) class ids.
        names: K class names.
        colors: (K, 3) uint8 RGB.
        truth: (H, W) class ids, -1 where ignored.
        path: PNG that is written.
        title: heading, such as the file name.

    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        ValueError: sizes differ, or a class has no colour.
    """
    img, pred = _check_picture(img, "img"), np.asarray(pred)
    for name, other in (("pred", pred), ("truth", truth)):
        if other is not None and other.shape != img.shape[:2]:
            raise ValueError(
                f"{name} is {other.shape} but img {img.shape[:2]}; sizes must be equal"
            )
    panels = [
        ("image", img),
        ("prediction", color_encode(pred, colors)),
        ("prediction over image", overlay(img, pred, colors, 0.55, outline=True)),
    ]
    if truth is not None:
        valid = truth >= 0
        wrong = valid & (pred != truth)
        right = 1 - wrong.sum() / max(int(valid.sum()), 1)
        panels[2:] = [
            ("truth", color_encode(truth, colors)),
            (f"mistakes in red, {_percent(right)} right", _mistakes(img, valid, wrong)),
        ]
    # Large photographs are reduced, small ones enlarged, to a panel that can be looked at.
    H, W = img.shape[:2]
    scale = 420 / max(W, H * 4 / 3)
    w, h = max(1, round(W * scale)), max(1, round(H * scale))
    across = 2 if truth is not None else 3
    down = math.ceil(len(panels) / across)

    shown = _by_area(pred, truth, len(names))
    room = max(1, int(((h + 30) * down - 30) // _PITCH))
    extra = len(shown) - room
    if extra > 0:
        shown, extra = shown[: room - 1], extra + 1
    name_width = min(200.0, max((text_width(str(names[k]), 13) for k in shown), default=60))
    head = 56 if title else 16
    side = 34 + name_width + 66
    sheet = Canvas(16 + (w + 16) * across + side + 8, head + (h + 30) * down + 10)
    if title:
        sheet.text(16, 28, fit_text(title, 20, sheet.width - 32), 20, bold=True)
    for i, (caption, picture) in enumerate(panels):
        x, y = 16 + (w + 16) * (i % across), head + (h + 30) * (i // across)
        sheet.text(x, y + 9, caption, 13, MUTED)
        # Colours of classes may not be blended into colours that mean other classes.
        kind = (
            Image.Resampling.NEAREST
            if caption in ("prediction", "truth")
            else Image.Resampling.LANCZOS
        )
        sheet.paste(np.asarray(Image.fromarray(picture).resize((w, h), kind)), x, y + 22)
    x = 24 + (w + 16) * across
    shares = np.bincount(pred[pred >= 0].reshape(-1), minlength=len(names)) / pred.size
    for r, k in enumerate(shown):
        y = head + 22 + _PITCH * (r + 0.5)
        color = tuple(int(v) for v in colors[k])
        _entry(sheet, x, y, fit_text(str(names[k]), 13, name_width), color)
        sheet.text(x + side - 14, y, _percent(shares[k]), 13, MUTED, anchor="rm")
    if extra > 0:
        y = head + 22 + _PITCH * (len(shown) + 0.5)
        sheet.text(x + 26, y, f"and {extra} more", 13, MUTED)
    return write_png(sheet.array(), path)


def _by_area(pred: np.ndarray, truth: np.ndarray | None, num_class: int) -> list[int]:
    """Classes that are predicted or true somewhere, the largest predicted area first."""
    counts = [
        np.bincount(label[label >= 0].reshape(-1), minlength=num_class)
        for label in (pred, truth)
        if label is not None
    ]
    occurs = np.sum(counts, axis=0)
    return [int(k) for k in np.lexsort((-occurs, -counts[0])) if occurs[k]]


def _mistakes(img: np.ndarray, valid: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The picture in grey, red where the prediction is wrong, darker where nothing is known."""
    grey = img.mean(axis=2)
    picture = np.repeat((grey * 0.5 + 120)[..., None], 3, axis=2)
    picture[~valid] *= 0.35
    picture[wrong] = 0.35 * picture[wrong] + 0.65 * np.array([225.0, 30.0, 40.0])
    return picture.clip(0, 255).astype(np.uint8)


def _entry(sheet: Canvas, x: float, y: float, name: str, color: tuple[int, ...]) -> None:
    sheet.box(x, y - 8, 16, 16, color, radius=3, rim=RULE)
    sheet.text(x + 26, y, name, 13)


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
