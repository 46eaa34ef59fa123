"""Predictions as images: colours, overlays, label files, legends."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from mit_semseg.files import PathLike
from mit_semseg.visualize.legend import legend
from mit_semseg.visualize.palette import color_encode, overlay, side_by_side

# Kinds with the height and dtype of the image, unlike "index" and "legend".
_DRAWN = ("color", "overlay", "side")
# Number of pixels that are drawn at a time.
_BAND = 1 << 20


class Classes(Protocol):
    """Interface of `dataset.ClassTable`: K names, and colours (K, 3) uint8 RGB."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def colors(self) -> np.ndarray: ...


def render(
    kind: str, image: np.ndarray, labels: np.ndarray, classes: Classes, offset: int = 0
) -> Image.Image:
    """Draws a prediction.

    Args:
        kind: color, index, overlay, side (image and colours side by side) or legend.
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) class ids.
        classes: names and colours.
        offset: for index images, see `index_image`.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind == "index":
        return index_image(labels, classes.colors, offset)
    return Image.fromarray(_drawn(kind, image, labels, classes))


def save_result(
    path: PathLike,
    kind: str,
    image: np.ndarray,
    labels: np.ndarray,
    classes: Classes,
    offset: int = 0,
) -> None:
    """Writes the image of `render` as a PNG file, in an existing folder.

    Raises:
        OSError: the file cannot be written; an incomplete file is removed.
        MemoryError: there is not enough memory for the image.
        ValueError: `kind` is unknown.
    """
    if kind == "index":
        buffer = io.BytesIO()
        # For label maps, level 3 is as fast as level 1, and three times as fast as level 6.
        index_image(labels, classes.colors, offset).save(buffer, "PNG", compress_level=3)
        _write(path, buffer.getbuffer())
        return
    write_png(path, _drawn(kind, image, labels, classes))


def write_png(path: PathLike, picture: np.ndarray) -> None:
    """Writes an image as a PNG file, with OpenCV.

    OpenCV's settings (one filter for all rows, run-length matching) are several times as fast as
    Pillow, with files up to a fifth larger.

    Args:
        path: a file in an existing folder.
        picture: (H, W, 3) uint8 RGB, contiguous. It is overwritten.

    Raises:
        OSError: the file cannot be written; an incomplete file is removed.
        MemoryError: there is not enough memory for the encoder.
    """
    try:
        for rows in row_bands(*picture.shape[:2]):
            cv2.cvtColor(picture[rows], cv2.COLOR_RGB2BGR, dst=picture[rows])
        _, data = cv2.imencode(".png", picture)
    except cv2.error as error:
        if "nsufficient memory" not in str(error):
            raise
        raise MemoryError(f"{path}: no memory to encode {picture.shape}") from error
    _write(path, data.data)


def _write(path: PathLike, data: memoryview) -> None:
    file = open(path, "wb")  # noqa: SIM115  # a file that cannot be opened is not removed
    try:
        with file:
            file.write(data)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def _drawn(kind: str, image: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """(H', W', 3) uint8 RGB."""
    if kind == "legend":
        return area_legend(labels, classes)
    if kind not in _DRAWN:
        choices = "color, index, overlay, side, legend"
        raise ValueError(f"unknown kind of image {kind!r}; use {choices}")
    H, W = labels.shape
    picture = np.empty((H, 2 * W if kind == "side" else W, 3), dtype=np.uint8)
    for rows in row_bands(H, W):
        if kind == "overlay":
            picture[rows] = overlay(image[rows], labels[rows], classes.colors, 0.5)
            continue
        if kind == "side":
            picture[rows, :W] = image[rows]
        picture[rows, -W:] = color_encode(labels[rows], classes.colors)
    return picture


def index_image(labels: np.ndarray, colors: np.ndarray, offset: int = 0) -> Image.Image:
    """A label file: a palette image whose pixel values are class id + `offset`.

    With `DATASET.label_offset` as the offset it can be used for training and evaluation. With more
    than 256 values it is a 16-bit grey image, without a palette.

    Args:
        labels: (H, W) class ids, 0 or more.
        colors: (K, 3) uint8 RGB.
        offset: added to every class id.
    """
    dtype = np.uint8 if len(colors) + offset <= 256 else np.uint16
    picture = Image.fromarray(labels.astype(dtype) + dtype(offset))
    if dtype is np.uint16:
        return picture
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[offset : offset + len(colors)] = colors
    picture.putpalette(palette.tobytes())
    return picture


def area_legend(labels: np.ndarray, classes: Classes) -> np.ndarray:
    """Legend with the areas of the classes that occur, largest first, (h, w, 3) uint8 RGB."""
    counts = class_counts(labels, len(classes.names))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return legend(
        [classes.names[k] for k in order],
        classes.colors[order],
        [counts[k] / labels.size for k in order],
    )


def framed(picture: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A picture with a legend on its right, on white, (h, w, 3) uint8 RGB each."""
    height = max(len(picture), len(key))
    tall = [np.full((height, x.shape[1], 3), 255, dtype=np.uint8) for x in (picture, key)]
    for sheet, x in zip(tall, (picture, key)):
        sheet[: len(x)] = x
    return side_by_side(*tall)


def areas(labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Fraction of the image of each class that occurs, in [0, 1], largest first.

    Args:
        labels: (H, W) class ids; other ids, such as -1, are not counted.
        names: class names; classes with equal names are added.
    """
    shares: Counter[str] = Counter()
    for name, count in zip(names, class_counts(labels, len(names)).tolist(), strict=True):
        if count:
            shares[name] += count / labels.size  # type: ignore[assignment]
    return dict(shares.most_common())


def class_counts(labels: np.ndarray, num_class: int) -> np.ndarray:
    """Pixels of each class, (num_class,) int64; other ids, such as -1, are not counted."""
    counts = np.zeros(num_class, dtype=np.int64)
    for rows in row_bands(*labels.shape):
        band = labels[rows].reshape(-1)
        if band.dtype.kind != "u":
            band = band[(band >= 0) & (band < num_class)]
        counts += np.bincount(band, minlength=num_class)[:num_class]
    return counts


def row_bands(height: int, width: int) -> Iterator[slice]:
    """Slices of rows of an image, of a million pixels each.

    NumPy makes int64 copies for indexing and counting, which are small and in the cache for a band.
    """
    rows = max(1, _BAND // width)
    for y0 in range(0, height, rows):
        yield slice(y0, min(y0 + rows, height))
