"""The part of `cfg.DATASET` that reading and transforming samples needs, checked once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from mit_semseg.config.node import Config


def _as_list(value: Any) -> list[Any]:
    """A yaml scalar or sequence as a list; `imgSizes` and `ignore_label` accept both."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return list(value)
    return [value]


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class DataOptions:
    """Settings of samples, named as the keys of `DATASET`; the defaults are the published ones.

    Sizes are in pixels. `mean` and `std` are per channel in `color_order`, in units of
    `value_range` (1: pixels are scaled to [0, 1]; 255: they stay in [0, 255]). `on_error` is what
    training does about a sample that cannot be used: "stop", or "skip" to take another one.
    `batching` is "aspect" or "crop"; `random_scale`, `random_rotation` (degrees) and `random_blur`
    (a probability) are of "crop" alone.
    `depth_mean` and `depth_std` are in metres; `depth_scale` is stored units in a metre, "sunrgbd",
    or "auto" for that of `format`.
    """

    format: str = "odgt"
    num_class: int = 150
    label_offset: int = 1
    ignore_label: tuple[int, ...] = ()
    label_map: tuple[tuple[int, int], ...] = ()
    imgSizes: tuple[int, ...] = (300, 375, 450, 525, 600)
    imgMaxSize: int = 1000
    padding_constant: int = 8
    segm_downsampling_rate: int = 8
    batching: str = "aspect"
    random_flip: bool = True
    crop_size: tuple[int, ...] = ()
    color_jitter: float = 0.0
    random_scale: tuple[float, ...] = (0.5, 2.0)
    random_rotation: float = 10.0
    random_blur: float = 0.5
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    color_order: str = "RGB"
    value_range: float = 1.0
    depth: bool = False
    depth_scale: float | str = "auto"
    depth_mean: float = 2.378
    depth_std: float = 1.235
    on_error: str = "stop"

    @classmethod
    def read(cls, opt: Any) -> DataOptions:
        """Options from any object with these attributes, or a dict with these keys.

        Those it lacks keep their default.

        Raises:
            ValueError: a value cannot be used; the message names the key and the fix.
        """
        if isinstance(opt, cls):
            return opt
        given: dict[str, Any] = {}
        for field in fields(cls):
            has = field.name in opt if isinstance(opt, Mapping) else hasattr(opt, field.name)
            if has:
                value = opt[field.name] if isinstance(opt, Mapping) else getattr(opt, field.name)
                is_tuple = isinstance(field.default, tuple)
                given[field.name] = tuple(_as_list(value)) if is_tuple else value
        options = cls(**given)
        options._check()
        return options

    def _check(self) -> None:
        if not self.imgSizes or not all(_is_number(side) and side >= 1 for side in self.imgSizes):
            raise ValueError(
                f"DATASET.imgSizes is {list(self.imgSizes)}; give short sides in pixels, such as "
                "450 or [300, 450]"
            )
        for key in ("num_class", "imgMaxSize", "padding_constant", "segm_downsampling_rate"):
            if getattr(self, key) < 1:
                raise ValueError(f"DATASET.{key} is {getattr(self, key)}; it must be at least 1")
        self._check_label_map()
        if len(self.crop_size) not in (0, 2) or any(side < 1 for side in self.crop_size):
            raise ValueError(
                f"DATASET.crop_size is {list(self.crop_size)}; give [height, width], or [] for none"
            )
        self._check_crops()
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"DATASET.color_jitter is {self.color_jitter}; it must be in [0, 1]")
        if self.color_order not in ("RGB", "BGR"):
            raise ValueError(f"DATASET.color_order is {self.color_order!r}; use 'RGB' or 'BGR'")
        if self.value_range not in (1, 255):
            raise ValueError(f"DATASET.value_range is {self.value_range}; use 1 or 255")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"DATASET.on_error is {self.on_error!r}; use 'stop' or 'skip'")
        scale = self.depth_scale
        if scale not in ("auto", "sunrgbd") and not (isinstance(scale, (int, float)) and scale > 0):
            raise ValueError(
                f"DATASET.depth_scale is {scale!r}; give stored units in a metre, sunrgbd or auto"
            )
        if self.depth_std <= 0:
            raise ValueError(f"DATASET.depth_std is {self.depth_std}; it must be above 0")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"DATASET.mean {list(self.mean)} and DATASET.std {list(self.std)} need three "
                "numbers each, std above 0"
            )

    def _check_label_map(self) -> None:
        stored = []
        for pair in self.label_map:
            if (
                not isinstance(pair, (list, tuple))
                or len(pair) != 2
                or not all(_is_number(value) and value == int(value) for value in pair)
                or pair[0] < 0
            ):
                raise ValueError(
                    f"DATASET.label_map is {list(self.label_map)}; give pairs [stored value, "
                    "class] of whole numbers, class -1 for ignored, as [[0, 0], [255, 1]]"
                )
            if not -1 <= pair[1] < self.num_class:
                raise ValueError(
                    f"DATASET.label_map has class {pair[1]}, but DATASET.num_class is "
                    f"{self.num_class}: classes are 0..{self.num_class - 1}, -1 for ignored"
                )
            if pair[0] in stored:
                raise ValueError(f"DATASET.label_map has the stored value {pair[0]} twice")
            stored.append(pair[0])

    def _check_crops(self) -> None:
        if self.batching not in ("aspect", "crop"):
            raise ValueError(f"DATASET.batching is {self.batching!r}; use 'aspect' or 'crop'")
        low, high = self.random_scale if len(self.random_scale) == 2 else (0, 0)
        if not 0 < low <= high:
            raise ValueError(
                f"DATASET.random_scale is {list(self.random_scale)}; give the least and the "
                "greatest factor, such as [0.5, 2.0]"
            )
        if not 0 <= self.random_rotation <= 180:
            raise ValueError(
                f"DATASET.random_rotation is {self.random_rotation}; degrees in [0, 180]"
            )
        if not 0 <= self.random_blur <= 1:
            raise ValueError(
                f"DATASET.random_blur is {self.random_blur}; a probability within [0, 1]"
            )
        if self.batching != "crop":
            return
        if not self.crop_size:
            raise ValueError(
                "DATASET.batching crop needs the size of the crops: set DATASET.crop_size "
                "[height, width]"
            )
        multiple = self.padding_constant  # and so of segm_downsampling_rate
        if any(side % multiple for side in self.crop_size):
            raise ValueError(
                f"DATASET.crop_size is {list(self.crop_size)}; DATASET.batching crop needs "
                f"multiples of DATASET.padding_constant {multiple}, such as "
                f"{[-(-side // multiple) * multiple for side in self.crop_size]}"
            )


def with_scales(dataset_cfg: Config, sizes: int | Sequence[int]) -> Config:
    """`cfg.DATASET` with other `imgSizes`, one or several; unchanged when `sizes` is empty."""
    if isinstance(sizes, Sequence) and not sizes:
        return dataset_cfg
    changed = dataset_cfg.clone()
    changed.imgSizes = list(DataOptions.read({"imgSizes": sizes}).imgSizes)
    return changed
