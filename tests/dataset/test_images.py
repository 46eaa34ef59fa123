"""Pixels of images and masks against Pillow and hand numbers; more files are in `bad_input`."""

import numpy as np
import pytest
from dataset_files import put
from oracles import apart, pillow_resize
from PIL import Image, ImageOps

from mit_semseg.dataset.images import ImageFile, load_image, load_mask


def scene(width, height):
    """Smooth shades with hard edges, one third of a pixel wide at the smallest."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / (9 + 4 * k) + y / (17 - 3 * k)) for k in range(3)]
    image = np.stack(waves, axis=2).astype(np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return image


def at_size(path, size):
    with ImageFile(path) as file:
        return file.pixels(size)


@pytest.mark.parametrize(
    ("stored", "kind", "expected"),
    [
        ([0, 257, 128 * 257, 65535], np.uint16, [0, 1, 128, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        # A quarter of the range passes, a black picture too; between them it is another range.
        ([0, 16384], np.uint16, [0, 64]),  # 16384 / 257 = 63.8
        ([0, 0], np.uint16, [0, 0]),
        ([0, 16383], np.uint16, "its largest value is 16383, less than a quarter of 65535"),
        ([0, 1], np.uint16, "its largest value is 1, less than a quarter of 65535"),
        ([-3.0, 1e6], np.float32, r"mode F with values -3\.\.1e\+06 is not an image"),
    ],
)
def test_grey_levels_of_other_ranges(tmp_path, stored, kind, expected):
    path = tmp_path / "x.tif"
    put(path, np.array([stored], kind))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"x\.tif: {expected}"):
            load_image(path)
    else:
        assert load_image(path)[0].tolist() == [[level] * 3 for level in expected]


# ------------------------------------------------------------------------------ sized images
@pytest.mark.parametrize("size", [(1, 1), (17, 9), (101, 77), (64, 333)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_pixels_are_those_of_pillow(tmp_path, size, subsampling):
    path = tmp_path / "x.jpg"
    for progressive in (False, True):
        image = Image.fromarray(scene(*size))
        image.save(path, quality=85, subsampling=subsampling, progressive=progressive)
        with Image.open(path) as file:
            assert np.array_equal(at_size(path, size), np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_turned_jpegs_are_resized_upright(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(240, 160)).convert(mode).save(path, quality=95, exif=exif)
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    for factor in (1, 2, 8):
        size = (upright.shape[1] // factor, upright.shape[0] // factor)
        with ImageFile(path) as opened:
            assert opened.size == upright.shape[1::-1]
            result = opened.pixels(size)
        assert result.shape == (size[1], size[0], 3)
        assert apart(result, pillow_resize(upright, size)).mean() < 1


@pytest.mark.parametrize("factor", [5, 6.5, 11])
@pytest.mark.parametrize("whole", [(803, 607), (640, 480)])
def test_large_jpegs_at_reduced_scale_are_close(tmp_path, whole, factor):
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


def test_jpegs_less_than_five_times_as_large_are_decoded_in_full(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(400, 300)).save(path, quality=92)
    for size in ((81, 61), (81, 20), (200, 150), (400, 300), (500, 400)):
        expected = pillow_resize(load_image(path), size)
        assert apart(at_size(path, size), expected).max() <= 1


def test_real_photographs_at_reduced_scale(real_data):
    for path in sorted((real_data / "ade20k_sample" / "images").rglob("*.jpg")):
        image = load_image(path)
        for factor in (5, 8, 12):
            size = (image.shape[1] // factor, image.shape[0] // factor)
            difference = apart(at_size(path, size), pillow_resize(image, size))
            assert difference.mean() < 1 and difference.max() < 25, (path, factor)
        for size in ((400, 300), (797, 600)):
            assert apart(at_size(path, size), pillow_resize(image, size)).max() <= 1


def test_damaged_jpegs_are_refused_as_pillow_refuses_them(tmp_path):
    """Some noise goes unnoticed by the format; what Pillow notices must not pass here."""
    path = tmp_path / "x.jpg"
    Image.fromarray(scene(160, 120)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    for size in ((20, 15), (80, 60), (160, 120)):
        with pytest.raises(ValueError, match=r"x\.jpg: damaged or truncated image"):
            at_size(path, size)
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
            assert np.array_equal(at_size(path, expected.shape[1::-1]), expected)
    assert 0 < refused < 40


# ------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_stored_values_are_kept(tmp_path, kind):
    values = np.arange(54, dtype=kind).reshape(6, 9) * kind(4 if kind == np.uint8 else 1000)
    put(tmp_path / "x.tif", values)
    mask = load_mask(tmp_path / "x.tif")
    assert mask.dtype == np.int32 and np.array_equal(mask, values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_masks_keep_their_indices(tmp_path, bits):
    index = (np.arange(54).reshape(6, 9) % 2**bits).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(tmp_path / "x.png", bits=bits)
    assert np.array_equal(load_mask(tmp_path / "x.png"), index)
