"""Files of every kind to arrays, and arrays to tensors, against Pillow, torch and hand numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normalize
from PIL import Image, ImageOps
from tolerances import rounding

from mit_semseg.config import DataOptions
from mit_semseg.dataset.images import ImageFile, image_size, load_image, load_mask
from mit_semseg.dataset.transforms import (
    Normalize,
    as_batch,
    color_jitter,
    fitted_size,
    jitter_factors,
    nearest_index,
    resize_image,
    round_up,
    scaled_inputs,
)

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


# ------------------------------------------------------------------------------ images
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
def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Grey levels between two images."""
    return np.abs(a.astype(int) - b.astype(int))


def pillow_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


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


# ------------------------------------------------------------------------------ geometry
def test_fitted_size_by_hand() -> None:
    assert fitted_size(683, 512, 300, 1000) == (400, 300)  # 683 * 300 / 512 = 400.2
    assert fitted_size(512, 683, 300, 1000) == (300, 400)
    assert fitted_size(2000, 500, 600, 1000) == (1000, 250)  # the long side decides
    assert fitted_size(1000, 1, 2, 1000) == (1000, 1)
    assert [round_up(n, 8) for n in (1, 8, 9, 400)] == [8, 8, 16, 400]


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_labels_resize_exactly_as_pillow_nearest(
    h: int, w: int, h2: int, w2: int, seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(-1, 2**20, (h, w)).astype(np.int64)
    pillow = Image.fromarray(labels.astype(np.int32)).resize((w2, h2), Image.Resampling.NEAREST)
    resized = labels[nearest_index(h, h2)][:, nearest_index(w, w2)]
    assert np.array_equal(resized, np.asarray(pillow))


@given(st.integers(2, 80), st.integers(2, 80), st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_images_resize_as_antialiased_bilinear(h: int, w: int, h2: int, w2: int) -> None:
    """Pillow in float is the independent reference: within one grey level."""
    image = np.random.default_rng(h * 100 + w).integers(0, 256, (h, w, 3), dtype=np.uint8)
    result = resize_image(image, (w2, h2))
    assert result.shape == (h2, w2, 3) and result.dtype == np.uint8
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32))
        reference = np.asarray(plane.resize((w2, h2), Image.Resampling.BILINEAR))
        assert np.abs(result[:, :, channel] - reference).max() <= 1.01


@given(
    st.integers(1, 250),
    st.integers(1, 250),
    st.integers(1, 300),
    st.integers(1, 300),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_images_resize_within_one_grey_level_of_pillow(
    h: int, w: int, h2: int, w2: int, hard: bool
) -> None:
    rng = np.random.default_rng(h * 1000 + w)
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    if hard:  # nothing but black and white
        image = np.where(image > 127, np.uint8(255), np.uint8(0))
    assert apart(resize_image(image, (w2, h2)), pillow_resize(image, (w2, h2))).max() <= 1


def test_arrays_that_torch_does_not_take_are_resized_too() -> None:
    frozen = COLOR.copy()
    frozen.setflags(write=False)
    expected = resize_image(COLOR.copy(), (5, 4))
    assert np.array_equal(resize_image(frozen, (5, 4)), expected)
    mirrored = COLOR[:, ::-1]
    assert np.array_equal(resize_image(mirrored, (5, 4)), resize_image(mirrored.copy(), (5, 4)))


# ------------------------------------------------------------------------------ values
def test_normalize_as_published() -> None:
    out = Normalize.of(DataOptions())(as_batch(COLOR))[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(COLOR).float() / 255 - mean) / std
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.permute(2, 0, 1))


def test_normalize_bgr_255_as_the_first_checkpoints() -> None:
    options = DataOptions(
        mean=(102.9801, 115.9465, 122.7717), std=(1, 1, 1), color_order="BGR", value_range=255
    )
    out = Normalize.of(options)(as_batch(np.array([[[10, 20, 30]]], np.uint8)))
    assert out.flatten().tolist() == pytest.approx([30 - 102.9801, 20 - 115.9465, 10 - 122.7717])


def test_scaled_inputs_are_resized_to_the_next_multiple() -> None:
    image = RNG.integers(0, 256, (50, 75, 3), dtype=np.uint8)
    opt = SimpleNamespace(imgSizes=[40, 100], imgMaxSize=90, padding_constant=16)
    small, large = scaled_inputs(image, opt)
    assert small.shape == (1, 3, 48, 64)  # 40 x 60
    assert large.shape == (1, 3, 64, 96)  # 60 x 90: the long side decides
    difference = (small[0] - normalize(pillow_resize(image, (64, 48)), DataOptions())).abs()
    assert (difference * torch.tensor(DataOptions.std)[:, None, None] * 255).max() <= 1.001
    single = scaled_inputs(image, SimpleNamespace(imgSizes=40, imgMaxSize=90, padding_constant=16))
    assert torch.equal(single[0], small)


BGR = {
    "mean": (102.9801, 115.9465, 122.7717),
    "std": (1.0, 2.0, 3.0),
    "color_order": "BGR",
    "value_range": 255,
}


def test_normalize_module_by_formula() -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (2, 3, 5, 7), dtype=np.uint8))
    out = Normalize()(images)
    for channel, (mean, std) in enumerate(
        [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]  # published, R, G, B
    ):
        expected = (images[:, channel].numpy() / 255 - mean) / std
        np.testing.assert_allclose(out[:, channel], expected, atol=rounding(out, 4))
    pixel = torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None]
    expected = [30 - 102.9801, (20 - 115.9465) / 2, (10 - 122.7717) / 3]
    assert Normalize(**BGR)(pixel).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{}, BGR, {**BGR, "color_order": "RGB"}])
def test_normalize_is_the_plain_formula_bit_for_bit(settings: dict[str, object]) -> None:
    """Every value in every channel, in both memory formats."""
    image = np.stack([np.roll(np.arange(256, dtype=np.uint8), k) for k in (0, 7, 99)], axis=1)
    image = image.reshape(16, 16, 3)
    expected = normalize(image, DataOptions.read(settings))[None]
    module = Normalize.of(settings)
    last = as_batch(image)
    assert torch.equal(module(last), expected)
    assert torch.equal(module(last.contiguous()), expected)
    assert module(last.contiguous()).is_contiguous()
    assert module(last).is_contiguous(memory_format=torch.channels_last)
    sliced = as_batch(np.dstack([image, image]))[:, :, :, ::2][:, :3]
    assert torch.equal(module(sliced), module(sliced.contiguous()))


def test_normalize_module_keeps_its_input_and_saves_nothing() -> None:
    module = Normalize()
    images = torch.full((1, 3, 2, 2), 9, dtype=torch.uint8)
    module(images, torch.tensor([[1, 1]]))
    assert (images == 9).all()
    assert module.state_dict() == {} and not list(module.parameters())
    assert {name for name, _ in module.named_buffers()} >= {"mean", "std"}


@pytest.mark.parametrize("settings", [{}, BGR])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_normalize_module_pads_with_the_mean(
    settings: dict[str, object], format: torch.memory_format
) -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (3, 3, 6, 8), dtype=np.uint8))
    images = images.contiguous(memory_format=format)
    sizes = [(6, 8), (4, 8), (3, 5)]
    module = Normalize.of(settings)
    out, bare = module(images, torch.tensor(sizes)), module(images)
    for k, (h, w) in enumerate(sizes):
        assert torch.equal(out[k, :, :h, :w], bare[k, :, :h, :w])
        assert not out[k, :, h:].any() and not out[k, :, :, w:].any()
    assert out.is_contiguous(memory_format=format) and (bare[2, :, 3:] != 0).any()


def test_normalize_module_refuses_what_is_no_picture() -> None:
    with pytest.raises(ValueError, match=r"uint8, got \(1, 3, 2, 2\) torch.float32"):
        Normalize()(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"got \(3, 2, 2\) torch.uint8"):
        Normalize()(torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="value_range is 7"):
        Normalize(value_range=7)


def test_scaled_inputs_may_stay_pixels() -> None:
    image = RNG.integers(0, 256, (50, 75, 3), dtype=np.uint8)
    opt = SimpleNamespace(imgSizes=[40, 48, 100], imgMaxSize=90, padding_constant=16)
    ready, raw = scaled_inputs(image, opt), scaled_inputs(image, opt, normalized=False)
    module = Normalize.of(opt)
    for done, pixels in zip(ready, raw):
        assert pixels.dtype == torch.uint8 and done.dtype == torch.float32
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(module(pixels), done)


def test_color_jitter_moves_colors_within_its_strength() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    factors = [jitter_factors(0.3, np.random.default_rng(seed)) for seed in range(40)]
    seen = {int(color_jitter(image, *three)[0, 0, 0]) for three in factors}
    # On a plain grey picture contrast and saturation do nothing; brightness is 70..130.
    assert min(seen) >= 70 and max(seen) <= 130 and len(seen) > 15
    assert np.array_equal(color_jitter(COLOR, 1, 1, 1), COLOR)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"imgSizes": []}, "imgSizes"),
        ({"padding_constant": 0}, "padding_constant is 0"),
        ({"crop_size": [3]}, r"crop_size is \[3\]"),
        ({"color_jitter": 2.0}, "color_jitter is 2.0"),
        ({"color_order": "GRB"}, "color_order is 'GRB'"),
        ({"value_range": 100}, "value_range is 100"),
        ({"std": [1.0, 1.0]}, "three in all"),
    ],
)
def test_options_that_cannot_work_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DataOptions.read(SimpleNamespace(**change))


def test_options_defaults_are_those_of_the_configuration() -> None:
    from mit_semseg.config import get_defaults

    assert DataOptions.read(get_defaults().DATASET) == DataOptions()
