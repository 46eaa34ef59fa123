"""Image, mask and depth files to arrays.

- **Images** of any Pillow mode become (H, W, 3) uint8 RGB. Grey is repeated, palettes are
  looked up, CMYK is converted, alpha is dropped (as Pillow's `convert("RGB")` does, and as the
  published checkpoints were trained). Grey values of 16 bits are divided by 257, of colours the
  upper 8 bits are taken; floats are multiplied by 255 where none is above 1, and else kept. Where
  the largest value is below a quarter of its range (16384 of 65535, 64 of 255) the range is another
  one, such as 12 bits, and the image would be nearly black: that is refused. EXIF orientation is
  applied. Of an animation the first frame is read; a TIFF of several pages is refused.
- **Masks** become (H, W) int32 stored values: grey levels, palette *indices*, 16- and 32-bit
  integers, bits; or, of a MATLAB file of the Semantic Boundaries Dataset (`.mat`), the classes in
  it. A colour mask is refused unless its three channels are equal, and so is a file of several
  frames or pages. A mask is turned only by its own EXIF orientation, never by its image's: if an
  image carries an orientation its mask was not drawn in, their sizes differ and the error says so.
"""

from __future__ import annotations

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

from mit_semseg.dataset.reading import READINGS, PathLike
from mit_semseg.dataset.transforms import resize_image
from mit_semseg.errors import one_line

# What Pillow raises on broken files, by format and by where they are broken.
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
# Pillow refuses images of more pixels than twice its limit, which stays an error, and warns of
# more than once, which large photographs have.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Its other warnings are of metadata; what it cannot read of the pixels is an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
_ORIENTATION = 274  # EXIF tag
_BAND = 1 << 20  # pixels converted at a time
_LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
_SUBFILE = 254  # TIFF tag: of a page, whether it is a smaller copy (1) or a mask (4) of another
# The share of its range that the largest value of an image has to reach, if not 8 bits say it.
_LEAST = 0.25
# The least a JPEG is decoded to, as a multiple of the size it is then resized to. With 1 the result
# is visibly sharper than a resize of the full image, by 2.5 grey levels on average.
_REDUCED_MARGIN = 2.5


def _open(path: PathLike) -> Image.Image:
    name = os.fspath(path)
    if not os.path.exists(path):
        missing = "a link to nothing" if os.path.islink(path) else "no such file"
        raise FileNotFoundError(f"{name}: {missing}; check DATASET.root_dataset")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise ValueError(f"{name}: a folder, a pipe or a device, not an image file")
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name}: claims more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, as files made "
            "to fill the memory do; cut it into pieces, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except _UNREADABLE as error:
        reason = "an empty file" if not os.path.getsize(path) else _reason(error, name)
        raise ValueError(f"{name}: not a readable image ({reason})") from error


def _decode(image: Image.Image, path: PathLike) -> Image.Image:
    """All pixels read and turned upright; a truncated file is an error that names it."""
    try:
        image.load()
        if image.format == "PNG":
            _check_png(path)
        if exif_orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return image


def _check_png(path: PathLike) -> None:
    """Refuse a PNG whose pixels do not fit their checksums, which Pillow leaves to others."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind != b"IDAT":
                file.seek(length + 4, os.SEEK_CUR)
                continue
            content = file.read(min(length, size))  # a damaged length may be anything
            if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(file.read(4), "big"):
                raise ValueError("the checksum of its pixels is wrong")


def _copies(image: Image.Image, count: int) -> list[bool]:
    """Whether each page of a TIFF is a smaller copy, or the mask, of another."""
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
    """Refuse a file of several frames or pages, of which one would be read silently."""
    name = os.fspath(path)
    try:
        count: int = getattr(image, "n_frames", 1)
        copies = _copies(image, count) if image.format == "TIFF" else [False] * count
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    width, height = image.size
    if copies[0]:
        raise ValueError(
            f"{name}: its first page, {width}x{height} pixels, is marked as a preview, as in raw "
            "files of cameras; convert it to PNG or JPEG"
        )
    if copies.count(False) > 1:
        raise ValueError(
            f"{name}: a {image.format} of {copies.count(False)} pages of {width}x{height} pixels; "
            "save the one that is meant as a file of its own (an image has 1, 3 or 4 channels)"
        )


def is_deep(image: Image.Image) -> bool:
    """Whether a file has 16 bits in each of several channels; to be asked before it is read.

    Pillow keeps the upper 8 bits of these.
    """
    tiles: Any = getattr(image, "tile", None)
    return image.mode in ("LA", "RGB", "RGBA") and bool(tiles) and ";16" in str(tiles[0][3])


def _damaged(path: PathLike, error: BaseException) -> ValueError:
    name = os.fspath(path)
    return ValueError(f"{name}: damaged or truncated image ({_reason(error, name)})")


def _reason(error: BaseException, name: str) -> str:
    """What Pillow says, in one line, without the name that stands before it anyway."""
    text = one_line(error)
    return "of no known format" if text.startswith("cannot identify") else text.replace(name, "it")


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 (upright) where there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _UNREADABLE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


class ImageFile:
    """An opened image file: its size at once, its pixels when it is known how large they must be.

    Use it in a `with` statement, which closes the file.

    Attributes:
        path: the file.
        size: (width, height) in pixels after EXIF orientation, from the file's header.
        is_label: whether format and mode can store class numbers: lossless, with one channel.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = path
        with ExitStack() as opened:
            opened.enter_context(READINGS.of(path))
            self._image = _open(path)
            opened.callback(self._image.close)
            self.is_label = self._image.format not in _LOSSY and self._image.mode[0] in "1LPI"
            self._deep = is_deep(self._image)  # what follows may read the pixels
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
        """The image as RGB, whatever the file's mode, upright; once for each opened file.

        With `size` it is what `resize_image` makes of the full image, but for one case: a JPEG
        at least 5 times as large in both directions is decoded at 1/2, 1/4 or 1/8, to no less
        than 2.5 times `size`, and resized from there. That takes half the time or less. Measured
        on photographs of streets and rooms (ADE20K, CamVid), the mean difference from Pillow's
        resize of the full image is 0.3 to 0.7 grey levels and below 1 for each of them; single
        pixels at hard edges differ by up to 15.

        Args:
            size: (width, height) to resize the upright image to; by default it keeps its own.

        Returns:
            (H, W, 3) uint8.

        Raises:
            ValueError: the file is truncated, or holds numbers that are no grey levels.
        """
        pixels = None
        if size is not None and self._image.format in ("JPEG", "MPO"):
            pixels = self._reduced(size)
            if pixels is None and self._image.mode == "RGB":
                pixels = self._quick()
        if pixels is None:
            pixels = to_rgb(_decode(self._image, self.path), os.fspath(self.path), self._deep)
        return pixels if size is None else resize_image(pixels, size)

    def _reduced(self, size: tuple[int, int]) -> np.ndarray | None:
        """A JPEG at `size` by way of a decode at reduced scale; None if it is not large enough."""
        image = self._image
        whole = image.size
        stored = size[::-1] if self._orientation >= 5 else size
        wanted = (math.ceil(_REDUCED_MARGIN * stored[0]), math.ceil(_REDUCED_MARGIN * stored[1]))
        drafted = image.draft(None, wanted)
        if drafted is None or image.size == whole:
            return None
        _, box = drafted  # where in the decoded pixels the image is: their sides are rounded up
        try:
            small = image.convert("RGB").resize(stored, Image.Resampling.BILINEAR, box)
        except _UNREADABLE as error:
            raise _damaged(self.path, error) from error
        return np.array(_decode(small, self.path))

    def _quick(self) -> np.ndarray | None:
        """An upright JPEG by torchvision; None where that cannot, for Pillow to do it or say why.

        The same library decodes the same pixels, and refuses what Pillow refuses; only Pillow's
        way of them from its own memory to an array is saved, a seventh of the time.
        """
        from torchvision.io import ImageReadMode, decode_jpeg  # slow to import; training only

        if self._orientation != 1:
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


def load_image(path: PathLike) -> np.ndarray:
    """An image file as RGB, whatever its mode, upright by its EXIF orientation.

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, is truncated, or holds numbers that are no grey levels.
    """
    with ImageFile(path) as file:
        return file.pixels()


def to_rgb(image: Image.Image, name: str = "image", deep: bool = False) -> np.ndarray:
    """A Pillow image of any mode as (H, W, 3) uint8 RGB; see the rules at the top of the module.

    Args:
        image: the image, upright.
        name: named in errors.
        deep: whether it was read from a file of 16 bits in each of several channels (`is_deep`).
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
                f"{name}: mode {image.mode} with values {low:g}..{high:g} is no image; "
                "save it with 8 or 16 bits a channel"
            )
        if limit > 1 and 0 < high < _LEAST * limit:
            raise ValueError(_too_dark(name, f"{high:g}", limit))
        pixels = np.empty((*grey.shape, 3), dtype=np.uint8)
        rows = max(1, _BAND // grey.shape[1])
        for y in range(0, len(grey), rows):  # a float64 copy of a large image would be huge
            band = np.multiply(grey[y : y + rows], scale, dtype=np.float64)
            pixels[y : y + rows] = np.rint(band)[:, :, None]
        return pixels
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow asks for this step; the colours are the same
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if deep and 0 < pixels.max() < _LEAST * 256:
        raise ValueError(_too_dark(name, f"below {(int(pixels.max()) + 1) * 256}", 65535))
    return pixels


def _too_dark(name: str, largest: str, limit: int) -> str:
    return (
        f"{name}: its largest value is {largest}, less than a quarter of {limit}, so that it would "
        f"be nearly black; scale its values to 0..{limit}, or save it with 8 bits a channel"
    )


def load_mask(path: PathLike) -> np.ndarray:
    """A mask file as stored values: grey levels, palette indices, 16- or 32-bit integers, or bits.

    Returns:
        (H, W) int32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, lossy, of floats, or in colour.
    """
    return stored_values(path).astype(np.int32)


def stored_values(path: PathLike) -> np.ndarray:
    """As `load_mask`, in the integer type the file has; it may be read-only."""
    name = os.fspath(path)
    if name.lower().endswith(".mat"):
        return _boundaries_classes(path)
    with READINGS.of(path), _open(path) as opened:
        if opened.format in _LOSSY or (opened.format == "WEBP" and _is_lossy_webp(path)):
            raise ValueError(
                f"{name}: a {opened.format} mask has altered label values; save masks as PNG"
            )
        _one_page(opened, path)
        # PNG greys of 2 and 4 bits are stretched to 0..255 by Pillow; the stored value is wanted.
        tile: Any = opened.tile[0] if opened.tile else None
        stretch = {"L;2": 85, "L;4": 17}.get(str(tile[3]) if tile else "", 1)
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
            f"{name}: a mask of mode {image.mode} does not hold one class number a pixel; "
            "save it with one channel (mode L, P or 16-bit), translating its colours to classes"
        )


def _is_lossy_webp(path: PathLike) -> bool:
    """Whether any image in a WebP file is of the kind that alters values."""
    with open(path, "rb") as file:
        file.seek(12)  # "RIFF", size, "WEBP"
        while len(head := file.read(8)) == 8:
            kind, length = head[:4], int.from_bytes(head[4:], "little")
            if kind == b"VP8 ":
                return True
            file.seek(length + length % 2, os.SEEK_CUR)
    return False


def _boundaries_classes(path: PathLike) -> np.ndarray:
    """The classes in a file of the Semantic Boundaries Dataset, (H, W) uint8."""
    from scipy.io import loadmat  # slow to import, and hardly ever needed
    from scipy.io.matlab import MatReadError

    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: no such file; check DATASET.root_dataset")
    try:
        with READINGS.of(path):
            values = loadmat(name)["GTcls"]["Segmentation"][0, 0]
    except (*_UNREADABLE, MatReadError, LookupError, TypeError) as error:
        reason = _reason(error, name)
        raise ValueError(f"{name}: no mask of GTcls.Segmentation ({reason})") from error
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(f"{name}: GTcls.Segmentation is {values.dtype} {values.shape}, no mask")
    return np.ascontiguousarray(values)


def load_depth(path: PathLike, scale: float | str) -> np.ndarray:
    """A depth image in metres.

    Args:
        path: a file of one channel of integers or floats, 0 (or NaN) where there is no depth.
        scale: stored units in a metre (1000: millimetres); or "sunrgbd": 16-bit millimetres whose
            lowest three bits are put first, as `read3dPoints.m` in the toolbox of SUN RGB-D (Song
            et al. 2015) reads them, and, as there, at most 8 metres.

    Returns:
        (H, W) float32, 0 where there is no depth.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, lossy, or of several channels.
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
                f"{name}: an image of mode {image.mode} is no depth; save depth as 16-bit PNG"
            )
        stored = np.asarray(image)
    if scale != "sunrgbd":
        depth = stored.astype(np.float32) / np.float32(scale)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))
    if image.mode in ("L", "F") or stored.min() < 0 or stored.max() > 65535:
        raise ValueError(
            f"{name}: DATASET.depth_scale sunrgbd is for images of 16 bits; set it to the number "
            "of stored units in a metre"
        )
    stored = stored.astype(np.uint16)
    millimetres = (stored >> 3) | (stored << 13)
    return np.minimum(millimetres.astype(np.float32) / 1000, np.float32(8))
