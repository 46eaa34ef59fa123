"""Images from memory and from urls, by the rules of `dataset.images`."""

from __future__ import annotations

import os
import tempfile
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps

from mit_semseg.dataset.images import exif_orientation, is_deep, load_image, to_rgb
from mit_semseg.download import DownloadError, fetch
from mit_semseg.errors import one_line

# One image: a path or url, the bytes of a file or an open one, or pixels.
Source = (
    str | os.PathLike[str] | bytes | bytearray | BinaryIO | Image.Image | np.ndarray | torch.Tensor
)
_URLS = ("http://", "https://")


def is_url(source: object) -> bool:
    """Whether a source is the url of an image."""
    return isinstance(source, str) and source.startswith(_URLS)


def is_one(source: object) -> TypeGuard[Source]:
    """Whether this is one image, not a batch of them."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return source.ndim != 4
    known = (str, os.PathLike, bytes, bytearray, Image.Image)
    return isinstance(source, known) or hasattr(source, "read")


def file_name(url: str) -> str:
    """The name of the file of a url; `image` if it has none."""
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "image"


@contextmanager
def as_file(source: Source) -> Iterator[Path]:
    """A file with the image of a url, or with the bytes of one; a path as it is.

    Errors in the context name the source instead of the temporary file.

    Raises:
        ValueError: the url cannot be downloaded, or what the context raises.
    """
    if isinstance(source, (str, os.PathLike)) and not is_url(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        name = source if isinstance(source, str) else "image"
        path = Path(folder, file_name(name) if is_url(source) else name)
        try:
            if isinstance(source, str):
                fetch(source, path, progress=False)
            else:
                path.write_bytes(_content(source))
            yield path
        except DownloadError as error:
            raise ValueError(error.reason) from error
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(one_line(error).replace(str(path), name)) from error


def as_image(source: Source) -> np.ndarray:
    """One image as RGB.

    Args:
        source: a path; an http or https url; the bytes of an image file; a binary file object; a
            Pillow image of any mode; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a tensor
            (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are uint8, or float in
            [0, 1]. EXIF orientation is applied; an alpha channel is ignored.

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not an image, a url that cannot be downloaded, or an array or tensor of another
            shape, type or range.
    """
    if is_url(source):
        with as_file(source) as path:
            return load_image(path)
    if isinstance(source, (str, os.PathLike)):
        if not os.path.exists(source):  # the error of load_image is about data sets
            raise FileNotFoundError(f"{os.fspath(source)}: no such file")
        return load_image(source)
    if isinstance(source, Image.Image):
        deep = is_deep(source)  # first, since reading the pixels may change it
        turned = exif_orientation(source) != 1
        return to_rgb(ImageOps.exif_transpose(source) if turned else source, deep=deep)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    return load_image("image", _content(source))


def as_images(batch: np.ndarray | torch.Tensor) -> list[np.ndarray | torch.Tensor]:
    """The images of a batch, (N, H, W, C) array or (N, C, H, W) tensor."""
    return list(batch.detach().cpu() if isinstance(batch, torch.Tensor) else batch)


def _content(source: object) -> bytes:
    """The bytes of an image file that is in memory or open."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if not hasattr(source, "read"):
        raise ValueError(
            f"cannot segment a {type(source).__name__}; give a path, url, bytes, file object, "
            "Pillow image, NumPy array or tensor, or several of them"
        )
    content = source.read()
    if not isinstance(content, bytes):
        name = getattr(source, "name", "the file object")
        raise ValueError(f'{name}: opened as text; open images with mode "rb"')
    return content


def _from_tensor(tensor: torch.Tensor) -> np.ndarray:
    shape = tuple(tensor.shape)
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in (1, 3, 4)):
        raise ValueError(
            f"image tensor of shape {shape}; give (H, W), (1, H, W), (3, H, W) or (4, H, W); "
            "tensors have channels first, NumPy arrays last"
        )
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):  # not known to NumPy, or too coarse
        tensor = tensor.float()
    array = tensor.numpy()
    return _from_array(array if array.ndim == 2 else np.moveaxis(array, 0, 2))


def _from_array(array: np.ndarray) -> np.ndarray:
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"image array of shape {shape}; give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(
                f"float image array with values {low:g}..{high:g}; scale it to [0, 1], or convert "
                "it to uint8"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"image array of type {array.dtype}; give uint8, or float in [0, 1]")
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array[:, :, :3])
