"""Files to arrays, and arrays to what the network takes.

Rules for files:

- **Images** of any Pillow mode become (H, W, 3) uint8 RGB. Grey is repeated, palettes are
  looked up, CMYK is converted, alpha is dropped (as Pillow's `convert("RGB")` does, and as the
  published checkpoints were trained); 16-bit grey is divided by 257. EXIF orientation is applied.
- **Masks** become (H, W) int32 stored values: grey levels, palette *indices*, 16- and 32-bit
  integers, bits. A colour mask is refused unless its three channels are equal. A mask is turned
  only by its own EXIF orientation, never by its image's: if an image carries an orientation its
  mask was not drawn in, their sizes differ and the error says so.
"""

from __future__ import annotations

import os
import struct
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mit_semseg.dataset.options import DataOptions

# What Pillow raises on broken files, by format and by where they are broken.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 274  # EXIF tag
_LOSSY = ("JPEG", "MPO", "JPEG2000")

PathLike = str | os.PathLike[str]


# ------------------------------------------------------------------------------ reading
def _open(path: PathLike) -> Image.Image:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no such file; check DATASET.root_dataset")
    try:
        return Image.open(path)
    except _UNREADABLE as error:
        raise ValueError(f"{os.fspath(path)}: not a readable image ({error})") from error


def _decode(image: Image.Image, path: PathLike) -> Image.Image:
    """All pixels read and turned upright; a truncated file is an error that names it."""
    try:
        image.load()
        if exif_orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise ValueError(f"{os.fspath(path)}: damaged or truncated image ({error})") from error
    return image


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 (upright) where there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _UNREADABLE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def image_size(path: PathLike) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the file's header only."""
    with _open(path) as image:
        width, height = image.size
        return (height, width) if exif_orientation(image) >= 5 else (width, height)


def load_image(path: PathLike) -> np.ndarray:
    """An image file as RGB, whatever its mode, upright by its EXIF orientation.

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, is truncated, or holds numbers that are no grey levels.
    """
    with _open(path) as image:
        return to_rgb(_decode(image, path), name=os.fspath(path))


def to_rgb(image: Image.Image, name: str = "image") -> np.ndarray:
    """A Pillow image of any mode as (H, W, 3) uint8 RGB; see the rules at the top of the module."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float64)
        low, high = float(grey.min()), float(grey.max())
        if image.mode != "F":
            scale, limit = 1 / 257, 65535
        elif high <= 1:
            scale, limit = 255.0, 1
        else:
            scale, limit = 1.0, 255
        if not (low >= 0 and high <= limit):  # NaN fails too
            raise ValueError(
                f"{name}: mode {image.mode} with values {low:g}..{high:g} is no picture; "
                "save it with 8 or 16 bits a channel"
            )
        level = np.rint(grey * scale).astype(np.uint8)
        return np.repeat(level[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow asks for this step; the colours are the same
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def load_mask(path: PathLike) -> np.ndarray:
    """A mask file as stored values: grey levels, palette indices, 16- or 32-bit integers, or bits.

    Returns:
        (H, W) int32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, lossy, of floats, or in colour.
    """
    name = os.fspath(path)
    with _open(path) as opened:
        if opened.format in _LOSSY:
            raise ValueError(
                f"{name}: a {opened.format} mask has altered label values; save masks as PNG"
            )
        # PNG greys of 2 and 4 bits are stretched to 0..255 by Pillow; the stored value is wanted.
        tile: Any = opened.tile[0] if opened.tile else None
        stretch = {"L;2": 85, "L;4": 17}.get(str(tile[3]) if tile else "", 1)
        image = _decode(opened, path)
        if image.mode in ("L", "P", "1") or image.mode.startswith("I"):
            raw = np.asarray(image).astype(np.int32)
            return raw // stretch if stretch > 1 else raw
        if image.mode == "LA":
            return np.asarray(image)[:, :, 0].astype(np.int32)
        if image.mode in ("RGB", "RGBA"):
            red, green, blue = np.moveaxis(np.asarray(image)[:, :, :3], 2, 0)
            if np.array_equal(red, green) and np.array_equal(red, blue):
                return red.astype(np.int32)
        raise ValueError(
            f"{name}: a mask of mode {image.mode} does not hold one class number a pixel; "
            "save it with one channel (mode L, P or 16-bit), translating its colours to classes"
        )


# ------------------------------------------------------------------------------ geometry
def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def fitted_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """(width, height) with the short side at `short`, unless the long side would pass `longest`."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(width * scale)), max(1, int(height * scale))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bilinear resize as Pillow does it.

    Args:
        image: (H, W, 3) uint8.
        size: (width, height) wanted.

    Returns:
        (height, width, 3) uint8.
    """
    height, width = image.shape[:2]
    if (width, height) == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


@lru_cache(maxsize=256)
def _nearest(old: int, new: int) -> np.ndarray:
    """Source index of each of `new` pixels; taken from Pillow itself, so that it agrees exactly."""
    row = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    index = np.asarray(row.resize((new, 1), Image.Resampling.NEAREST))[0].astype(np.intp)
    index.setflags(write=False)
    return index


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest resize of (H, W) labels of any dtype to (width, height), exactly as Pillow's."""
    height, width = labels.shape
    if (width, height) == tuple(size):
        return labels
    return labels[_nearest(height, size[1])][:, _nearest(width, size[0])]


# ------------------------------------------------------------------------------ values
def normalize(image: np.ndarray, options: DataOptions) -> Tensor:
    """(H, W, 3) uint8 RGB -> (3, H, W) float32 as the encoder expects it."""
    if options.color_order == "BGR":
        image = image[:, :, ::-1]
    values = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()  # 3, H, W
    if options.value_range == 1:
        values.div_(255.0)
    mean = torch.tensor(options.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(options.std, dtype=torch.float32)[:, None, None]
    return values.sub_(mean).div_(std)


def scaled_inputs(image: np.ndarray, opt: Any) -> list[Tensor]:
    """Network inputs at every evaluation scale, as published.

    The image is *resized*, not padded, to the next multiple of `padding_constant`.

    Args:
        image: (H, W, 3) uint8 RGB.
        opt: `cfg.DATASET`, or any object with some of its attributes.

    Returns:
        One (1, 3, h, w) float32 tensor for each entry of `imgSizes`.
    """
    options = DataOptions.read(opt)
    height, width = image.shape[:2]
    inputs = []
    for short in options.imgSizes:
        fitted = fitted_size(width, height, short, options.imgMaxSize)
        size = tuple(round_up(side, options.padding_constant) for side in fitted)
        resized = resize_image(image, (size[0], size[1]))
        inputs.append(normalize(resized, options)[None])
    return inputs


def color_jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast and saturation, each by a factor in 1 -/+ `strength`."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, size=3)
    values = image.astype(np.float32) * np.float32(brightness)
    grey = values @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # H, W
    values = grey[:, :, None] + (values - grey[:, :, None]) * np.float32(saturation)
    center = grey.mean()
    values = center + (values - center) * np.float32(contrast)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
