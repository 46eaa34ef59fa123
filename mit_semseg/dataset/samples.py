"""The files of a record as arrays: image, mask and depth, checked against each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mit_semseg.dataset.base import FORMATS
from mit_semseg.dataset.images import ImageFile, load_depth, stored_values
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.reading import PathLike
from mit_semseg.dataset.records import Record, find_depth


def paths_of(record: Record, root: PathLike = "") -> tuple[str, str]:
    """Image and mask file of a record.

    Raises:
        ValueError: the list gives no mask.
    """
    if "fpath_segm" not in record:
        raise ValueError(f"{record['fpath_img']}: the list gives no mask; add 'fpath_segm'")
    return os.path.join(root, record["fpath_img"]), os.path.join(root, record["fpath_segm"])


def load_values(record: Record, root: PathLike, size: tuple[int, int]) -> np.ndarray:
    """Stored mask values of a record, checked to be of the size they should be.

    Args:
        record: with a mask.
        root: folder that relative paths are relative to.
        size: (width, height) of the image file, upright by EXIF.

    Returns:
        (H, W) integers of the mask file's own type, maybe read-only.

    Raises:
        FileNotFoundError: the mask is missing.
        ValueError: it is unreadable, or sizes disagree; the file is named.
    """
    image_path, mask_path = paths_of(record, root)
    width, height = size
    raw = stored_values(mask_path)
    if "width" in record and (record["width"], record["height"]) != (width, height):
        raise ValueError(
            f"{image_path}: {width}x{height} pixels (upright by EXIF), but its list says "
            f"{record['width']}x{record['height']}; correct the list (mit-semseg data make-odgt)"
        )
    if raw.shape != (height, width):
        raise ValueError(
            f"{mask_path}: {raw.shape[1]}x{raw.shape[0]} pixels, but its image {image_path} has "
            f"{width}x{height} (upright by EXIF); masks must be as large as their images"
        )
    return raw


def load_raw(record: Record, root: PathLike = "") -> tuple[np.ndarray, np.ndarray]:
    """Image and stored mask values of a record, checked to be of the size they should be.

    Returns:
        (H, W, 3) uint8 RGB and (H, W) integers of the mask file's own type, maybe read-only.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is unreadable, or sizes disagree; the file is named.
    """
    image_path, _ = paths_of(record, root)
    with ImageFile(image_path) as file:
        raw = load_values(record, root, file.size)
        return file.pixels(), raw


def load_pair(record: Record, root: PathLike, label_map: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """Image and class ids of a record.

    Returns:
        (H, W, 3) uint8 RGB and (H, W) int64 with -1 = ignored.

    Raises:
        FileNotFoundError, ValueError: as `load_raw`; ValueError also for an unknown stored value.
    """
    image, raw = load_raw(record, root)
    return image, label_map(raw, paths_of(record, root)[1])


def depth_scale(options: DataOptions) -> float | str:
    """`options.depth_scale`, or where it is "auto" that of `options.format`."""
    if options.depth_scale != "auto":
        return options.depth_scale
    own: float | str | None = FORMATS.get(options.format)().depth_scale
    return 1000.0 if own is None else own


def load_depth_of(
    record: Record, root: PathLike, options: DataOptions, size: tuple[int, int]
) -> np.ndarray | None:
    """Depth of a record, checked to be of the size it should be.

    Args:
        record: with `fpath_depth`.
        root: folder that relative paths are relative to.
        options: whether there is to be depth, and how it is stored.
        size: (width, height) of the image file, upright by EXIF.

    Returns:
        (H, W) float32 in metres, 0 where there is none; None unless `options.depth`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the record names none, it is unreadable, or sizes disagree.
    """
    if not options.depth:
        return None
    if "fpath_depth" not in record:
        raise ValueError(
            f"{record['fpath_img']}: the list gives no depth; add 'fpath_depth', or set "
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


# Image (h, w, 3) uint8, labels, and, with DATASET.depth, normalised depth (h, w) float32.
Sample = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image at the size that it is trained at, and where its labels are to be looked up.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        depth: (h, w) float32, normalised; None where there is none.
        stored: the mask as its file has it, (H, W) integers, checked.
        rows, columns: h and w indices: where in `stored` the label of each pixel of the image is.
        label_map: stored value -> class id or -1.
        mask_path: the mask's file, named in errors.
    """

    image: np.ndarray
    depth: np.ndarray | None
    stored: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    label_map: LabelMap
    mask_path: str

    def mirrored(self) -> Picture:
        """The whole picture with left and right swapped, in classes too; before it is cut."""
        return replace(
            self,
            image=_mirrored(self.image),
            depth=None if self.depth is None else _mirrored(self.depth),
            columns=self.stored.shape[1] - 1 - self.columns,
            label_map=self.label_map.mirrored,
        )

    def cut(self, down: slice, right: slice) -> Picture:
        """The part of it in these rows and columns."""
        return replace(
            self,
            image=self.image[down, right],
            depth=None if self.depth is None else self.depth[down, right],
            rows=self.rows[down],
            columns=self.columns[right],
        )

    def labels(self, rate: int = 1) -> np.ndarray:
        """Class ids, int64 with -1 ignored, of the pixel in the middle of each rate x rate block.

        It is what Pillow's nearest resize by 1/rate takes of labels that are padded to a multiple
        of `rate`; only those are ever looked up.
        """
        rows, columns = self.rows[rate // 2 :: rate], self.columns[rate // 2 :: rate]
        return self.label_map(self.stored[rows][:, columns], self.mask_path)


def _mirrored(image: np.ndarray) -> np.ndarray:
    """An image or depth with left and right swapped; by torch, which is 20 times as fast."""
    return torch.from_numpy(image).flip(1).numpy()


class BatchStyle(Protocol):
    """How a sample is made of a picture: the one step in which the batch styles differ.

    Called with a function that reads the picture, its short side at the first argument unless its
    long side would pass the second; the short side drawn for the batch; and the generator that
    every random number is to be drawn from.

    Attributes:
        by_orientation: a batch holds images of one orientation only.
    """

    by_orientation: bool

    def __call__(
        self, read: Callable[[float, float], Picture], short: int, rng: np.random.Generator
    ) -> Sample: ...
