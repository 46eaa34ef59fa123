"""A training sample: planned, loaded, and changed as planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mit_semseg.config import DataOptions
from mit_semseg.dataset.images import ImageFile
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.loading import load_depth_of, load_values, paths_of
from mit_semseg.dataset.reading import PathLike
from mit_semseg.dataset.records import Record
from mit_semseg.dataset.transforms import nearest_index, normalize_depth, resize_depth

Window = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Plan:
    """Every random number of one sample, drawn before its files are loaded.

    Attributes:
        size: (width, height) that the image is resized to.
        window: what is taken of the resized image.
        state: of the generator after the numbers that loading needs, those of `size`.
        flip: swap left and right.
        colors: factors of brightness, contrast and saturation; None: they stay.
        sigma: of a Gaussian blur, in pixels; None: no blur.
        angle: that the window is rotated by, in degrees, counterclockwise.
    """

    size: tuple[int, int]
    window: Window
    state: Mapping[str, Any]
    flip: bool = False
    colors: tuple[float, float, float] | None = None
    sigma: float | None = None
    angle: float = 0.0


class Sample(NamedTuple):
    """What goes into a batch.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        labels: (h/r, w/r) int64 class ids, -1 ignored, r = `segm_downsampling_rate`.
        depth: (h, w) float32, normalised; None where there is none.
    """

    image: np.ndarray
    labels: np.ndarray
    depth: np.ndarray | None


@dataclass(frozen=True, eq=False)
class LoadedSample:
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

    def flipped(self) -> LoadedSample:
        """The whole sample with left and right swapped, in classes too; before it is cropped."""
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
        """Class ids, int64 with -1 ignored, of the pixel in the middle of each rate x rate block.

        It is what Pillow's nearest resize by 1/rate takes of labels that are padded to a multiple
        of `rate`; only those are ever looked up.
        """
        rows, columns = self.rows[rate // 2 :: rate], self.columns[rate // 2 :: rate]
        return self.label_map(self.stored[rows][:, columns], self.mask_path)

    def sample(self, rate: int) -> Sample:
        """Image and depth, and labels at 1/rate of their size."""
        return Sample(self.image, self.labels(rate), self.depth)


@lru_cache(maxsize=8)
def _of_ids_plus_1(num_class: int, mirror_pairs: tuple[tuple[int, int], ...]) -> LabelMap:
    """The map of masks that store class ids plus one, 0 for ignored."""
    return LabelMap.shifted(num_class).pairing(mirror_pairs)


def _flipped(image: np.ndarray) -> np.ndarray:
    """An image or depth with left and right swapped; by torch, which is 20 times as fast."""
    return torch.from_numpy(image).flip(1).numpy()


class BatchStyle(Protocol):
    """What differs between the styles of batches: what is planned, and how it is applied.

    Attributes:
        by_orientation: a batch holds images of one orientation only.
    """

    by_orientation: bool

    def plan(self, size: tuple[int, int], short: int, rng: np.random.Generator) -> Plan:
        """Draw the numbers of a sample.

        Args:
            size: (width, height) of the image.
            short: the short side drawn for the whole batch, in pixels.
            rng: where every number comes from.
        """
        ...

    def apply(self, loaded: LoadedSample, plan: Plan) -> LoadedSample:
        """Change a sample that was loaded at `plan.size` as planned."""
        ...


def load_sample(
    record: Record,
    root: PathLike,
    size: tuple[int, int],
    label_map: LabelMap,
    options: DataOptions,
) -> LoadedSample:
    """Load the files of a record, the image resized to `size`, (width, height).

    Every stored value of the mask is checked, also those that no label is taken from.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is unreadable, sizes disagree, or a stored value is unknown.
    """
    image_path, mask_path = paths_of(record, root)
    with ImageFile(image_path) as file:
        width, height = file.size
        stored = load_values(record, root, file.size)
        label_map.check(stored, mask_path)
        image = file.pixels(size)
        depth = load_depth_of(record, root, options, file.size)
    if depth is not None:
        depth = normalize_depth(resize_depth(depth, size), options)
    rows, columns = nearest_index(height, size[1]), nearest_index(width, size[0])
    return LoadedSample(image, depth, stored, rows, columns, label_map, mask_path)
