"""Colours that can be told apart, and label maps drawn in them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np

# Grey of unlabelled pixels and red of wrong ones, on sheets and pages.
IGNORED, WRONG = (196, 199, 206), (226, 45, 72)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 to CIE L*a*b* (D65), where equal distances look about equally different."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    t = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    fx, fy, fz = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=-1)


@lru_cache(maxsize=8)
def _farthest(num_class: int) -> bytes:
    """Every next colour is the one farthest from all before it, and from black and white."""
    steps = np.linspace(0, 255, 16).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(candidates)
    # Neither dark nor pale, to show on a picture and beside unlabelled black; nor glaring.
    fits = (lab[:, 0] > 35) & (lab[:, 0] < 88) & (np.hypot(lab[:, 1], lab[:, 2]) < 80)
    candidates, lab = candidates[fits], lab[fits]
    anchors = _lab(np.array([[0.0, 0.0, 0.0], [255.0, 255.0, 255.0], [128.0, 128.0, 128.0]]))
    nearest = np.min(np.linalg.norm(lab[:, None] - anchors, axis=-1), axis=1)
    chosen = []
    for _ in range(num_class):
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=-1))
    return np.array(chosen, dtype=np.uint8).tobytes()


def palette(num_class: int) -> np.ndarray:
    """Distinct colours, always the same ones; a smaller palette is the start of a larger one.

    Args:
        num_class: number of classes K, at most 1000.

    Returns:
        (K, 3) uint8 RGB; none is black, which stands for unlabelled.

    Raises:
        ValueError: num_class is outside 1..1000.
    """
    if not 1 <= num_class <= 1000:
        raise ValueError(f"num_class is {num_class}; colours can be told apart for 1 to 1000")
    return np.frombuffer(_farthest(num_class), dtype=np.uint8).reshape(-1, 3).copy()


def check_image(img: Any, name: str) -> np.ndarray:
    """The image as an array.

    Raises:
        ValueError: it is not (H, W, 3) uint8.
    """
    array = np.asarray(img)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; give (H, W, 3) uint8 RGB"
        )
    return array


def color_encode(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """A label map in colour.

    Args:
        label: (H, W) integer class ids; negative ones are unlabelled and stay black.
        colors: (K, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: a label has no colour, or a shape or type is wrong.
    """
    label, table = np.asarray(label), np.asarray(colors)
    if label.ndim != 2 or label.dtype.kind not in "iu":
        raise ValueError(
            f"label is {label.dtype} of shape {label.shape}; give (H, W) integer class ids"
        )
    if table.ndim != 2 or table.shape[1] != 3:
        raise ValueError(f"colors has shape {table.shape}; give (K, 3) uint8 RGB")
    if label.size and label.max() >= len(table):
        raise ValueError(f"label {label.max()} has no colour: there are {len(table)} colours")
    unsigned = label.dtype.kind == "u"
    table = table.astype(np.uint8)
    if label.size and len(table) <= (256 if unsigned else 255):
        # One table of 256 entries, by OpenCV ten times as fast as by NumPy; -1 becomes 255, black.
        entries = np.zeros((256, 1, 3), dtype=np.uint8)
        entries[: len(table), 0] = table
        ids = (label if unsigned else np.maximum(label, -1)).astype(np.uint8, order="C", copy=False)
        return cv2.applyColorMap(ids, entries)
    # Index -1 is the table's last row: black.
    table = np.concatenate([table, np.zeros((1, 3), np.uint8)])
    return table[label if unsigned else np.maximum(label, -1)]


def paint(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """`color_encode` for sheets and pages: unlabelled pixels are grey, not black."""
    painted = color_encode(label, colors)
    painted[label < 0] = IGNORED
    return painted


def error_map(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image in pale grey, wrong pixels red; unlabelled pixels are grey and never wrong.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) class ids, negative where unlabelled.
        prediction: (H, W) class ids.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    pale = np.rint(np.repeat(165 + 0.35 * grey, 3, axis=2)).astype(np.uint8)
    pale[truth < 0] = IGNORED
    pale[(truth >= 0) & (truth != prediction)] = WRONG
    return pale


def overlay(
    img: np.ndarray,
    label: np.ndarray,
    colors: np.ndarray,
    alpha: float = 0.5,
    outline: bool = False,
) -> np.ndarray:
    """A label map laid over its picture; unlabelled pixels show the picture alone.

    Args:
        img: (H, W, 3) uint8 RGB.
        label: (H, W) class ids, negative where unlabelled.
        colors: (K, 3) uint8 RGB.
        alpha: opacity of the colours, 0 to 1.
        outline: draw a dark line where classes meet.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: sizes differ, alpha is outside 0..1, or as for `color_encode`.
    """
    img, label = check_image(img, "img"), np.asarray(label)
    if img.shape[:2] != label.shape:
        raise ValueError(f"img is {img.shape[:2]} but label {label.shape}; sizes must be equal")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give an opacity in 0..1")
    colored = color_encode(label, colors)
    if not img.size:
        return colored
    result: np.ndarray = cv2.addWeighted(img, 1 - alpha, colored, alpha, 0)
    if label.dtype.kind == "i" and label.min() < 0:
        result = np.where((label >= 0)[..., None], result, img)
    if outline:
        edge = np.zeros(label.shape, dtype=bool)
        edge[1:] |= label[1:] != label[:-1]
        edge[:, 1:] |= label[:, 1:] != label[:, :-1]
        result[edge] //= 3
    return result


def side_by_side(*pictures: np.ndarray, gap: int = 0) -> np.ndarray:
    """Pictures of equal height in a row, such as image, prediction and truth.

    Args:
        pictures: (H, W, 3) uint8 RGB each.
        gap: white pixels between them.

    Returns:
        (H, sum of widths and gaps, 3) uint8 RGB.

    Raises:
        ValueError: none given, or heights differ.
    """
    parts = [check_image(p, f"pictures[{i}]") for i, p in enumerate(pictures)]
    heights = [part.shape[0] for part in parts]
    if len(set(heights)) != 1:
        raise ValueError(f"pictures have heights {heights}; give one or more of equal height")
    row = [parts[0]]
    for part in parts[1:]:
        row += [np.full((heights[0], gap, 3), 255, np.uint8), part]
    return np.concatenate(row, axis=1)
