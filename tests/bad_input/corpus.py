"""Files as they should not be, or as few people expect them: made here, and what is right of each.

A case writes one file. `good` holds the pixels (or records, or values) that must come out of it;
`message` what the one line about it must say besides the name of the file.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

HEIGHT, WIDTH = 24, 40
_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
COLOR: np.ndarray = np.stack([6 * _X, 10 * _Y, 3 * (_X + _Y)], axis=2).astype(np.uint8)
GREY: np.ndarray = COLOR[:, :, 0].copy()
LABELS: np.ndarray = ((_X // 8 + _Y // 8) % 4).astype(np.uint8)  # 0 is ignored, 1..3 are classes

# Where a picture that is stored by EXIF orientation k has each of its pixels.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@dataclass(frozen=True)
class Case:
    """One file: how it is written, and what is right."""

    name: str
    write: Callable[[Path], Any]
    good: Any = None
    message: str = ""
    tolerance: float = 0.0  # mean absolute difference of pixels, where the format is lossy

    def __str__(self) -> str:
        return self.name


# ------------------------------------------------------------------------------ images
def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """An image file's bytes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _bytes(name: str, content: bytes, **right: Any) -> Case:
    return Case(name, lambda path: path.write_bytes(content), **right)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_header(width: int, height: int, *more: bytes) -> bytes:
    """A grey PNG that claims a size and holds one byte of pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + data + _chunk(b"IEND", b"")


def _oriented(orientation: int, kind: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED[orientation](COLOR))
    return encoded(stored, kind, exif=exif, **options)


def _image_cases() -> list[Case]:
    color = Image.fromarray(COLOR)
    palette = color.quantize(32)
    bits = Image.fromarray(GREY > 100)
    alpha = np.dstack([COLOR, GREY])
    jpeg, png = encoded(COLOR, "JPEG", quality=95), encoded(COLOR, "PNG")
    repeated = np.repeat(GREY[:, :, None], 3, axis=2)
    bomb_text = _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27)))

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values[:, :, None], 3, axis=2)

    handled = [
        _bytes("plain.png", png, good=COLOR),
        _bytes("plain.jpg", jpeg, good=COLOR, tolerance=2),
        _bytes(
            "progressive.jpg",
            encoded(COLOR, "JPEG", quality=95, progressive=True),
            good=COLOR,
            tolerance=2,
        ),
        _bytes("png_named.jpg", png, good=COLOR),
        _bytes("jpg_named.png", jpeg, good=COLOR, tolerance=2),
        _bytes("UPPER.PNG", png, good=COLOR),
        _bytes("cmyk.tif", encoded(color.convert("CMYK"), "TIFF"), good=COLOR),
        _bytes(
            "cmyk.jpg", encoded(color.convert("CMYK"), "JPEG", quality=95), good=COLOR, tolerance=3
        ),
        _bytes("ycbcr.tif", encoded(color.convert("YCbCr"), "TIFF"), good=COLOR, tolerance=2),
        _bytes("grey.png", encoded(GREY, "PNG"), good=repeated),
        _bytes("grey.jpg", encoded(GREY, "JPEG", quality=95), good=repeated, tolerance=2),
        _bytes("grey16.png", encoded(GREY.astype(np.uint16) * 257, "PNG"), good=repeated),
        # cv2 stores blue first, and Pillow cannot write this kind.
        Case("rgb16.png", lambda path: _save16(path, COLOR[:, :, ::-1]), good=COLOR),
        _bytes("grey16.tif", encoded(GREY.astype(np.uint16) * 257, "TIFF"), good=repeated),
        _bytes("float.tif", encoded(GREY.astype(np.float32) / 255, "TIFF"), good=repeated),
        _bytes("rgba.png", encoded(alpha, "PNG"), good=COLOR),
        _bytes("la.png", encoded(np.dstack([GREY, GREY]), "PNG"), good=repeated),
        _bytes("palette.png", encoded(palette, "PNG"), good=np.array(palette.convert("RGB"))),
        _bytes(
            "palette_alpha.png",
            encoded(palette, "PNG", transparency=0),
            good=np.array(palette.convert("RGB")),
        ),
        _bytes("bits.png", encoded(bits, "PNG"), good=spread(np.uint8(255) * (GREY > 100))),
        _bytes(
            "bits.tif",
            encoded(bits, "TIFF", compression="group4"),
            good=spread(np.uint8(255) * (GREY > 100)),
        ),
        _bytes(
            "animated.gif",
            encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
            good=np.array(palette.convert("RGB")),
        ),
        _bytes(
            "animated.png",
            encoded(color, "PNG", save_all=True, append_images=[color.rotate(180)]),
            good=COLOR,
        ),
        # The second page is a smaller copy of the first, as cameras and maps have them.
        _bytes("preview.tif", _tiff((COLOR, 0), (COLOR[::2, ::2], 1)), good=COLOR),
        _bytes("row.png", encoded(COLOR[:1], "PNG"), good=COLOR[:1]),
        _bytes("column.png", encoded(COLOR[:, :1], "PNG"), good=COLOR[:, :1]),
        _bytes("pixel.png", encoded(COLOR[5:6, 7:8], "PNG"), good=COLOR[5:6, 7:8]),
        _bytes(
            "row.jpg",
            encoded(spread(GREY[:1]), "JPEG", quality=95),
            good=spread(GREY[:1]),
            tolerance=3,
        ),
        _bytes("exif_orientation_0.png", _exif(0), good=COLOR),
        _bytes("exif_orientation_9.png", _exif(9), good=COLOR),
        _bytes("trailing_bytes.png", png + b"more" * 100, good=COLOR),
        _bytes("trailing_bytes.jpg", jpeg + b"more" * 100, good=COLOR, tolerance=2),
        *(_bytes(f"exif_{k}.png", _oriented(k, "PNG"), good=COLOR) for k in STORED),
        *(
            _bytes(f"exif_{k}.jpg", _oriented(k, "JPEG", quality=95), good=COLOR, tolerance=2)
            for k in STORED
        ),
        Case("link.png", lambda path: _link_to_neighbour(path, png), good=COLOR),
    ]
    refused = [
        _bytes("empty.jpg", b"", message="empty file"),
        _bytes("empty.png", b"", message="empty file"),
        _bytes("truncated.jpg", jpeg[: len(jpeg) * 2 // 3], message="truncated"),
        _bytes("truncated.png", png[: len(png) * 2 // 3], message="truncated"),
        _bytes("header_only.jpg", jpeg[:20], message="image"),
        _bytes("header_only.png", png[:16], message="image"),
        _bytes("one_byte.png", png[:1], message="of no known format"),
        _bytes("checksum.png", _flipped(png, len(png) // 2), message="damaged"),
        _bytes("text.jpg", b"This is no picture.\n", message="of no known format"),
        _bytes(
            "page.jpg",
            b"<!DOCTYPE html><html><body>404</body></html>",
            message="of no known format",
        ),
        _bytes("pickle.png", b"\x80\x02cposix\nsystem\nq\x00.", message="of no known format"),
        _bytes("bomb.png", png_header(60000, 60000), message="60000|more than \\d+ pixels"),
        _bytes("widest.png", png_header(2**31 - 1, 2**31 - 1), message="more than \\d+ pixels"),
        _bytes("no_width.png", png_header(0, 10), message="image"),
        _bytes("text_bomb.png", png_header(4, 4, bomb_text), message="image"),
        _bytes("nan.tif", encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), message="no image"),
        _bytes(
            "heights.tif", encoded(np.full((4, 4), 4000, np.float32), "TIFF"), message="no image"
        ),
        _bytes("overshoot.tif", encoded(GREY / np.float32(200), "TIFF"), message="is 1.17, less"),
        _bytes(
            "grey12.png",
            encoded(GREY.astype(np.uint16) * 16, "PNG"),
            message="its largest value is 3744, less than a quarter of 65535",
        ),
        _bytes("bytes_in_ints.tif", encoded(GREY.astype(np.int32), "TIFF"), message="value is 234"),
        Case(
            "rgb12.png", lambda path: _save16(path, COLOR, 16), message="value is below 3840, less"
        ),
        Case(
            "rgb12.tif", lambda path: _save16(path, COLOR, 16), message="value is below 3840, less"
        ),
        Case(
            "rgba12.png",
            lambda path: _save16(path, np.dstack([COLOR, 4095 + 0 * GREY.astype(int)]), 16),
            message="value is below 3840, less than a quarter of 65535",
        ),
        _bytes(
            "pages.tif",
            _tiff((COLOR, 2), (COLOR[::-1], 2)),
            message="a TIFF of 2 pages of 40x24 pixels",
        ),
        _bytes(
            "raw.tif",
            _tiff((COLOR[::2, ::2], 1), (COLOR, 0)),
            message="its first page, 20x12 pixels, is marked as a preview",
        ),
        _bytes("dng.tif", _tiff((COLOR, 1)), message="is marked as a preview"),
        _bytes(
            "bands.tif",
            encoded(GREY[:, :5], "TIFF", save_all=True, append_images=[color] * 3),
            message="a TIFF of 4 pages of 5x24 pixels",
        ),
        Case("dangling.png", lambda path: path.symlink_to("gone.png"), message="a link to nothing"),
        Case("itself.png", lambda path: path.symlink_to(path.name), message="a link to nothing"),
        Case("zeros.png", lambda path: path.symlink_to("/dev/zero"), message="a folder, a pipe"),
        Case("pipe.jpg", os.mkfifo, message="a folder, a pipe"),
        Case("folder.jpg", os.mkdir, message="a folder, a pipe"),
        Case("gone.jpg", lambda path: None, message="no such file"),
    ]
    return handled + refused


def _save16(path: Path, pixels: np.ndarray, factor: int = 257) -> None:
    assert cv2.imwrite(str(path), (pixels.astype(int) * factor).astype(np.uint16))


def _tiff(*pages: tuple[np.ndarray, int]) -> bytes:
    """A TIFF of RGB pages, each with its value of the tag that says whether it is a copy."""
    out = bytearray(b"II*\0\0\0\0\0")
    link = 4  # where the place of the next page's directory is to be written
    for pixels, kind in pages:
        height, width = pixels.shape[:2]
        data = len(out)
        out += pixels.tobytes() + struct.pack("<3H", 8, 8, 8)
        out += bytes(len(out) % 2)
        struct.pack_into("<I", out, link, len(out))
        bits = data + pixels.size
        tags = [(254, 4, 1, kind), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits)]
        tags += [(259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, data), (277, 3, 1, 3)]
        tags += [(278, 4, 1, height), (279, 4, 1, pixels.size)]
        out += struct.pack("<H", len(tags))
        out += b"".join(struct.pack("<HHII", *tag) for tag in tags)
        link = len(out)
        out += bytes(4)
    return bytes(out)


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(COLOR, "PNG", exif=exif)


def _flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 0x10
    return bytes(changed)


def _link_to_neighbour(path: Path, content: bytes) -> None:
    target = path.with_name(f".target_of_{path.name}")
    target.write_bytes(content)
    path.symlink_to(target.name)


IMAGES = _image_cases()
READABLE = [case for case in IMAGES if case.good is not None]
UNREADABLE = [case for case in IMAGES if case.good is None]


# ------------------------------------------------------------------------------ names


NAMES: dict[str, str] = {
    "not UTF-8": os.fsdecode(b"caf\xe9.png"),
    "255 bytes": "n" * 251 + ".png",
    "blank": " .png",
    "newline": "two\nlines.png",
    "quotes": 'it\'s "quoted".png',
    "percent": "100%s%d.png",
    "brackets": "[a-c]*?.png",
    "dashes": "--imgs.png",
    "escape": "\x1b[31mred.png",
    "unicode": "日本語 é.png",
}
"""What is peculiar about each -> the name of a good picture."""


# ------------------------------------------------------------------------------ masks
def _mask_cases() -> list[Case]:
    painted = Image.fromarray(LABELS)
    painted.putpalette(bytes(range(255, -1, -1)) * 3)
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)[LABELS]
    far = LABELS.copy()
    far[3, 4] = 77
    large = LABELS.astype(np.uint16)
    large[3, 4] = 40000
    png = encoded(LABELS, "PNG")
    return [
        _bytes("grey.png", png, good=LABELS),
        _bytes("sixteen.png", encoded(LABELS.astype(np.uint16), "PNG"), good=LABELS),
        _bytes("int32.tif", encoded(LABELS.astype(np.int32), "TIFF"), good=LABELS),
        _bytes("palette.png", encoded(painted, "PNG"), good=LABELS),
        _bytes("two_bits.png", encoded(painted, "PNG", bits=2), good=LABELS),
        _bytes(
            "bits.png",
            encoded(Image.fromarray(LABELS > 1), "PNG"),
            good=(LABELS > 1).astype(np.uint8),
        ),
        _bytes("rgb_grey.png", encoded(np.dstack([LABELS] * 3), "PNG"), good=LABELS),
        _bytes("rgba_grey.png", encoded(np.dstack([LABELS] * 3 + [GREY]), "PNG"), good=LABELS),
        _bytes("ignored.png", encoded(np.zeros_like(LABELS), "PNG"), good=np.zeros_like(LABELS)),
        _bytes("smaller.png", encoded(LABELS[:-1], "PNG"), message="40x23 pixels, but its image"),
        _bytes(
            "turned.png",
            encoded(np.ascontiguousarray(LABELS.T), "PNG"),
            message="24x40 pixels, but its image",
        ),
        _bytes("colors.png", encoded(colors, "PNG"), message="a mask of mode RGB"),
        _bytes("lossy.jpg", encoded(LABELS * 60, "JPEG"), message="a JPEG mask"),
        _bytes("far.png", encoded(far, "PNG"), message="label 77 is outside 0..3"),
        _bytes("large.png", encoded(large, "PNG"), message="label 40000 is outside 0..3"),
        _bytes(
            "negative.tif",
            encoded(LABELS.astype(np.int32) - 1, "TIFF"),
            message="label -1 is outside 0..3",
        ),
        _bytes("floats.tif", encoded(LABELS.astype(np.float32), "TIFF"), message="mode F"),
        _bytes(
            "pages.tif",
            encoded(LABELS, "TIFF", save_all=True, append_images=[Image.fromarray(LABELS)]),
            message="a TIFF of 2 pages",
        ),
        _bytes(
            "animated.gif",
            encoded(painted, "GIF", save_all=True, append_images=[painted.rotate(180)]),
            message="a GIF of 2 pages",
        ),
        _bytes(
            "lossless.webp",
            encoded(np.dstack([LABELS] * 3), "WEBP", lossless=True),
            good=LABELS,
        ),
        _bytes(
            "lossy.webp",
            encoded(np.full((HEIGHT, WIDTH, 3), 2, np.uint8), "WEBP", quality=80),
            message="a WEBP mask has altered",
        ),
        _bytes("empty.png", b"", message="empty file"),
        _bytes("cut.png", png[: len(png) * 2 // 3], message="truncated"),
        _bytes("text.png", b"0 1 2 3\n", message="of no known format"),
        _bytes("bomb.png", png_header(60000, 60000), message="more than \\d+ pixels"),
        Case("gone.png", lambda path: None, message="no such file"),
        Case("pipe.png", os.mkfifo, message="a folder, a pipe"),
        Case("folder.png", os.mkdir, message="a folder, a pipe"),
    ]


MASKS = _mask_cases()
"""`good`: the stored values; beside an image of 40x24 pixels, with 3 classes and label offset 1."""


# ------------------------------------------------------------------------------ lists
RECORD = '{"fpath_img": "images/a.png", "fpath_segm": "masks/a.png", "width": 40, "height": 24}'
_ABSENT = RECORD.replace("a.png", "gone.png")


def _list_cases() -> list[Case]:
    line = RECORD.encode()
    return [
        _bytes("plain.odgt", line + b"\n", good=1),
        _bytes("no_newline.odgt", line + b"\n" + line, good=2),
        _bytes("blank_lines.odgt", b"\n  \n" + line + b"\n\n\t\n" + line + b"\n\n", good=2),
        _bytes("mark.odgt", b"\xef\xbb\xbf" + line + b"\n", good=1),
        _bytes("windows.odgt", line + b"\r\n" + line + b"\r\n", good=2),
        _bytes("more_keys.odgt", line[:-1] + b', "scene": {"name": ["x"]}}\n', good=1),
        _bytes("dots.odgt", line.replace(b"images/", b"masks/../images/./"), good=1),
        _bytes(
            "no_sizes.odgt", b'{"fpath_img": "images/a.png", "fpath_segm": "masks/a.png"}', good=1
        ),
        _bytes("empty.odgt", b"", message="holds no records"),
        _bytes("blank.odgt", b"\n \n\t\n", message="holds no records"),
        _bytes("broken.odgt", line + b"\n" + line[:-5], message=r":2: not JSON"),
        _bytes("comma.odgt", line + b",\n" + line, message=r":1: not JSON"),
        _bytes("csv.odgt", b"images/a.png,masks/a.png\n", message=r":1: not JSON"),
        _bytes("array.odgt", b"[" + line + b"]", message=r":1: a record needs the key 'fpath_img'"),
        _bytes(
            "coco.odgt",
            b'{"images": [], "annotations": []}',
            message=r":1: a record needs .*; for COCO's annotations list images_dir:FILE\.json",
        ),
        _bytes("number.odgt", b"17\n", message=r":1: a record needs the key 'fpath_img'"),
        _bytes("no_image.odgt", b'{"fpath_segm": "masks/a.png"}', message=r":1: a record needs"),
        _bytes("path_type.odgt", b'{"fpath_img": ["images/a.png"]}', message=r":1: a record needs"),
        _bytes(
            "mask_type.odgt",
            b'{"fpath_img": "images/a.png", "fpath_segm": 3}',
            message=r":1: 'fpath_segm' is 3",
        ),
        _bytes(
            "no_width.odgt", line.replace(b'"width": 40, ', b""), message=r":1: 'width' is None"
        ),
        _bytes("negative.odgt", line.replace(b"40", b"-40"), message=r":1: 'width' is -40"),
        _bytes("text_size.odgt", line.replace(b"40", b'"40"'), message=r":1: 'width' is '40'"),
        _bytes("nan.odgt", line.replace(b"40", b"NaN"), message=r":1: 'width' is nan"),
        _bytes("long_number.odgt", line.replace(b"40", b"4" * 5000), message=r":1: not JSON"),
        _bytes("nested.odgt", b"[" * 200_000, message=r":1: not JSON"),
        _bytes("huge_line.odgt", b"x" * 5_000_000, message=r":1: not JSON"),
        _bytes("zeros.odgt", bytes(4096), message=r":1: not JSON"),
        _bytes("picture.odgt", encoded(COLOR, "PNG"), message="no list but a binary file"),
        _bytes("utf16.odgt", RECORD.encode("utf-16"), message="no list but a binary file"),
        Case("folder.odgt", os.mkdir, message="no such list file"),
        Case("pipe.odgt", os.mkfifo, message="no such list file"),
    ]


LISTS = _list_cases()
"""`good`: how many times the record `RECORD` is in the list."""

SAMPLES = [
    _bytes("gone.odgt", _ABSENT.encode(), message=r"gone\.png: no such file"),
    _bytes(
        "climbs.odgt",
        RECORD.replace("images/", "../../../").encode(),
        message=r"\.\./a\.png: no such file",
    ),
    _bytes(
        "absolute.odgt",
        RECORD.replace("images/", "/nowhere/").encode(),
        message=r"/nowhere/a\.png: no such file",
    ),
    _bytes("zero.odgt", RECORD.replace("images/a", "a\\u0000b").encode(), message="no such file"),
    _bytes(
        "surrogate.odgt", RECORD.replace("images/a", "\\ud800").encode(), message="no such file"
    ),
    _bytes("too_long.odgt", RECORD.replace("images/a", "n" * 300).encode(), message="no such file"),
    _bytes("no_path.odgt", RECORD.replace("images/a.png", "").encode(), message="a folder"),
    _bytes(
        "other_size.odgt",
        RECORD.replace("24", "25").encode(),
        message=r"40x24 pixels .*but its list says 40x25",
    ),
    _bytes(
        "swapped.odgt",
        RECORD.replace("40", "1").replace("24", "40").replace("1,", "24,").encode(),
        message=r"40x24 pixels .*but its list says 24x40",
    ),
    _bytes("no_mask.odgt", b'{"fpath_img": "images/a.png"}', message="the list gives no mask"),
]
"""Lists that can be read, of one sample that cannot."""


# ------------------------------------------------------------------------------ weights
class Runs:
    """Unpickling one creates a file: code in data."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def weight_files(good: Path, folder: Path, marker: Path) -> dict[str, tuple[Path, str]]:
    """What is wrong -> (a damaged or foreign form of the weight file `good`, what to say of it).

    Args:
        good: a whole file.
        folder: where the others are written.
        marker: a folder that exists only if code in one of them was run.
    """
    content = good.read_bytes()
    half = len(content) // 2
    files: dict[str, tuple[Any, str]] = {
        "empty": (b"", "cannot be read"),
        "one byte": (content[:1], "cannot be read"),
        "magic only": (content[:4], "damaged"),
        "cut in the middle": (content[:half], "damaged"),
        "last byte gone": (content[:-1], "damaged"),
        "a bit flipped": (_flipped(content, half), "damaged"),
        "a hole": (content[:half] + bytes(4096) + content[half + 4096 :], "damaged"),
        "text": (b"not weights at all\n", "cannot be read"),
        "a web page": (
            b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>",
            "cannot be read",
        ),
        "an image": (encoded(COLOR, "PNG"), "cannot be read"),
        "zeros": (bytes(5000), "cannot be read"),
        "a pickle with code": (pickle.dumps({"w": Runs(marker)}), "cannot be read"),
        "old, with code": (
            lambda path: torch.save(
                {"w": Runs(marker)}, path, _use_new_zipfile_serialization=False
            ),
            "cannot be read",
        ),
        "code among weights": (
            lambda path: torch.save(
                {**torch.load(good, weights_only=True), "w": Runs(marker)}, path
            ),
            "cannot be read",
        ),
        "a whole model": (
            lambda path: torch.save(torch.nn.Conv2d(1, 1, 1), path),
            "cannot be read",
        ),
        "TorchScript": (
            lambda path: torch.jit.script(torch.nn.Conv2d(1, 1, 1)).save(str(path)),
            "cannot be read|holds a",
        ),
        "a zip of texts": (_zip_of_texts, "cannot be read"),
        "a tar": (_tar_of_texts, "cannot be read"),
        "a list": (lambda path: torch.save([torch.zeros(2)], path), "holds a list"),
        "a number": (lambda path: torch.save(3, path), "holds a int"),
        "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no tensors"),
        "another architecture": (
            lambda path: torch.save({"layer1.0.weight": torch.zeros(8, 3, 3, 3)}, path),
            "does not fit",
        ),
        "another width": (
            lambda path: torch.save(
                {
                    k: v.repeat(2, *[1] * (v.dim() - 1)) if v.dim() else v
                    for k, v in torch.load(good, weights_only=True).items()
                },
                path,
            ),
            "differ in shape",
        ),
        "not finite": (
            lambda path: torch.save(
                {
                    k: v * float("nan") if v.is_floating_point() else v
                    for k, v in torch.load(good, weights_only=True).items()
                },
                path,
            ),
            "not finite",
        ),
        "numbers of another kind": (
            lambda path: torch.save(
                {k: v.to(torch.complex64) for k, v in torch.load(good, weights_only=True).items()},
                path,
            ),
            "complex",
        ),
    }
    written = {}
    for number, (fault, (made, message)) in enumerate(files.items()):
        path = folder / f"fault{number}" / good.name
        path.parent.mkdir(parents=True)
        if callable(made):
            made(path)
        else:
            path.write_bytes(made)
        written[fault] = path, message
    return written


def _zip_of_texts(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def _tar_of_texts(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("readme.txt"))


# ------------------------------------------------------------------------------ configurations
CONFIGS = [
    _bytes("plain.yaml", b"TRAIN:\n  seed: 3\n", good=3),
    _bytes("mark.yaml", b"\xef\xbb\xbfTRAIN:\n  seed: 3\n", good=3),
    _bytes("windows.yaml", b"TRAIN:\r\n  seed: 3\r\n", good=3),
    _bytes("empty.yaml", b"", good=304),
    _bytes("comments.yaml", b"# nothing\n---\n", good=304),
    _bytes("runs.yaml", b"DIR: !!python/object/apply:os.mkdir ['MARKER']\n", message="yaml"),
    _bytes("runs_new.yaml", b"DIR: !!python/object/new:os.mkdir ['MARKER']\n", message="yaml"),
    _bytes("names.yaml", b"DIR: !!python/name:os.system\n", message="yaml"),
    _bytes("tuple.yaml", b"DATASET:\n  imgSizes: !!python/tuple [300, 400]\n", message="yaml"),
    _bytes("tabs.yaml", b"TRAIN:\n\tseed: 3\n", message="yaml"),
    _bytes("open.yaml", b"TRAIN: {seed: 3\n", message="yaml"),
    _bytes("two.yaml", b"TRAIN: {seed: 3}\n---\nTRAIN: {seed: 4}\n", message="yaml"),
    _bytes("list.yaml", b"- TRAIN\n- seed\n", message="KEY: value"),
    _bytes("text.yaml", b"just a text\n", message="KEY: value"),
    _bytes("number.yaml", b"17\n", message="KEY: value"),
    _bytes("section.yaml", b"TRAIN: 3\n", message="TRAIN is a section"),
    _bytes("unknown.yaml", b"TRAIN:\n  sead: 3\n", message=r"TRAIN\.sead.*TRAIN\.seed"),
    _bytes("unknown_section.yaml", b"TRIAN:\n  seed: 3\n", message="TRIAN"),
    _bytes("number_key.yaml", b"3: 4\n", message="unknown key 3"),
    _bytes("itself.yaml", b"TRAIN: &a\n  seed: *a\n", message="seed"),
    _bytes("brackets.yaml", b"DIR: '" + b"(" * 5000 + b"'\n", good=304),
    _bytes("binary.yaml", encoded(COLOR, "PNG"), message="yaml"),
    _bytes("zeros.yaml", bytes(100), message="yaml"),
    _bytes("date.yaml", b"TRAIN:\n  seed: 2024-01-01\n", message=r"TRAIN\.seed is"),
    _bytes("twice.yaml", b"TRAIN:\n  seed: 3\n  seed: 4\n", message="seed.*twice|duplicate"),
    _bytes("infinite.yaml", b"TRAIN:\n  seed: .inf\n", message=r"TRAIN\.seed is inf"),
    _bytes("nan.yaml", b"TRAIN:\n  seed: .nan\n", message=r"TRAIN\.seed is nan"),
    _bytes("nested.yaml", b"DIR: " + b"[" * 5000, message="yaml"),
    _bytes(
        "twice_section.yaml",
        b"TRAIN:\n  seed: 3\nTRAIN:\n  workers: 1\n",
        message="TRAIN.*twice|duplicate",
    ),
    _bytes("long_number.yaml", b"TRAIN:\n  seed: " + b"4" * 5000, message="yaml"),
    _bytes("month.yaml", b"DIR: 2024-13-45\n", message="yaml"),
    _bytes("huge_number.yaml", b"TRAIN:\n  lr_encoder: 1" + b"0" * 400, message=r"lr_encoder is 1"),
    Case("folder.yaml", os.mkdir, message="is a folder, not a configuration file"),
    Case("pipe.yaml", os.mkfifo, message="is a pipe or a device, not a configuration file"),
]
"""`good`: TRAIN.seed."""
