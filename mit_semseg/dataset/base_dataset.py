"""The published base class of the three data sets, which reads lists of records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mit_semseg.config import DataOptions
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record, read_records
from mit_semseg.dataset.transforms import round_up

if TYPE_CHECKING:
    from torchvision.transforms import Normalize

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def imresize(im: Image.Image, size: tuple[int, int], interp: str = "bilinear") -> Image.Image:
    """Resizes a Pillow image to `size`, (width, height), with Pillow.

    The data sets of this package use `transforms.resize_image`; differences are at most one grey
    level.

    Raises:
        ValueError: `interp` is not nearest, bilinear or bicubic.
    """
    if interp not in _FILTERS:
        raise ValueError(f"interp is {interp!r}; use {', '.join(map(repr, _FILTERS))}")
    return im.resize(size, _FILTERS[interp])


class BaseDataset(Dataset[dict[str, Any]]):
    """A list of records, and the conversion of images and masks to tensors.

    `TrainDataset`, `ValDataset` and `TestDataset` only use the list. They create tensors with
    faster code and the same results, and do not call the conversion methods below, which are for
    custom data sets.

    Args:
        odgt: list file, list files, or records.
        opt: `cfg.DATASET`, or any object with some of its attributes.
        label_map: stored value -> class; None: from `label_offset` and `ignore_label`.
        part: part of the list, see `parse_input_list`.

    Attributes:
        list_sample: the records.
        num_sample: their number.

    Raises:
        FileNotFoundError, ValueError: the list or an option cannot be used.
    """

    root_dataset: str = ""  # folder that relative paths are relative to
    list_sample: list[Record]
    num_sample: int

    def __init__(
        self, odgt: Any, opt: Any, *, label_map: LabelMap | None = None, **part: int
    ) -> None:
        self.options = DataOptions.read(opt)
        self.label_map = label_map or LabelMap.of_options(self.options)
        self.parse_input_list(odgt, **part)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks = ("img_transform", "segm_transform", "round2nearest_multiple")
        changed = [name for name in hooks if getattr(cls, name) is not getattr(BaseDataset, name)]
        if changed and cls.__getitem__.__module__.startswith("mit_semseg."):
            raise TypeError(
                f"{cls.__name__}.{changed[0]} would never be called: use DATASET.mean, std, "
                "label_offset, label_map or padding_constant, or override __getitem__, too"
            )

    def __len__(self) -> int:
        return self.num_sample

    def parse_input_list(
        self, odgt: Any, max_sample: int = -1, start_idx: int = -1, end_idx: int = -1
    ) -> None:
        """Reads `list_sample` and `num_sample`.

        Args:
            odgt: list file, list files, or records.
            max_sample: maximum number of records; 0 or less: all.
            start_idx, end_idx: the slice of those to use; all if either is negative.

        Raises:
            FileNotFoundError, ValueError: a list cannot be read, or no records are left.
        """
        records = read_records(odgt, self.root_dataset)
        count = len(records)
        if max_sample > 0:
            records = records[:max_sample]
        if start_idx >= 0 and end_idx >= 0:
            records = records[start_idx:end_idx]
        if not records:
            raise ValueError(
                f"max_sample {max_sample}, start_idx {start_idx} and end_idx {end_idx} leave none "
                f"of the {count} records of the list; start_idx must be below end_idx and {count}"
            )
        self.list_sample, self.num_sample = records, len(records)

    @property
    def imgSizes(self) -> tuple[int, ...]:
        """Short sides in pixels."""
        return self.options.imgSizes

    @property
    def imgMaxSize(self) -> int:
        """Maximum of the long side in pixels."""
        return self.options.imgMaxSize

    @property
    def padding_constant(self) -> int:
        """Sides of the network's input are multiples of this."""
        return self.options.padding_constant

    @property
    def normalize(self) -> Normalize:
        """torchvision's transform of a (3, H, W) image in [0, 1], in `color_order`."""
        from torchvision.transforms import Normalize  # slow to import

        mean, std, unit = self.options.mean, self.options.std, self.options.value_range
        return Normalize([m / unit for m in mean], [s / unit for s in std])

    def img_transform(self, img: Image.Image | np.ndarray) -> Tensor:
        """An RGB image, (H, W, 3) in 0..255, as input of the encoder: (3, H, W) float32."""
        pixels = np.asarray(img, dtype=np.float32) / 255
        if self.options.color_order == "BGR":
            pixels = pixels[:, :, ::-1]
        normalized: Tensor = self.normalize(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
        return normalized

    def segm_transform(self, segm: Image.Image | np.ndarray) -> Tensor:
        """Stored mask values, (H, W) integers, as class ids: (H, W) int64 with -1 ignored.

        Raises:
            ValueError: a stored value is neither a class nor ignored.
        """
        return torch.from_numpy(self.label_map(np.asarray(segm)))

    def round2nearest_multiple(self, x: int, p: int) -> int:
        """The smallest multiple of `p` that is at least `x`."""
        return round_up(x, p)
