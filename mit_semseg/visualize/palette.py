"""Palettes of distinct colours, and coloured label maps."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np

# Colours of unlabelled (grey) and wrong (red) pixels, in sheets and pages.
IGNORED, WRONG = (196, 199, 206), (226, 45, 72)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 -> CIE L*a*b* (D65), which is approximately perceptually uniform."""
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
    """Greedy choice: each colour is the farthest from all before it, and from black and white."""
    steps = np.linspace(0, 255, 16).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(candidates)
    # Neither dark nor pale nor too saturated, to be visible on images and beside black.
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
    """Distinct, deterministic colours; a smaller palette is a prefix of a larger one.

    Args:
        num_class: number of classes K, at most 1000.

    Returns:
        (K, 3) uint8 RGB, without black, which means unlabelled.

    Raises:
        ValueError: num_class is outside 1..1000.
    """
    if not 1 <= num_class <= 1000:
        raise ValueError(f"num_class is {num_class}; there are distinct colours for 1 to 1000")
    return np.frombuffer(_farthest(num_class), dtype=np.uint8).reshape(-1, 3).copy()


def check_image(img: Any, name: str) -> np.ndarray:
    """The image as an array; ValueError if it is not (H, W, 3) uint8."""
    array = np.asarray(img)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; give (H, W, 3) uint8 RGB"
        )
    return array


def color_encode(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colours a label map.

    Args:
        label: (H, W) integer class ids; negative ids are unlabelled, and black.
        colors: (K, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: a label has no colour, or a shape or dtype is wrong.
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
        # With OpenCV, ten times as fast as with NumPy; -1 becomes 255, which is black.
        entries = np.zeros((256, 1, 3), dtype=np.uint8)
        entries[: len(table), 0] = table
        ids = (label if unsigned else np.maximum(label, -1)).astype(np.uint8, order="C", copy=False)
        return cv2.applyColorMap(ids, entries)
    # Index -1 is the last row, black.
    table = np.concatenate([table, np.zeros((1, 3), np.uint8)])
    return table[label if unsigned else np.maximum(label, -1)]


def paint(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """`color_encode` with grey instead of black for unlabelled pixels."""
    painted = color_encode(label, colors)
    painted[label < 0] = IGNORED
    return painted


def error_map(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image in pale grey, with wrong pixels in red and unlabelled pixels in grey.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) class ids, negative for unlabelled pixels.
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
    """Blends a coloured label map with its image; unlabelled pixels show the image only.

    Args:
        img: (H, W, 3) uint8 RGB.
        label: (H, W) class ids, negative for unlabelled pixels.
        colors: (K, 3) uint8 RGB.
        alpha: opacity of the colours, 0 to 1.
        outline: draw dark boundaries between classes.

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
    """Concatenates images of equal height horizontally.

    Args:
        pictures: images, (H, W, 3) uint8 RGB each.
        gap: width of the white gap between them, in pixels.

    Returns:
        (H, sum of widths and gaps, 3) uint8 RGB.

    Raises:
        ValueError: there are no images, or heights differ.
    """
    parts = [check_image(p, f"pictures[{i}]") for i, p in enumerate(pictures)]
    heights = [part.shape[0] for part in parts]
    if len(set(heights)) != 1:
        raise ValueError(f"pictures have heights {heights}; give one or more of equal height")
    row = [parts[0]]
    for part in parts[1:]:
        row += [np.full((heights[0], gap, 3), 255, np.uint8), part]
    return np.concatenate(row, axis=1)
