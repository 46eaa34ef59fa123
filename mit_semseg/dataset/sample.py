"""Training samples: random numbers are drawn first, then files are loaded and transformed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mit_semseg.config import DataOptions
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.loading import load_depth_of, load_values, open_image, paths_of
from mit_semseg.dataset.rasters import RasterFile, missing_pixels
from mit_semseg.dataset.records import Record
from mit_semseg.dataset.transforms import (
    nearest_index,
    normalize_depth,
    resize_depth,
    resize_image,
)
from mit_semseg.files import PathLike

Window = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Plan:
    """All random parameters of one sample, drawn before its files are loaded.

    Attributes:
        size: (width, height) that the image is resized to.
        window: crop of the resized image.
        state: state of the generator after the numbers for `size`, which loading needs, were drawn.
        flip: flip horizontally.
        colors: factors of brightness, contrast and saturation; None: no colour jitter.
        sigma: standard deviation of a Gaussian blur, in pixels; None: no blur.
        angle: rotation of the window in degrees, counterclockwise.
    """

    size: tuple[int, int]
    window: Window
    state: Mapping[str, Any]
    flip: bool = False
    colors: tuple[float, float, float] | None = None
    sigma: float | None = None
    angle: float = 0.0


class Sample(NamedTuple):
    """One element of a batch.

    Attributes:
        image: (h, w, 3) uint8 RGB; with `bands` (h, w, C) float32, normalised.
        labels: (h/r, w/r) int64 class ids, -1 ignored, r = `segm_downsampling_rate`.
        depth: (h, w) float32, normalised, or None.
    """

    image: np.ndarray
    labels: np.ndarray
    depth: np.ndarray | None


@dataclass(frozen=True, eq=False)
class LoadedSample:
    """A resized image, and indices into its stored mask, which is not resized.

    Attributes:
        image: (h, w, 3) uint8 RGB; with `bands` (h, w, C) float32, normalised.
        depth: (h, w) float32, normalised, or None.
        stored: checked values of the mask file, (H, W) integers.
        rows, columns: h and w indices into `stored`, of the label of each pixel of the image.
        label_map: stored value -> class id or -1.
        mask_path: the mask's file, for errors.
    """

    image: np.ndarray
    depth: np.ndarray | None
    stored: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    label_map: LabelMap
    mask_path: str

    def flipped(self) -> LoadedSample:
        """The sample flipped horizontally, with exchanged classes; must not be cropped yet."""
        return replace(
            self,
            image=_flipped(self.image),
            depth=None if self.depth is None else _flipped(self.depth),
            columns=self.stored.shape[1] - 1 - self.columns,
            label_map=self.label_map.mirrored,
        )

    def cropped(self, window: Window) -> LoadedSample:
        """The sample within these rows and columns."""
        down, right = window
        return replace(
            self,
            image=self.image[window],
            depth=None if self.depth is None else self.depth[window],
            rows=self.rows[down],
            columns=self.columns[right],
        )

    def relabelled(self, labels: np.ndarray) -> LoadedSample:
        """The sample with another mask: class ids, (h, w) integers with -1 ignored."""
        h, w = labels.shape
        return replace(
            self,
            stored=labels + 1,  # masks store nothing below 0
            rows=np.arange(h),
            columns=np.arange(w),
            label_map=_of_ids_plus_1(self.label_map.num_class, self.label_map.mirror_pairs),
        )

    def labels(self, rate: int = 1) -> np.ndarray:
        """Class ids, int64 with -1 ignored, of the central pixel of each rate x rate block.

        Same as Pillow's nearest resize by 1/rate of labels padded to a multiple of `rate`, but only
        these pixels are mapped.
        """
        rows, columns = self.rows[rate // 2 :: rate], self.columns[rate // 2 :: rate]
        return self.label_map(self.stored[rows][:, columns], self.mask_path)

    def sample(self, rate: int) -> Sample:
        """Image and depth, and labels at 1/rate of their size."""
        return Sample(self.image, self.labels(rate), self.depth)


@lru_cache(maxsize=8)
def _of_ids_plus_1(num_class: int, mirror_pairs: tuple[tuple[int, int], ...]) -> LabelMap:
    """The label map of masks that store class ids plus one, and 0 for ignored."""
    return LabelMap.shifted(num_class).pairing(mirror_pairs)


def _flipped(image: np.ndarray) -> np.ndarray:
    """An image or depth flipped horizontally, by torch, which is 20 times as fast as NumPy."""
    return torch.from_numpy(image).flip(1).numpy()


class BatchStyle(Protocol):
    """Interface of the batch styles: random parameters, and transformations of samples.

    Attributes:
        by_orientation: whether a batch has images of one orientation only.
    """

    by_orientation: bool

    def plan(self, size: tuple[int, int], short: int, rng: np.random.Generator) -> Plan:
        """Draws the random parameters of a sample.

        Args:
            size: (width, height) of the image.
            short: the short side drawn for the whole batch, in pixels.
            rng: source of all random numbers.
        """
        ...

    def apply(self, loaded: LoadedSample, plan: Plan) -> LoadedSample:
        """Transforms a sample that was loaded at `plan.size`."""
        ...


def load_sample(
    record: Record,
    root: PathLike,
    size: tuple[int, int],
    label_map: LabelMap,
    options: DataOptions,
) -> LoadedSample:
    """Loads the files of a record, with the image resized to `size`, (width, height).

    All stored values of the mask are checked, including those that no label is taken from.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file cannot be read, sizes differ, or a stored value is unknown.
    """
    image_path, mask_path = paths_of(record, root)
    with open_image(image_path, options) as file:
        width, height = file.size
        stored = load_values(record, root, file.size)
        label_map.check(stored, mask_path)
        if isinstance(file, RasterFile):
            whole = file.pixels()
            missing = missing_pixels(whole)
            if missing.any():
                stored = np.where(missing, 0, label_map(stored, mask_path) + 1)
                label_map = _of_ids_plus_1(label_map.num_class, label_map.mirror_pairs)
            image = resize_image(np.nan_to_num(whole, copy=False), size)
        else:
            image = file.pixels(size)
        depth = load_depth_of(record, root, options, file.size)
    if depth is not None:
        depth = normalize_depth(resize_depth(depth, size), options)
    rows, columns = nearest_index(height, size[1]), nearest_index(width, size[0])
    return LoadedSample(image, depth, stored, rows, columns, label_map, mask_path)
