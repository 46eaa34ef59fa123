"""What a server accepts, and the check of uploaded images before they are decoded."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from mit_semseg.dataset.sources import as_image

# Formats with the size in their header and a decoder of bounded effort. TIFF and others have
# readers for many codecs, and some of Pillow's plugins start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# A progressive JPEG has about ten scans. Each can cost the decoder a pass over the whole image for
# a few bytes.
_MAX_SCANS = 100
# A marker in the entropy-coded data of a JPEG, which is neither a stuffed byte nor a restart.
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
_SCAN, _END, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, *range(0xD0, 0xD9))
# Exceptions of Pillow for damaged images, which depend on the format.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)


class Refused(ValueError):
    """An upload that is not served.

    Attributes:
        status: the HTTP status code.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        megabytes: size of a request's body, in 10^6 bytes.
        megapixels: width x height of an image, in 10^6 pixels, and of all images of a batch.
        queue: requests that are read, waiting or computed; more are refused with 503.
        batch: images of one forward pass.
        window: milliseconds that a request waits for others of the same size.
        timeout: seconds from the first byte of a request to its answer.
    """

    megabytes: float = 20.0
    megapixels: float = 16.0
    queue: int = 64
    batch: int = 8
    window: float = 5.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or value == 0 and field.name != "window":
                raise ValueError(f"--{field.name} {value:g}: give a positive number")

    @property
    def bytes(self) -> int:
        """Largest body of a request."""
        return int(self.megabytes * 1e6)

    @property
    def pixels(self) -> int:
        """Most pixels of an image."""
        return int(self.megapixels * 1e6)


def open_upload(data: bytes, limits: Limits) -> Image.Image:
    """An uploaded image, of which only the header has been read.

    Raises:
        Refused: not an image of `FORMATS`, or more pixels or JPEG scans than allowed.
    """
    Image.init()  # registers all formats; otherwise some are unknown until one is not recognised
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)}", limits) from error
    except _UNREADABLE as error:
        raise Refused(415, f"not a readable image; send {', '.join(FORMATS)}") from error
    width, height = image.size
    if width * height > limits.pixels:
        raise _too_large(f"{width} x {height}", limits)
    if image.format in ("JPEG", "MPO") and _scans(data) > _MAX_SCANS:
        raise Refused(413, f"a JPEG of more than {_MAX_SCANS} scans; save it again")
    return image


def decode(image: Image.Image) -> np.ndarray:
    """The pixels of an image from `open_upload`, (H, W, 3) uint8 RGB.

    Raises:
        Refused: it is damaged, or its values are not grey levels.
    """
    try:
        return as_image(image)
    except _UNREADABLE as error:
        raise Refused(400, "a damaged image, or values that are not grey levels") from error


def _too_large(what: str, limits: Limits) -> Refused:
    return Refused(413, f"an image of {what} pixels; the limit is {limits.pixels}")


def _scans(data: bytes) -> int:
    """Number of scans of a JPEG, up to one more than allowed."""
    count, at = 0, 2
    while count <= _MAX_SCANS and (found := _MARKER.search(data, at)):
        marker, at = found[1][0], found.end()
        if marker == _END:
            break
        count += marker == _SCAN
        if marker not in _WITHOUT_LENGTH:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return count
