"""Image and mask files of every kind to arrays, against Pillow and hand numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles import apart, pillow_resize
from PIL import Image, ImageOps

from mit_semseg.dataset.images import ImageFile, image_size, load_image, load_mask

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "CMYK", "1", "P", "YCbCr"])
def test_image_modes_agree_with_pillow(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLOR).convert(mode)
    path = tmp_path / {"CMYK": "x.tif", "YCbCr": "x.jpg"}.get(mode, "x.png")
    image.save(path)
    if path.suffix == ".jpg":  # compression has changed it
        image = Image.open(path)
    array = load_image(path)
    assert array.shape == (6, 9, 3) and array.dtype == np.uint8
    assert np.array_equal(array, np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    alpha = np.dstack([COLOR, np.zeros((6, 9, 1), np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "x.png")
    assert np.array_equal(load_image(tmp_path / "x.png"), COLOR)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(COLOR).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    image.save(tmp_path / "x.png", transparency=0)
    assert np.array_equal(load_image(tmp_path / "x.png"), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png")[0, :, 1].tolist() == [0, 1, 128, 255]


def test_the_least_bright_sixteen_bits(tmp_path: Path) -> None:
    """A quarter of the range passes, a black picture too; between them it is another range."""
    path = tmp_path / "x.png"
    for highest, level in ((16384, 64), (0, 0)):  # 16384 / 257 = 63.8
        Image.fromarray(np.array([[0, highest]], np.uint16)).save(path)
        assert load_image(path)[0, 1].tolist() == [level] * 3
    for highest in (16383, 4000, 1):
        Image.fromarray(np.array([[0, highest]], np.uint16)).save(path)
        with pytest.raises(ValueError, match=rf"x\.png: its largest value is {highest}, less than"):
            load_image(path)


def test_float_images(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "unit.tif")
    assert load_image(tmp_path / "unit.tif")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[-3.0, 1e6]], np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match=r"depth\.tif: mode F with values -3\.\.1e\+06"):
        load_image(tmp_path / "depth.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(COLOR).save(tmp_path / "x.png", exif=exif)
    upright = load_image(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as file:
        assert np.array_equal(upright, np.asarray(ImageOps.exif_transpose(file)))
    assert upright.shape[:2] == ((9, 6) if orientation >= 5 else (6, 9))
    assert image_size(tmp_path / "x.png") == (upright.shape[1], upright.shape[0])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "ok.png")
    Image.fromarray(COLOR).resize((64, 64)).save(tmp_path / "ok.jpg")
    for name in ("ok.png", "ok.jpg"):
        data = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"cut-{name}: damaged or truncated image"):
            load_image(cut)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        load_image(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")


# ------------------------------------------------------------------------------ sized images
def scene(width: int, height: int) -> np.ndarray:
    """Smooth shades with hard edges, one third of a pixel wide at the smallest."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / (9 + 4 * k) + y / (17 - 3 * k)) for k in range(3)]
    image = np.stack(waves, axis=2).astype(np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return image


def at_size(path: Path, size: tuple[int, int]) -> np.ndarray:
    with ImageFile(path) as file:
        return file.pixels(size)


@pytest.mark.parametrize("size", [(1, 1), (17, 9), (101, 77), (64, 333)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_those_of_pillow(
    tmp_path: Path, size: tuple[int, int], subsampling: int, progressive: bool
) -> None:
    path = tmp_path / "x.jpg"
    image = Image.fromarray(scene(*size))
    image.save(path, quality=85, subsampling=subsampling, progressive=progressive)
    with Image.open(path) as file:
        assert np.array_equal(at_size(path, size), np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_jpegs_that_are_not_rgb(tmp_path: Path, mode: str, factor: int) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(321, 243)).convert(mode).save(path, quality=95)
    size = (321 // factor, 243 // factor)
    assert apart(at_size(path, size), pillow_resize(load_image(path), size)).mean() < 1


@pytest.mark.parametrize("factor", [5, 6.5, 9, 11])
@pytest.mark.parametrize("whole", [(803, 607), (640, 480)])
def test_large_jpegs_at_reduced_scale_are_close(
    tmp_path: Path, whole: tuple[int, int], factor: float
) -> None:
    """Also where sides are no multiple of 8: the picture must not move."""
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(*whole)).save(path, quality=92)
    size = (int(whole[0] / factor), int(whole[1] / factor))
    difference = apart(at_size(path, size), pillow_resize(load_image(path), size))
    assert 0 < difference.mean() < 1  # 0 would mean that it was decoded in full
    # A shift of a quarter of a pixel would show on the ramp below.
    ramp = np.tile(np.linspace(0, 255, whole[0]).astype(np.uint8)[None, :, None], (whole[1], 1, 3))
    Image.fromarray(ramp).save(path, quality=100)
    assert apart(at_size(path, size), pillow_resize(ramp, size)).max() <= 2


def test_jpegs_less_than_five_times_as_large_are_decoded_in_full(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(400, 300)).save(path, quality=92)
    for size in ((81, 61), (81, 20), (200, 150), (400, 300), (500, 400)):
        expected = pillow_resize(load_image(path), size)
        assert apart(at_size(path, size), expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_turned_jpegs_are_resized_upright(tmp_path: Path, orientation: int, factor: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(240, 160)).save(path, quality=95, exif=exif)
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file))
    size = (upright.shape[1] // factor, upright.shape[0] // factor)
    with ImageFile(path) as opened:
        assert opened.size == upright.shape[1::-1]
        result = opened.pixels(size)
    assert result.shape == (size[1], size[0], 3)
    assert apart(result, pillow_resize(upright, size)).mean() < 1


def test_real_photographs_at_reduced_scale(real_data: Path) -> None:
    for path in sorted((real_data / "ade20k_sample" / "images").rglob("*.jpg")):
        image = load_image(path)
        for factor in (5, 8, 12):
            size = (image.shape[1] // factor, image.shape[0] // factor)
            difference = apart(at_size(path, size), pillow_resize(image, size))
            assert difference.mean() < 1 and difference.max() < 25, (path, factor)
        for size in ((400, 300), (601, 451), (797, 600)):
            assert apart(at_size(path, size), pillow_resize(image, size)).max() <= 1


@pytest.mark.parametrize("size", [(64, 48), (320, 240), (200, 150)])
def test_truncated_jpegs_are_refused_at_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(scene(320, 240)).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"x\.jpg: damaged or truncated image"):
        at_size(tmp_path / "x.jpg", size)


def test_damaged_jpegs_are_refused_as_pillow_refuses_them(tmp_path: Path) -> None:
    """Some noise goes unnoticed by the format; what Pillow notices must not pass here."""
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(160, 120)).save(path)
    data = path.read_bytes()
    refused = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noisy = bytearray(data)
        for at in rng.integers(20, len(data) - 2, 6):
            noisy[at] = int(rng.integers(256))
        path.write_bytes(noisy)
        try:
            expected = load_image(path)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match=r"x\.jpg: "):
                at_size(path, (160, 120))
        else:
            result = at_size(path, expected.shape[1::-1])
            assert np.array_equal(result, expected)
    assert 0 < refused < 40


# ------------------------------------------------------------------------------ masks
def test_mask_kinds(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    palette = Image.fromarray(GREY)
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(tmp_path / "palette.png")
    deep = GREY.astype(np.uint16) * 200
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "wide.tif")
    Image.fromarray(GREY > 99).save(tmp_path / "bits.png")
    Image.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "same.png")
    expected = {
        "grey": GREY,
        "palette": GREY,
        "deep": deep,
        "wide": deep,
        "bits": GREY > 99,
        "same": GREY,
    }
    for name, values in expected.items():
        mask = load_mask(tmp_path / f"{name}.{'tif' if name == 'wide' else 'png'}")
        assert mask.dtype == np.int32, name
        assert np.array_equal(mask, values.astype(np.int32)), name


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_palette_masks_keep_their_indices(tmp_path: Path, bits: int) -> None:
    index = (np.arange(54).reshape(6, 9) % 2**bits).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(tmp_path / "x.png", bits=bits)
    assert np.array_equal(load_mask(tmp_path / "x.png"), index)


def test_four_bit_grey_png_is_not_stretched(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    # 4 x 1 pixels of 4 bits: 0, 1, 7, 15
    header = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)
    body = zlib.compress(bytes([0, 0x01, 0x7F]))
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )
    (tmp_path / "x.png").write_bytes(data)
    assert load_mask(tmp_path / "x.png").tolist() == [[0, 1, 7, 15]]


def test_color_and_lossy_masks_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(COLOR).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: a mask of mode RGB .*one channel"):
        load_mask(tmp_path / "x.png")
    Image.fromarray(GREY).save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg: a JPEG mask has altered .* as PNG"):
        load_mask(tmp_path / "x.jpg")
