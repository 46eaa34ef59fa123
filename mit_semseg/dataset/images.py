"""Reads image, mask and depth files as arrays.

- **Images** of any Pillow mode become (H, W, 3) uint8 RGB. Grey is repeated, palettes and CMYK are
  converted, alpha is dropped (as by Pillow's `convert("RGB")`, with which the published checkpoints
  were trained). 16-bit grey values are divided by 257; of 16-bit colours the upper 8 bits are used;
  floats are multiplied by 255 if none is above 1. If the largest value is below a quarter of the
  range (16384 of 65535, 64 of 255), the image is refused: its values have another range, such as 12
  bits, and it would be nearly black. EXIF orientation is applied. Of an animation the first frame
  is read; a TIFF with several pages is refused.
- **Masks** become (H, W) int32 stored values: grey levels, palette *indices*, 16- and 32-bit
  integers, or bits; of a MATLAB file of the Semantic Boundaries Dataset (`.mat`), its classes. A
  colour mask is refused unless its three channels are equal, and so is a file with several frames
  or pages. A mask is rotated by its own EXIF orientation only, not by that of its image; if that
  makes the sizes different, it is an error.
"""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zlib
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from mit_semseg.dataset.reading import READINGS
from mit_semseg.dataset.transforms import resize_image
from mit_semseg.errors import one_line
from mit_semseg.files import PathLike

# Exceptions of Pillow for damaged files, which depend on the format.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Pillow warns of images above its limit of pixels, which large photographs exceed. Those above
# twice the limit remain an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Its other warnings are about metadata.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
_ORIENTATION = 274  # EXIF tag
_BAND = 1 << 20  # pixels converted at a time
_LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
_SUBFILE = 254  # TIFF tag: the page is a smaller copy (bit 1) or a mask (bit 4) of another
# Minimum of the largest value of an image that does not have 8 bits, as a fraction of its range.
_MIN_LARGEST = 0.25
# A JPEG is decoded to at least this multiple of the size that it is then resized to. With 1 the
# result is visibly sharper than a resize of the full image, by 2.5 grey levels on average.
_REDUCED_MARGIN = 2.5


def check_file(path: PathLike) -> None:
    """FileNotFoundError or ValueError if a path is not that of a file."""
    name = os.fspath(path)
    if not os.path.exists(path):
        missing = "a broken link" if os.path.islink(path) else "no such file"
        raise FileNotFoundError(f"{name}: {missing}; check DATASET.root_dataset")
    if not os.path.isfile(path):  # opening a pipe would block
        raise ValueError(f"{name}: a folder, a pipe or a device, not an image file")


def _open(path: PathLike, content: bytes | None = None) -> Image.Image:
    name = os.fspath(path)
    if content is None:
        check_file(path)
    try:
        return Image.open(path if content is None else io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name}: claims more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, as files made "
            "to exhaust the memory do; cut it into pieces, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except _UNREADABLE as error:
        size = os.path.getsize(path) if content is None else len(content)
        reason = _reason(error, name) if size else "an empty file"
        raise ValueError(f"{name}: not a readable image ({reason})") from error


def _decode(image: Image.Image, path: PathLike, content: bytes | None = None) -> Image.Image:
    """Reads all pixels and applies EXIF orientation; ValueError if the file is damaged."""
    try:
        image.load()
        if image.format == "PNG":
            _check_png(path, content)
        if exif_orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return image


def _check_png(path: PathLike, content: bytes | None) -> None:
    """ValueError if the checksums of a PNG's pixels are wrong, which Pillow does not check."""
    size = os.path.getsize(path) if content is None else len(content)
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind != b"IDAT":
                file.seek(length + 4, os.SEEK_CUR)
                continue
            pixels = file.read(min(length, size))  # the length may be damaged
            if zlib.crc32(pixels, zlib.crc32(kind)) != int.from_bytes(file.read(4), "big"):
                raise ValueError("the checksum of its pixels is wrong")


def _copies(image: Image.Image, count: int) -> list[bool]:
    """For each page of a TIFF, whether it is a smaller copy or the mask of another."""
    found = []
    for number in range(count):
        if number:
            image.seek(number)
        kind = getattr(image, "tag_v2", {}).get(_SUBFILE, 0)
        found.append(isinstance(kind, int) and bool(kind & 5))
    if count > 1:
        image.seek(0)
    return found


def _one_page(image: Image.Image, path: PathLike) -> None:
    """ValueError if a file has several frames or pages."""
    name = os.fspath(path)
    try:
        count: int = getattr(image, "n_frames", 1)
        copies = _copies(image, count) if image.format == "TIFF" else [False] * count
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    width, height = image.size
    if copies[0]:
        raise ValueError(
            f"{name}: its first page, {width}x{height} pixels, is a preview, as in raw files of "
            "cameras; convert it to PNG or JPEG"
        )
    if copies.count(False) > 1:
        raise ValueError(
            f"{name}: a {image.format} of {copies.count(False)} pages of {width}x{height} pixels; "
            "save the right one as a separate file (an image has 1, 3 or 4 channels)"
        )


def is_deep(image: Image.Image) -> bool:
    """Whether a file has several channels of 16 bits, of which Pillow reads the upper 8 bits.

    Must be called before the pixels are read.
    """
    tiles: Any = getattr(image, "tile", None)
    return image.mode in ("LA", "RGB", "RGBA") and bool(tiles) and ";16" in str(tiles[0][3])


def _damaged(path: PathLike, error: BaseException) -> ValueError:
    name = os.fspath(path)
    return ValueError(f"{name}: damaged or truncated image ({_reason(error, name)})")


def _reason(error: BaseException, name: str) -> str:
    """Pillow's message in one line, without the file name."""
    text = one_line(error)
    return "of no known format" if text.startswith("cannot identify") else text.replace(name, "it")


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 (upright) if there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _UNREADABLE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


class ImageFile:
    """An open image file, whose size is known before its pixels are read.

    Use it in a `with` statement, which closes the file.

    Args:
        path: the file.
        content: its bytes, if they are in memory; `path` is then a name for errors.

    Attributes:
        path: the file.
        size: (width, height) in pixels after EXIF orientation, from the file's header.
        is_label: whether format and mode can store class numbers: lossless, with one channel.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image.
    """

    def __init__(self, path: PathLike, content: bytes | None = None) -> None:
        self.path, self._content = path, content
        with ExitStack() as opened:
            opened.enter_context(READINGS.of(path))
            self._image = _open(path, content)
            opened.callback(self._image.close)
            self.is_label = self._image.format not in _LOSSY and self._image.mode[0] in "1LPI"
            self._deep = is_deep(self._image)  # before the pixels are read
            if self._image.format == "TIFF":
                _one_page(self._image, path)
            self._orientation = exif_orientation(self._image)
            self._opened = opened.pop_all()
        width, height = self._image.size
        self.size = (height, width) if self._orientation >= 5 else (width, height)

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def pixels(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """Reads the image as upright RGB; can be called once.

        With `size` the result is that of `resize_image`, with one exception: a JPEG at least 5
        times as large in both directions is decoded at 1/2, 1/4 or 1/8 of its size, to at least 2.5
        times `size`, and then resized, which takes at most half the time. On photographs of streets
        and rooms (ADE20K, CamVid) the mean difference from Pillow's resize of the full image is 0.3
        to 0.7 grey levels, and below 1 for each image; single pixels at hard edges differ by up to
        15.

        Args:
            size: (width, height) to resize the upright image to; None: not resized.

        Returns:
            (H, W, 3) uint8.

        Raises:
            ValueError: the file is damaged, or its values are not grey levels.
        """
        pixels = None
        if size is not None and self._image.format in ("JPEG", "MPO"):
            pixels = self._reduced(size)
            if pixels is None and self._image.mode == "RGB":
                pixels = self._quick()
        if pixels is None:
            image = _decode(self._image, self.path, self._content)
            pixels = to_rgb(image, os.fspath(self.path), self._deep)
        return pixels if size is None else resize_image(pixels, size)

    def _reduced(self, size: tuple[int, int]) -> np.ndarray | None:
        """A JPEG at `size`, decoded at reduced scale; None if it is not large enough."""
        image = self._image
        whole = image.size
        stored = size[::-1] if self._orientation >= 5 else size
        wanted = (math.ceil(_REDUCED_MARGIN * stored[0]), math.ceil(_REDUCED_MARGIN * stored[1]))
        drafted = image.draft(None, wanted)
        if drafted is None or image.size == whole:
            return None
        _, box = drafted  # the image in the decoded pixels, whose sides are rounded up
        try:
            small = image.convert("RGB").resize(stored, Image.Resampling.BILINEAR, box)
        except _UNREADABLE as error:
            raise _damaged(self.path, error) from error
        return np.array(_decode(small, self.path))

    def _quick(self) -> np.ndarray | None:
        """An upright JPEG decoded by torchvision; None if that fails, and Pillow is used.

        The pixels are the same, but Pillow's copy to an array is avoided, a seventh of the time.
        """
        from torchvision.io import ImageReadMode, decode_jpeg  # slow to import; training only

        if self._orientation != 1 or self._content is not None:
            return None
        try:
            data = torch.from_numpy(np.fromfile(self.path, dtype=np.uint8))
            pixels = decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
        except (RuntimeError, AttributeError):  # damaged, or a torchvision built without libjpeg
            return None
        return pixels if pixels.shape[1::-1] == self.size else None


def image_size(path: PathLike) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the file's header only."""
    with ImageFile(path) as file:
        return file.size


def load_image(path: PathLike, content: bytes | None = None) -> np.ndarray:
    """Reads an image file as RGB, with EXIF orientation applied.

    Args:
        path: the file.
        content: its bytes, if they are in memory; `path` is then a name for errors.

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image, is damaged, or its values are not grey levels.
    """
    with ImageFile(path, content) as file:
        return file.pixels()


def to_rgb(image: Image.Image, name: str = "image", deep: bool = False) -> np.ndarray:
    """Converts a Pillow image of any mode to (H, W, 3) uint8 RGB, by the rules of this module.

    Args:
        image: the upright image.
        name: file name for errors.
        deep: whether its file has several channels of 16 bits (`is_deep`).
    """
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        low, high = float(grey.min()), float(grey.max())
        if image.mode != "F":
            scale, limit = 1 / 257, 65535
        elif high <= 1:
            scale, limit = 255.0, 1
        else:
            scale, limit = 1.0, 255
        if not (low >= 0 and high <= limit):  # NaN fails too
            raise ValueError(
                f"{name}: mode {image.mode} with values {low:g}..{high:g} is not an image; "
                "save it with 8 or 16 bits per channel"
            )
        if limit > 1 and 0 < high < _MIN_LARGEST * limit:
            raise ValueError(_too_dark(name, f"{high:g}", limit))
        pixels = np.empty((*grey.shape, 3), dtype=np.uint8)
        rows = max(1, _BAND // grey.shape[1])
        for y in range(0, len(grey), rows):  # in bands, to limit the memory for float64
            band = np.multiply(grey[y : y + rows], scale, dtype=np.float64)
            pixels[y : y + rows] = np.rint(band)[:, :, None]
        return pixels
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns; the colours are the same
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if deep and 0 < pixels.max() < _MIN_LARGEST * 256:
        raise ValueError(_too_dark(name, f"below {(int(pixels.max()) + 1) * 256}", 65535))
    return pixels


def _too_dark(name: str, largest: str, limit: int) -> str:
    return (
        f"{name}: its largest value is {largest}, less than a quarter of {limit}, so it would be "
        f"nearly black; scale its values to 0..{limit}, or save it with 8 bits per channel"
    )


def load_mask(path: PathLike) -> np.ndarray:
    """Reads stored mask values: grey levels, palette indices, 16- or 32-bit integers, or bits.

    Returns:
        (H, W) int32.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, has a lossy format, floats or colours.
    """
    return stored_values(path).astype(np.int32)


def stored_values(path: PathLike) -> np.ndarray:
    """As `load_mask`, in the integer type of the file; may be read-only."""
    name = os.fspath(path)
    if name.lower().endswith(".mat"):
        return _boundaries_classes(path)
    with READINGS.of(path), _open(path) as opened:
        if opened.format in _LOSSY or (opened.format == "WEBP" and _is_lossy_webp(path)):
            raise ValueError(
                f"{name}: a {opened.format} mask has altered label values; save masks as PNG"
            )
        _one_page(opened, path)
        # Pillow scales PNG greys of 2 and 4 bits to 0..255; this restores the stored values.
        tiles: Any = getattr(opened, "tile", None)
        stretch = {"L;2": 85, "L;4": 17}.get(str(tiles[0][3]) if tiles else "", 1)
        image = _decode(opened, path)
        pixels = np.asarray(image)
        if image.mode in ("L", "P") or image.mode.startswith("I"):
            return pixels // stretch if stretch > 1 else pixels
        if image.mode == "1":
            return pixels.astype(np.int32).astype(np.uint8)
        if image.mode == "LA":
            return pixels[:, :, 0]
        if image.mode in ("RGB", "RGBA"):
            red, green, blue = np.moveaxis(pixels[:, :, :3], 2, 0)
            if np.array_equal(red, green) and np.array_equal(red, blue):
                return red
        raise ValueError(
            f"{name}: a mask of mode {image.mode} does not have one class id per pixel; "
            "save it with one channel (mode L, P or 16-bit), with colours converted to class ids"
        )


def _is_lossy_webp(path: PathLike) -> bool:
    """Whether any image in a WebP file is lossy."""
    with open(path, "rb") as file:
        file.seek(12)  # "RIFF", size, "WEBP"
        while len(head := file.read(8)) == 8:
            kind, length = head[:4], int.from_bytes(head[4:], "little")
            if kind == b"VP8 ":
                return True
            file.seek(length + length % 2, os.SEEK_CUR)
    return False


def _boundaries_classes(path: PathLike) -> np.ndarray:
    """The classes of a file of the Semantic Boundaries Dataset, (H, W) uint8."""
    from scipy.io import loadmat  # slow to import, and rarely used
    from scipy.io.matlab import MatReadError

    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: no such file; check DATASET.root_dataset")
    try:
        with READINGS.of(path):
            values = loadmat(name)["GTcls"]["Segmentation"][0, 0]
    except (*_UNREADABLE, MatReadError, LookupError, TypeError) as error:
        reason = _reason(error, name)
        raise ValueError(f"{name}: has no mask GTcls.Segmentation ({reason})") from error
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(f"{name}: GTcls.Segmentation is {values.dtype} {values.shape}, no mask")
    return np.ascontiguousarray(values)


def load_depth(path: PathLike, scale: float | str) -> np.ndarray:
    """Reads a depth image in metres.

    Args:
        path: a file with one channel of integers or floats; 0 or NaN means no depth.
        scale: stored units per metre (1000: millimetres); or "sunrgbd": 16-bit millimetres rotated
            by three bits, with a maximum of 8 metres, as read by `read3dPoints.m` of the toolbox
            of SUN RGB-D (Song et al. 2015).

    Returns:
        (H, W) float32, 0 where there is no depth.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, has a lossy format or several channels.
    """
    name = os.fspath(path)
    with READINGS.of(path), _open(path) as opened:
        if opened.format in _LOSSY:
            raise ValueError(
                f"{name}: a {opened.format} has altered depths; save depth as 16-bit PNG"
            )
        _one_page(opened, path)
        image = _decode(opened, path)
        if image.mode not in ("L", "F") and not image.mode.startswith("I"):
            raise ValueError(
                f"{name}: a depth image cannot have mode {image.mode}; save it as 16-bit PNG"
            )
        stored = np.asarray(image)
    if scale != "sunrgbd":
        depth = stored.astype(np.float32) / np.float32(scale)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))
    if image.mode in ("L", "F") or stored.min() < 0 or stored.max() > 65535:
        raise ValueError(
            f"{name}: DATASET.depth_scale sunrgbd is for images of 16 bits; set it to the number "
            "of stored units per metre"
        )
    stored = stored.astype(np.uint16)
    millimetres = (stored >> 3) | (stored << 13)
    return np.minimum(millimetres.astype(np.float32) / 1000, np.float32(8))
