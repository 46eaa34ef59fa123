"""What is refused before it is decoded."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from mit_semseg.dataset.sources import as_image
from mit_semseg.serving.limits import Limits, Refused, decode, open_upload

LIMITS = Limits(megapixels=1)


def noise(width=40, height=30):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    """A PNG of zeros, some bytes for each million pixels."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_formats_are_decoded_as_the_segmenter_does(kind):
    data = saved(noise(), kind)
    expected = as_image(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(open_upload(data, LIMITS)), expected)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6
    data = saved(noise(40, 30), "JPEG", exif=exif.tobytes())
    assert decode(open_upload(data, LIMITS)).shape == (40, 30, 3)


@pytest.mark.parametrize("size", [(4000, 4000), (20000, 20000)])
def test_a_decompression_bomb_is_refused_undecoded(size):
    data = png_of_size(*size)
    assert len(data) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="the limit is 1000000") as refused:
            open_upload(data, LIMITS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.status == 413
    assert peak < 2_000_000


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM"])
def test_other_formats_are_refused(kind):
    with pytest.raises(Refused, match="send JPEG, PNG, WEBP") as refused:
        open_upload(saved(noise(), kind), LIMITS)
    assert refused.value.status == 415


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_no_image_is_refused(data):
    with pytest.raises(Refused) as refused:
        open_upload(data, LIMITS)
    assert refused.value.status == 415


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_damaged_image_is_refused(kind):
    data = saved(noise(200, 200), kind)
    with pytest.raises(Refused) as refused:
        decode(open_upload(data[: len(data) // 2], LIMITS))
    assert refused.value.status in (400, 415)


def test_a_jpeg_of_many_scans_is_refused():
    """Each scan is a pass of the decoder over the image."""
    data = saved(noise(), "JPEG", progressive=True)
    decode(open_upload(data, LIMITS))
    start = data.rindex(b"\xff\xda")
    scan, end = data[start:-2], data[-2:]
    with pytest.raises(Refused, match="scans") as refused:
        open_upload(data[:-2] + 200 * scan + end, LIMITS)
    assert refused.value.status == 413


def test_what_follows_a_jpeg_is_not_counted():
    """Telephones append films, whose bytes are like random ones."""
    data = saved(noise(), "JPEG") + 200 * b"\xff\xda"
    assert decode(open_upload(data, LIMITS)).shape == (30, 40, 3)


@pytest.mark.parametrize("name", ["megabytes", "queue", "batch", "timeout"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"--{name} 0: give a positive number"):
        Limits(**{name: 0})
