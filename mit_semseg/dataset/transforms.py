"""Geometric and colour transformations, from arrays to network inputs.

Images can stay uint8 until `Normalize`, a module that can run on the device, normalises them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mit_semseg.config import DataOptions


# ------------------------------------------------------------------------------ geometry
def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def fitted_size(
    width: int, height: int, short: int, longest: int, factor: float = 1.0
) -> tuple[int, int]:
    """(width, height) with short side `short`, or smaller so that no side exceeds `longest`.

    Args:
        width, height: of the image.
        short, longest: in pixels; `short` 0 is the image's own size, whatever `longest` is.
        factor: of both.
    """
    scale = min(short * factor / min(height, width), longest * factor / max(height, width))
    scale = scale if short else factor
    return max(1, int(width * scale)), max(1, int(height * scale))


def random_window(
    sides: Sequence[int], crops: Sequence[int], rng: np.random.Generator
) -> tuple[slice, slice]:
    """A random window of crops[0] rows and crops[1] columns in an image of these sides.

    A smaller side is used whole.
    """
    starts = [int(rng.integers(0, max(side - crop, 0) + 1)) for side, crop in zip(sides, crops)]
    down, right = (
        slice(start, min(start + crop, side)) for start, crop, side in zip(starts, crops, sides)
    )
    return down, right


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bilinear resize, within one grey level of Pillow's (which is slower).

    Args:
        image: (H, W, C) uint8 or float32.
        size: (width, height) of the result.

    Returns:
        (height, width, C) of the same type; `image` itself if it has that size.
    """
    height, width = image.shape[:2]
    if (width, height) == tuple(size):
        return image
    pixels = as_batch(image)
    resized = F.interpolate(pixels, size=(size[1], size[0]), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def resize_depth(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bilinear resize of depth, which may have holes.

    Pixels without depth are left out of the means; a result is 0 if more than half of its weight
    is from such pixels.

    Args:
        depth: (H, W) float32, 0 where there is no depth.
        size: (width, height) of the result.

    Returns:
        (height, width) float32; `depth` itself if it has that size.
    """
    if depth.shape[::-1] == tuple(size):
        return depth
    valid = depth > 0
    planes = torch.from_numpy(np.stack([depth, valid]).astype(np.float32))[None]
    total, weight = F.interpolate(
        planes, size=(size[1], size[0]), mode="bilinear", antialias=True
    ).numpy()[0]
    return np.where(weight >= 0.5, total / np.maximum(weight, np.float32(0.5)), np.float32(0))


def as_batch(image: np.ndarray) -> Tensor:
    """(H, W, C) -> (1, C, H, W) of the same type, channels last; without a copy if possible."""
    # torch does not accept read-only arrays or negative strides.
    return torch.from_numpy(np.require(image, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)


@lru_cache(maxsize=256)
def nearest_index(old: int, new: int) -> np.ndarray:
    """Source indices of a nearest-neighbour resize from `old` to `new` pixels, by Pillow.

    Returns:
        (new,) integers, read-only.
    """
    row = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    index = np.asarray(row.resize((new, 1), Image.Resampling.NEAREST))[0].astype(np.intp)
    index.setflags(write=False)
    return index


# ------------------------------------------------------------------------------ values
class Normalize(nn.Module):
    """Normalises images: (B, 3, H, W) uint8 RGB -> float32, on the device of the images.

    `state_dict()` is empty.

    Args:
        mean, std: per channel in `color_order`, in units of `value_range`.
        color_order: "RGB" or "BGR", as the encoder was trained.
        value_range: 1 (pixels are scaled to [0, 1]) or 255 (they are not scaled).

    Raises:
        ValueError: an argument is invalid.

    Example:
        >>> grey = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
        >>> Normalize(mean=(0, 0, 0), std=(1, 1, 1))(grey).flatten()
        tensor([0.2000, 0.2000, 0.2000])
    """

    mean: Tensor
    std: Tensor
    unit: Tensor

    def __init__(
        self,
        mean: Sequence[float] = DataOptions.mean,
        std: Sequence[float] = DataOptions.std,
        color_order: str = DataOptions.color_order,
        value_range: float = DataOptions.value_range,
    ) -> None:
        super().__init__()
        given = {"mean": mean, "std": std, "color_order": color_order, "value_range": value_range}
        options = DataOptions.read(given)
        self.color_order = options.color_order
        self.value_range = options.value_range
        # 255 is a tensor, as CUDA would divide by a number as a product with 1/255, less exactly.
        for name, value in {"mean": options.mean, "std": options.std, "unit": 255.0}.items():
            self.register_buffer(name, torch.tensor(value), persistent=False)

    @classmethod
    def of(cls, opt: Any) -> Normalize:
        """A module for `cfg.DATASET`, or any object with some of its attributes."""
        options = DataOptions.read(opt)
        return cls(options.mean, options.std, options.color_order, options.value_range)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Normalised images.

        Args:
            images: (B, 3, H, W) uint8 RGB.
            sizes: (B, 2) integers, (height, width) of each image without its padding on the right
                and bottom, which becomes 0, the mean colour. If they are on the device of the
                images, there is no synchronisation. None: there is no padding.

        Returns:
            (B, 3, H, W) float32, channels last if `images` are.

        Raises:
            ValueError: the images are not uint8, or do not have three channels.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Normalize expects (B, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}; "
                "pass images as loaded"
            )
        _, _, H, W = images.shape
        if self.color_order == "BGR":
            images = images.flip(1)
        values = images.float()
        if self.value_range == 1:
            values.div_(self.unit)
        if values.is_contiguous(memory_format=torch.channels_last):
            # Whole rows R, G, B, R, ... at a time: ten times as fast on the CPU.
            rows = values.permute(0, 2, 3, 1).flatten(2)  # B, H, 3 W; the same memory
            rows.sub_(self.mean.repeat(W)).div_(self.std.repeat(W))
        else:
            values.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        if sizes is not None:
            sizes = sizes.to(images.device)
            below = torch.arange(H, device=images.device) >= sizes[:, :1]  # B, H
            right = torch.arange(W, device=images.device) >= sizes[:, 1:]  # B, W
            values.masked_fill_(below[:, None, :, None] | right[:, None, None, :], 0)
        return values


def normalize_depth(depth: np.ndarray, opt: Any) -> np.ndarray:
    """Normalises depth in metres; pixels without depth stay 0.

    Args:
        depth: (H, W) float32, 0 where there is no depth.
        opt: `cfg.DATASET`, or any object with some of its attributes.
    """
    options = DataOptions.read(opt)
    values = (depth - np.float32(options.depth_mean)) / np.float32(options.depth_std)
    return np.where(depth > 0, values, np.float32(0))


def scaled_inputs(
    image: np.ndarray, opt: Any, normalized: bool = True, depth: np.ndarray | None = None
) -> list[Tensor]:
    """Network inputs at every evaluation scale, as published.

    The image is *resized*, not padded, to the next multiple of `padding_constant`.

    Args:
        image: (H, W, 3) uint8 RGB; with `bands` (H, W, C) float32, normalised, NaN where there is
            no value, which becomes the mean.
        opt: `cfg.DATASET`, or any object with some of its attributes.
        normalized: False: return uint8 images, for `Normalize`.
        depth: (H, W) float32 in metres, 0 where there is no depth, as a fourth channel.

    Returns:
        One (1, 3, h, w) tensor for each entry of `scales`, or else `imgSizes`: float32, or, with
        `normalized` False, uint8 RGB in channels_last. With depth (1, 4, h, w), and with `bands`
        (1, C, h, w) float32, always normalised.
    """
    options = DataOptions.read(opt)
    normalize = None if options.bands else Normalize.of(options)
    height, width = image.shape[:2]
    if normalize is None:
        image = np.nan_to_num(image)
    inputs = []
    scales = [(0, factor) for factor in options.scales]
    for short, factor in scales or [(short, 1.0) for short in options.imgSizes]:
        fitted = fitted_size(width, height, short, options.imgMaxSize, factor)
        size = (
            round_up(fitted[0], options.padding_constant),
            round_up(fitted[1], options.padding_constant),
        )
        pixels = as_batch(resize_image(image, size))
        if normalize is None:
            inputs.append(pixels)
            continue
        if depth is not None:
            channel = torch.from_numpy(normalize_depth(resize_depth(depth, size), options))
            inputs.append(torch.cat([normalize(pixels), channel[None, None]], dim=1).contiguous())
            continue
        inputs.append(normalize(pixels).contiguous() if normalized else pixels)
    return inputs


def jitter_factors(strength: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """Random factors of brightness, contrast and saturation, in 1 -/+ `strength`."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, size=3)
    return brightness, contrast, saturation


def color_jitter(
    image: np.ndarray, brightness: float, contrast: float, saturation: float
) -> np.ndarray:
    """Changes brightness, contrast and saturation of an (H, W, 3) uint8 RGB image by factors."""
    values = image.astype(np.float32) * np.float32(brightness)
    grey = values @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # H, W
    values = grey[:, :, None] + (values - grey[:, :, None]) * np.float32(saturation)
    center = grey.mean()
    values = center + (values - center) * np.float32(contrast)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
