"""Files as they should not be, or as few people expect them: made here, and what is right of each.

`good` holds the pixels (or records, or values) that must come out of a file; `message` what the one
line about it must say besides the name of the file.
"""

import io
import math
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
COLOR = np.stack([6 * _X, 10 * _Y, 3 * (_X + _Y)], axis=2).astype(np.uint8)
GREY = COLOR[:, :, 0].copy()
LABELS = ((_X // 8 + _Y // 8) % 4).astype(np.uint8)  # 0 is ignored, 1..3 are classes

# Where a picture that is stored by EXIF orientation k has each of its pixels.
STORED = {
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
    """One file: its bytes or what makes it, and what is right."""

    name: str
    content: bytes | Callable[[Path], Any]
    good: Any = None
    message: str = ""
    tolerance: float = 0.0  # mean absolute difference of pixels, where the format is lossy

    def write(self, path):
        path.write_bytes(self.content) if isinstance(self.content, bytes) else self.content(path)

    def __str__(self):
        return self.name


def ok(name, content, good, tolerance=0):
    return Case(name, content, good=good, tolerance=tolerance)


def bad(name, content, message):
    return Case(name, content, message=message)


def nothing(path):
    """The file is not there."""


# ------------------------------------------------------------------------------ images
def encoded(pixels, kind, **options):
    """An image file's bytes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels, **options):
    return encoded(pixels, "PNG", **options)


def jpeg(pixels, **options):
    return encoded(pixels, "JPEG", **{"quality": 95, **options})


def tiff(pixels, **options):
    return encoded(pixels, "TIFF", **options)


def _chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _png(width, height, *more, pixels=b"\0", bits=8):
    """A grey PNG that claims a size, whatever its pixels are."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + data + _chunk(b"IEND", b"")


def _exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def _sixteen(pixels, factor=257):
    """16 bits in each of several channels, which Pillow cannot write; cv2 stores blue first."""
    values = (pixels.astype(int) * factor).astype(np.uint16)
    return lambda path: cv2.imwrite(str(path), values)


def _pages(*pages):
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


def _cut(content):
    return content[: len(content) * 2 // 3]


def _flipped(content, position):
    changed = bytearray(content)
    changed[position] ^= 0x10
    return bytes(changed)


def _linked(path):
    target = path.with_name(f".target_of_{path.name}")
    target.write_bytes(png(COLOR))
    path.symlink_to(target.name)


color, small = Image.fromarray(COLOR), COLOR[::2, ::2]
palette = color.quantize(32)
of_palette = np.array(palette.convert("RGB"))
turned = {"save_all": True, "append_images": [color.rotate(180)]}
grey16 = GREY.astype(np.uint16)
grey = np.repeat(GREY[:, :, None], 3, axis=2)
bits = Image.fromarray(GREY > 100)
black_white = np.uint8(255) * (grey > 100)
NO_FORMAT = "of no known format"
READABLE = [
    ok("plain.png", png(COLOR), COLOR),
    ok("plain.jpg", jpeg(COLOR), COLOR, 2),
    ok("progressive.jpg", jpeg(COLOR, progressive=True), COLOR, 2),
    ok("png_named.jpg", png(COLOR), COLOR),
    ok("jpg_named.png", jpeg(COLOR), COLOR, 2),
    ok("UPPER.PNG", png(COLOR), COLOR),
    ok("cmyk.tif", tiff(color.convert("CMYK")), COLOR),
    ok("cmyk.jpg", jpeg(color.convert("CMYK")), COLOR, 3),
    # Compressed, as Pillow 12.3 cannot read the uncompressed file that it writes.
    ok("ycbcr.tif", tiff(color.convert("YCbCr"), compression="tiff_lzw"), COLOR, 3),
    ok("grey.png", png(GREY), grey),
    ok("grey.jpg", jpeg(GREY), grey, 2),
    ok("grey16.png", png(grey16 * 257), grey),
    ok("rgb16.png", _sixteen(COLOR[:, :, ::-1]), COLOR),
    ok("grey16.tif", tiff(grey16 * 257), grey),
    ok("float.tif", tiff(GREY.astype(np.float32) / 255), grey),
    ok("rgba.png", png(np.dstack([COLOR, GREY])), COLOR),  # dropped, not blended
    ok("la.png", png(np.dstack([GREY, GREY])), grey),
    ok("palette.png", png(palette), of_palette),
    ok("palette_alpha.png", png(palette, transparency=0), of_palette),
    ok("bits.png", png(bits), black_white),
    ok("bits.tif", tiff(bits, compression="group4"), black_white),
    ok("animated.gif", encoded(palette, "GIF", **turned), of_palette),
    ok("animated.png", png(color, **turned), COLOR),
    # The second page is a smaller copy of the first, as cameras and maps have them.
    ok("preview.tif", _pages((COLOR, 0), (small, 1)), COLOR),
    ok("row.png", png(COLOR[:1]), COLOR[:1]),
    ok("column.png", png(COLOR[:, :1]), COLOR[:, :1]),
    ok("pixel.png", png(COLOR[5:6, 7:8]), COLOR[5:6, 7:8]),
    ok("row.jpg", jpeg(grey[:1]), grey[:1], 3),
    ok("exif_orientation_0.png", png(COLOR, exif=_exif(0)), COLOR),
    ok("exif_orientation_9.png", png(COLOR, exif=_exif(9)), COLOR),
    ok("trailing_bytes.png", png(COLOR) + b"more" * 100, COLOR),
    ok("trailing_bytes.jpg", jpeg(COLOR) + b"more" * 100, COLOR, 2),
    *(
        ok(f"exif_{k}.{end}", save(np.ascontiguousarray(store(COLOR)), exif=_exif(k)), COLOR, off)
        for k, store in STORED.items()
        for end, save, off in (("png", png, 0), ("jpg", jpeg, 2))
    ),
    ok("link.png", _linked, COLOR),
]
UNREADABLE = [
    bad("empty.jpg", b"", "empty file"),
    bad("empty.png", b"", "empty file"),
    bad("truncated.jpg", _cut(jpeg(COLOR)), "truncated"),
    bad("truncated.png", _cut(png(COLOR)), "truncated"),
    bad("header_only.jpg", jpeg(COLOR)[:20], "image"),
    bad("header_only.png", png(COLOR)[:16], "image"),
    bad("one_byte.png", png(COLOR)[:1], NO_FORMAT),
    bad("checksum.png", _flipped(png(COLOR), len(png(COLOR)) // 2), "damaged"),
    bad("text.jpg", b"This is no picture.\n", NO_FORMAT),
    bad("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", NO_FORMAT),
    bad("pickle.png", b"\x80\x02cposix\nsystem\nq\x00.", NO_FORMAT),
    bad("bomb.png", _png(60000, 60000), "more than \\d+ pixels"),
    bad("widest.png", _png(2**31 - 1, 2**31 - 1), "more than \\d+ pixels"),
    bad("no_width.png", _png(0, 10), "image"),
    bad(
        "text_bomb.png", _png(4, 4, _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20)))), "im"
    ),
    bad("nan.tif", tiff(np.full((4, 4), np.nan, np.float32)), "not an image"),
    bad("heights.tif", tiff(np.full((4, 4), 4000, np.float32)), "not an image"),
    bad("overshoot.tif", tiff(GREY / np.float32(200)), "is 1.17, less"),
    bad("grey12.png", png(grey16 * 16), "its largest value is 3744, less than a quarter of 65535"),
    bad("bytes_in_ints.tif", tiff(GREY.astype(np.int32)), "value is 234"),
    bad("rgb12.png", _sixteen(COLOR, 16), "value is below 3840, less than a quarter of 65535"),
    bad("rgb12.tif", _sixteen(COLOR, 16), "value is below 3840, less"),
    bad("rgba12.png", _sixteen(np.dstack([COLOR, GREY]), 16), "value is below 3840, less"),
    bad("pages.tif", _pages((COLOR, 2), (COLOR[::-1], 2)), "a TIFF of 2 pages of 40x24 pixels"),
    bad("raw.tif", _pages((small, 1), (COLOR, 0)), "its first page, 20x12 pixels, is a preview"),
    bad("dng.tif", _pages((COLOR, 1)), "is a preview"),
    bad("bands.tif", tiff(GREY, save_all=True, append_images=[color] * 3), "a TIFF of 4 pages"),
    bad("dangling.png", lambda path: path.symlink_to("gone.png"), "a broken link"),
    bad("itself.png", lambda path: path.symlink_to(path.name), "a broken link"),
    bad("zeros.png", lambda path: path.symlink_to("/dev/zero"), "a folder, a pipe"),
    bad("pipe.jpg", os.mkfifo, "a folder, a pipe"),
    bad("folder.jpg", os.mkdir, "a folder, a pipe"),
    bad("gone.jpg", nothing, "no such file"),
]
IMAGES = READABLE + UNREADABLE


# ------------------------------------------------------------------------------ names


NAMES = {
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
painted = Image.fromarray(LABELS)
painted.putpalette(bytes(range(255, -1, -1)) * 3)
colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)[LABELS]
labels16, labels32 = LABELS.astype(np.uint16), LABELS.astype(np.int32)
thrice = np.dstack([LABELS] * 3)
large = np.where(labels16 == 3, np.uint16(40000), labels16)
nibbles = b"".join(b"\0" + bytes(row[::2] << 4 | row[1::2]) for row in LABELS)
MASKS = [
    ok("grey.png", png(LABELS), LABELS),
    ok("sixteen.png", png(labels16), LABELS),
    ok("int32.tif", tiff(labels32), LABELS),
    ok("palette.png", png(painted), LABELS),
    ok("two_bits.png", png(painted, bits=2), LABELS),
    ok("four_bits.png", _png(WIDTH, HEIGHT, pixels=nibbles, bits=4), LABELS),  # not stretched
    ok("bits.png", png(Image.fromarray(LABELS > 1)), (LABELS > 1).astype(np.uint8)),
    ok("rgb_grey.png", png(thrice), LABELS),
    ok("rgba_grey.png", png(np.dstack([thrice, GREY])), LABELS),
    ok("la_grey.png", png(np.dstack([LABELS, GREY])), LABELS),
    ok("ignored.png", png(0 * LABELS), 0 * LABELS),
    ok("lossless.webp", encoded(thrice, "WEBP", lossless=True), LABELS),
    bad("smaller.png", png(LABELS[:-1]), "40x23 pixels, but its image .*image.png has 40x24"),
    bad("turned.png", png(np.ascontiguousarray(LABELS.T)), "24x40 pixels, but its image"),
    bad("colors.png", png(colors), "a mask of mode RGB .*one channel"),
    bad("lossy.jpg", jpeg(LABELS * 60), "a JPEG mask has altered .* as PNG"),
    bad("lossy.webp", encoded(thrice, "WEBP", quality=80), "a WEBP mask has altered"),
    bad("far.png", png(np.where(LABELS == 3, np.uint8(77), LABELS)), "label 77 is outside 0..3"),
    bad("large.png", png(large), "label 40000 is outside 0..3"),
    bad("negative.tif", tiff(labels32 - 1), "label -1 is outside 0..3"),
    bad("floats.tif", tiff(LABELS.astype(np.float32)), "mode F"),
    bad(
        "pages.tif",
        tiff(LABELS, save_all=True, append_images=[Image.fromarray(LABELS)]),
        "a TIFF of 2 pages",
    ),
    bad("animated.gif", encoded(painted, "GIF", **turned), "a GIF of 2 pages"),
    bad("empty.png", b"", "empty file"),
    bad("cut.png", _cut(png(LABELS)), "truncated"),
    bad("text.png", b"0 1 2 3\n", NO_FORMAT),
    bad("bomb.png", _png(60000, 60000), "more than \\d+ pixels"),
    bad("gone.png", nothing, "no such file"),
    bad("pipe.png", os.mkfifo, "a folder, a pipe"),
    bad("folder.png", os.mkdir, "a folder, a pipe"),
]
"""`good`: the stored values; beside an image of 40x24 pixels, with 3 classes and label offset 1."""


# ------------------------------------------------------------------------------ lists
RECORD = '{"fpath_img": "images/a.png", "fpath_segm": "masks/a.png", "width": 40, "height": 24}'
line = RECORD.encode()
bare = b'{"fpath_img": "images/a.png", "fpath_segm": "masks/a.png"}'
NEEDS = ":1: a record needs the key 'fpath_img'"
LISTS = [
    ok("plain.odgt", line + b"\n", 1),
    ok("no_newline.odgt", line + b"\n" + line, 2),
    ok("blank_lines.odgt", b"\n  \n" + line + b"\n\n\t\n" + line + b"\n\n", 2),
    ok("mark.odgt", b"\xef\xbb\xbf" + line + b"\n", 1),
    ok("windows.odgt", line + b"\r\n" + line + b"\r\n", 2),
    ok("more_keys.odgt", line[:-1] + b', "scene": {"name": ["x"]}}\n', 1),
    ok("dots.odgt", line.replace(b"images/", b"masks/../images/./"), 1),
    ok("no_sizes.odgt", bare, 1),
    bad("empty.odgt", b"", "has no records"),
    bad("blank.odgt", b"\n \n\t\n", "has no records"),
    bad("broken.odgt", line + b"\n" + line[:-5], ":2: not JSON"),
    bad("comma.odgt", line + b",\n" + line, ":1: not JSON"),
    bad("csv.odgt", b"images/a.png,masks/a.png\n", ":1: not JSON"),
    bad("array.odgt", b"[" + line + b"]", NEEDS),
    bad(
        "coco.odgt",
        b'{"images": [], "annotations": []}',
        NEEDS + r".* for COCO's annotations list images_dir:FILE",
    ),
    bad("number.odgt", b"17\n", NEEDS),
    bad("no_image.odgt", b'{"fpath_segm": "masks/a.png"}', NEEDS),
    bad("path_type.odgt", b'{"fpath_img": ["images/a.png"]}', NEEDS),
    bad("mask_type.odgt", b'{"fpath_img": "a.png", "fpath_segm": 3}', ":1: 'fpath_segm' is 3"),
    bad("no_width.odgt", line.replace(b'"width": 40, ', b""), ":1: 'width' is None"),
    bad("no_height.odgt", line.replace(b', "height": 24', b""), ":1: 'height' is None"),
    bad("zero.odgt", line.replace(b"40", b"0"), ":1: 'width' is 0"),
    bad("negative.odgt", line.replace(b"40", b"-40"), ":1: 'width' is -40"),
    bad("text_size.odgt", line.replace(b"40", b'"40"'), ":1: 'width' is '40'"),
    bad("nan.odgt", line.replace(b"40", b"NaN"), ":1: 'width' is nan"),
    bad("long_number.odgt", line.replace(b"40", b"4" * 5000), ":1: not JSON"),
    bad("nested.odgt", b"[" * 200_000, ":1: not JSON"),
    bad("huge_line.odgt", b"x" * 5_000_000, ":1: not JSON"),
    bad("zeros.odgt", bytes(4096), ":1: not JSON"),
    bad("picture.odgt", png(COLOR), "a binary file, not a list"),
    bad("utf16.odgt", RECORD.encode("utf-16"), "a binary file, not a list"),
    bad("folder.odgt", os.mkdir, "no such list file"),
    bad("pipe.odgt", os.mkfifo, "no such list file"),
]
"""`good`: how many times the record `RECORD` is in the list."""


def _sample(name, change, to, message):
    return bad(f"{name}.odgt", RECORD.replace(change, to).encode(), message)


SAMPLES = [
    _sample("gone", "a.png", "gone.png", r"gone\.png: no such file"),
    _sample("climbs", "images/", "../../../", r"\.\./a\.png: no such file"),
    _sample("absolute", "images/", "/nowhere/", r"/nowhere/a\.png: no such file"),
    _sample("zero", "images/a", "a\\u0000b", "no such file"),
    _sample("surrogate", "images/a", "\\ud800", "no such file"),
    _sample("too_long", "images/a", "n" * 300, "no such file"),
    _sample("no_path", "images/a.png", "", "a folder"),
    _sample("other_size", "24", "25", "40x24 pixels .*but in its list 40x25"),
    _sample("swapped", '40, "height": 24', '24, "height": 40', ".*but in its list 24x40"),
    bad("no_mask.odgt", b'{"fpath_img": "images/a.png"}', "the list has no mask"),
]
"""Lists that can be read, of one sample that cannot."""


# ------------------------------------------------------------------------------ weights
class Runs:
    """Unpickling one creates a file: code in data."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def weight_files(good, folder, marker, only=()):
    """What is wrong -> (a damaged or foreign form of the weight file `good`, what to say of it).

    Args:
        good: a whole file.
        folder: where the others are written.
        marker: a folder that exists only if code in one of them was run.
        only: of these faults; by default of all.
    """
    content, state = good.read_bytes(), torch.load(good, weights_only=True)
    half = len(content) // 2

    def saved(thing, **options):
        return lambda path: torch.save(thing, path, **options)

    def each(change):
        return saved({key: change(value) for key, value in state.items()})

    layer, code = torch.nn.Conv2d(1, 1, 1), {"w": Runs(marker)}
    old = {"_use_new_zipfile_serialization": False}
    unread = "cannot be read"
    files = {
        "empty": (b"", unread),
        "one byte": (content[:1], unread),
        "magic only": (content[:4], "damaged"),
        "cut in the middle": (content[:half], "damaged"),
        "last byte gone": (content[:-1], "damaged"),
        "a bit flipped": (_flipped(content, half), "damaged"),
        "a hole": (content[:half] + bytes(4096) + content[half + 4096 :], "damaged"),
        "text": (b"not weights at all\n", unread),
        "a web page": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", unread),
        "an image": (png(COLOR), unread),
        "zeros": (bytes(5000), unread),
        "a pickle with code": (pickle.dumps(code), unread),
        "old, with code": (saved(code, **old), unread),
        "code among weights": (saved({**state, **code}), unread),
        "a whole model": (saved(layer), unread),
        "TorchScript": (
            lambda path: torch.jit.script(layer).save(str(path)),
            f"{unread}|contains a",
        ),
        "a zip of texts": (_zip_of_texts, unread),
        "a tar": (_tar_of_texts, unread),
        "a list": (saved([torch.zeros(2)]), "contains a list"),
        "a number": (saved(3), "contains a int"),
        "no tensors": (saved({"epoch": 3}), "contains no tensors"),
        "another architecture": (saved({"layer1.0.weight": torch.zeros(8, 3, 3, 3)}), "not fit"),
        "another width": (each(lambda v: torch.cat([v, v]) if v.dim() else v), "differ in shape"),
        "non-finite": (each(lambda v: v * math.nan if v.is_floating_point() else v), "non-finite"),
        "numbers of another kind": (each(lambda v: v.to(torch.complex64)), "complex"),
    }
    written = {}
    for number, (fault, (made, message)) in enumerate(files.items()):
        if only and fault not in only:
            continue
        path = folder / f"fault{number}" / good.name
        path.parent.mkdir(parents=True)
        bad(fault, made, message).write(path)
        written[fault] = path, message
    return written


def _zip_of_texts(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def _tar_of_texts(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("readme.txt"))


# ------------------------------------------------------------------------------ configurations
CONFIGS = [
    ok("plain.yaml", b"TRAIN:\n  seed: 3\n", 3),
    ok("mark.yaml", b"\xef\xbb\xbfTRAIN:\n  seed: 3\n", 3),
    ok("windows.yaml", b"TRAIN:\r\n  seed: 3\r\n", 3),
    ok("empty.yaml", b"", 304),
    ok("comments.yaml", b"# nothing\n---\n", 304),
    ok("brackets.yaml", b"DIR: '" + b"(" * 5000 + b"'\n", 304),
    bad("runs.yaml", b"DIR: !!python/object/apply:os.mkdir ['MARKER']\n", "yaml"),
    bad("runs_new.yaml", b"DIR: !!python/object/new:os.mkdir ['MARKER']\n", "yaml"),
    bad("names.yaml", b"DIR: !!python/name:os.system\n", "yaml"),
    bad("tuple.yaml", b"DATASET:\n  imgSizes: !!python/tuple [300, 400]\n", "yaml"),
    bad("tabs.yaml", b"TRAIN:\n\tseed: 3\n", "yaml"),
    bad("open.yaml", b"TRAIN: {seed: 3\n", "yaml"),
    bad("two.yaml", b"TRAIN: {seed: 3}\n---\nTRAIN: {seed: 4}\n", "yaml"),
    bad("list.yaml", b"- TRAIN\n- seed\n", "KEY: value"),
    bad("text.yaml", b"just a text\n", "KEY: value"),
    bad("number.yaml", b"17\n", "KEY: value"),
    bad("section.yaml", b"TRAIN: 3\n", "TRAIN is a section"),
    bad("unknown.yaml", b"TRAIN:\n  sead: 3\n", r"TRAIN\.sead.*TRAIN\.seed"),
    bad("unknown_section.yaml", b"TRIAN:\n  seed: 3\n", "TRIAN"),
    bad("number_key.yaml", b"3: 4\n", "unknown key 3"),
    bad("itself.yaml", b"TRAIN: &a\n  seed: *a\n", "seed"),
    bad("binary.yaml", encoded(COLOR, "PNG"), "yaml"),
    bad("zeros.yaml", bytes(100), "yaml"),
    bad("date.yaml", b"TRAIN:\n  seed: 2024-01-01\n", r"TRAIN\.seed is"),
    bad("twice.yaml", b"TRAIN:\n  seed: 3\n  seed: 4\n", "seed.*twice|duplicate"),
    bad("infinite.yaml", b"TRAIN:\n  seed: .inf\n", r"TRAIN\.seed is inf"),
    bad("nan.yaml", b"TRAIN:\n  seed: .nan\n", r"TRAIN\.seed is nan"),
    bad("nested.yaml", b"DIR: " + b"[" * 5000, "yaml"),
    bad(
        "twice_section.yaml", b"TRAIN:\n  seed: 3\nTRAIN:\n  workers: 1\n", "TRAIN.*twice|duplicate"
    ),
    bad("long_number.yaml", b"TRAIN:\n  seed: " + b"4" * 5000, "yaml"),
    bad("month.yaml", b"DIR: 2024-13-45\n", "yaml"),
    bad("huge_number.yaml", b"TRAIN:\n  lr_encoder: 1" + b"0" * 400, r"lr_encoder is 1"),
    bad("folder.yaml", os.mkdir, "is a folder, not a configuration file"),
    bad("pipe.yaml", os.mkfifo, "is a pipe or a device, not a configuration file"),
]
"""`good`: TRAIN.seed."""
