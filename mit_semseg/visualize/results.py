"""Results of a prediction as pictures, and as files that are quick to write."""

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

from mit_semseg.visualize.legend import legend
from mit_semseg.visualize.palette import color_encode, overlay

PathLike = str | os.PathLike[str]
# Pictures that are drawn here; "index" and "legend" have other sizes or types than these.
_DRAWN = ("color", "overlay", "side")
# Pixels that pictures are drawn by.
_BAND = 1 << 20


class Classes(Protocol):
    """Names and colours of classes, such as `dataset.ClassTable`: K names, (K, 3) uint8 RGB."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def colors(self) -> np.ndarray: ...


def render(
    kind: str, image: np.ndarray, labels: np.ndarray, classes: Classes, offset: int = 0
) -> Image.Image:
    """One picture of a prediction.

    Args:
        kind: color, index, overlay, side (image beside its classes' colours) or legend.
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) class ids.
        classes: names and colours.
        offset: of index files, see `index_image`.

    Raises:
        ValueError: an unknown kind.
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
    """Write what `render` draws as a PNG file, in a folder that exists.

    Raises:
        OSError: the file cannot be written; it is removed, and named in the error.
        MemoryError: there is too little memory for the picture.
        ValueError: an unknown kind.
    """
    if kind == "index":
        buffer = io.BytesIO()
        # Level 3 takes as long as level 1 for label maps, and a third of what level 6 takes.
        index_image(labels, classes.colors, offset).save(buffer, "PNG", compress_level=3)
        _write(path, buffer.getbuffer())
        return
    write_png(path, _drawn(kind, image, labels, classes))


def write_png(path: PathLike, picture: np.ndarray) -> None:
    """Write a picture as a PNG file.

    OpenCV encodes it with its own settings (one filter for all rows, run-length matching): several
    times as fast as Pillow, for files that are up to a fifth larger.

    Args:
        path: in a folder that exists.
        picture: (H, W, 3) uint8 RGB, contiguous. It is overwritten.

    Raises:
        OSError: the file cannot be written; it is removed, and named in the error.
        MemoryError: there is too little memory for the encoder.
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
    file = open(path, "wb")  # noqa: SIM115  # what cannot be opened is not removed
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
        raise ValueError(f"{kind!r} is no kind of picture; choose {choices}")
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
    """A label file: a palette PNG whose pixel values are class id + `offset`.

    With `DATASET.label_offset` as the offset it can be trained and evaluated on as it is. Beyond
    256 values it is a 16-bit grey PNG, which has no palette.

    Args:
        labels: (H, W) class ids, none below 0.
        colors: (K, 3) uint8 RGB.
        offset: what is added to every class id.
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
    """Colour, name and area of the classes that occur, the largest first, as (h, w, 3) uint8."""
    counts = class_counts(labels, len(classes.names))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return legend(
        [classes.names[k] for k in order],
        classes.colors[order],
        [counts[k] / labels.size for k in order],
    )


def areas(labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Share of the image each class that occurs covers, in [0, 1], the largest first.

    Args:
        labels: (H, W) class ids; ids outside the names, such as -1, have no entry.
        names: class names; equal names are added up.
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
    """Rows of a picture a million pixels at a time.

    NumPy looks up and counts by way of int64 copies; of a band these are small, and in the cache.
    """
    rows = max(1, _BAND // width)
    for y0 in range(0, height, rows):
        yield slice(y0, min(y0 + rows, height))
