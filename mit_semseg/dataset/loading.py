"""Loads image, mask and depth of a record, and checks their sizes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS
from mit_semseg.dataset.images import ImageFile, load_depth, stored_values
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.rasters import RasterFile, missing_pixels, normalized_bands
from mit_semseg.dataset.records import Record, find_depth
from mit_semseg.files import PathLike


def open_image(path: PathLike, options: DataOptions) -> ImageFile | RasterFile:
    """An open image, by rasterio if `options.bands` are given."""
    return RasterFile(path, options) if options.bands else ImageFile(path)


def load_input(path: PathLike, options: DataOptions) -> np.ndarray:
    """An image as the options say.

    Returns:
        (H, W, 3) uint8 RGB; with `bands` (H, W, C) float32, normalised, NaN where there is no
        value.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, or lacks a band.
    """
    with open_image(path, options) as file:
        return file.pixels()


def paths_of(record: Record, root: PathLike = "") -> tuple[str, str]:
    """Paths of the image and the mask of a record.

    Raises:
        ValueError: the record has no mask.
    """
    if "fpath_segm" not in record:
        raise ValueError(f"{record['fpath_img']}: the list has no mask; add 'fpath_segm'")
    return os.path.join(root, record["fpath_img"]), os.path.join(root, record["fpath_segm"])


def load_values(record: Record, root: PathLike, size: tuple[int, int]) -> np.ndarray:
    """Stored mask values of a record, with their size checked.

    Args:
        record: with a mask.
        root: folder that relative paths are relative to.
        size: (width, height) of the image file, upright by EXIF.

    Returns:
        (H, W) integers of the mask file's type; may be read-only.

    Raises:
        FileNotFoundError: the mask does not exist.
        ValueError: it cannot be read, or sizes differ.
    """
    image_path, mask_path = paths_of(record, root)
    width, height = size
    raw = stored_values(mask_path)
    if "width" in record and (record["width"], record["height"]) != (width, height):
        raise ValueError(
            f"{image_path}: {width}x{height} pixels (upright by EXIF), but in its list "
            f"{record['width']}x{record['height']}; correct the list (mit-semseg data make-odgt)"
        )
    if raw.shape != (height, width):
        raise ValueError(
            f"{mask_path}: {raw.shape[1]}x{raw.shape[0]} pixels, but its image {image_path} has "
            f"{width}x{height} (upright by EXIF); masks must be as large as their images"
        )
    return raw


def load_raw(
    record: Record, root: PathLike = "", options: DataOptions | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image and stored mask values of a record, with their sizes checked.

    Returns:
        The image as of `load_input`, but with `bands` not normalised, and (H, W) integers of the
        mask file's type, which may be read-only.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file cannot be read, or sizes differ.
    """
    image_path, _ = paths_of(record, root)
    with open_image(image_path, options or DataOptions()) as file:
        raw = load_values(record, root, file.size)
        return file.values() if isinstance(file, RasterFile) else file.pixels(), raw


def load_pair(
    record: Record, root: PathLike, label_map: LabelMap, options: DataOptions | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image and class ids of a record.

    Returns:
        The image as of `load_input`, and (H, W) int64 with -1 = ignored, as are pixels of the image
        without a value.

    Raises:
        FileNotFoundError, ValueError: as `load_raw`; ValueError also for an unknown stored value.
    """
    image, raw = load_raw(record, root, options)
    labels = label_map(raw, paths_of(record, root)[1])
    if options and options.bands:
        image = normalized_bands(image, options)
        labels[missing_pixels(image)] = -1
    return image, labels


def depth_scale(options: DataOptions) -> float | str:
    """`options.depth_scale`, or if it is "auto" that of `options.format`."""
    if options.depth_scale != "auto":
        return options.depth_scale
    own: float | str | None = FORMATS.get(options.format)().depth_scale
    return 1000.0 if own is None else own


def load_depth_of(
    record: Record, root: PathLike, options: DataOptions, size: tuple[int, int]
) -> np.ndarray | None:
    """Depth of a record, with its size checked.

    Args:
        record: with `fpath_depth`.
        root: folder that relative paths are relative to.
        options: `depth` and `depth_scale` are used.
        size: (width, height) of the image file, upright by EXIF.

    Returns:
        (H, W) float32 in metres, 0 where there is none; None unless `options.depth`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the record has no depth, it cannot be read, or sizes differ.
    """
    if not options.depth:
        return None
    if "fpath_depth" not in record:
        raise ValueError(
            f"{record['fpath_img']}: the list has no depth; add 'fpath_depth', or set "
            "DATASET.depth False"
        )
    path = os.path.join(root, record["fpath_depth"])
    depth = load_depth(path, depth_scale(options))
    if depth.shape != size[::-1]:
        raise ValueError(
            f"{path}: {depth.shape[1]}x{depth.shape[0]} pixels, but its image "
            f"{record['fpath_img']} has {size[0]}x{size[1]}; depth must be as large as its image"
        )
    return depth


def load_depth_beside(
    image: PathLike, options: DataOptions, size: tuple[int, int]
) -> np.ndarray | None:
    """As `load_depth_of`, of the depth image that `find_depth` finds for an image file."""
    if not options.depth:
        return None
    depth = find_depth(image)
    if depth is None:
        stem = Path(image).stem
        raise FileNotFoundError(
            f"{os.fspath(image)}: no depth image; put {stem}_depth.png beside it, or "
            f"depth/{stem}.png beside its folder"
        )
    record = Record(fpath_img=os.fspath(image), fpath_depth=os.fspath(depth))
    return load_depth_of(record, "", options, size)
