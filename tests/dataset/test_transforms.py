"""Files of every kind to arrays, and arrays to tensors, against Pillow, torch and hand numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.transforms import (
    color_jitter,
    fitted_size,
    image_size,
    load_image,
    load_mask,
    normalize,
    resize_image,
    resize_labels,
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
    assert np.array_equal(resize_labels(labels, (w2, h2)), np.asarray(pillow))


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


# ------------------------------------------------------------------------------ values
def test_normalize_as_published() -> None:
    out = normalize(COLOR, DataOptions())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.from_numpy(COLOR).float() / 255 - mean) / std
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.permute(2, 0, 1))


def test_normalize_bgr_255_as_the_first_checkpoints() -> None:
    options = DataOptions(
        mean=(102.9801, 115.9465, 122.7717), std=(1, 1, 1), color_order="BGR", value_range=255
    )
    out = normalize(np.array([[[10, 20, 30]]], np.uint8), options)
    assert out.flatten().tolist() == pytest.approx([30 - 102.9801, 20 - 115.9465, 10 - 122.7717])


def test_scaled_inputs_are_resized_to_the_next_multiple() -> None:
    image = RNG.integers(0, 256, (50, 75, 3), dtype=np.uint8)
    opt = SimpleNamespace(imgSizes=[40, 100], imgMaxSize=90, padding_constant=16)
    small, large = scaled_inputs(image, opt)
    assert small.shape == (1, 3, 48, 64)  # 40 x 60
    assert large.shape == (1, 3, 64, 96)  # 60 x 90: the long side decides
    resized = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR))
    assert torch.equal(small[0], normalize(resized, DataOptions()))
    single = scaled_inputs(image, SimpleNamespace(imgSizes=40, imgMaxSize=90, padding_constant=16))
    assert torch.equal(single[0], small)


def test_color_jitter_moves_colors_within_its_strength() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    seen = {
        int(color_jitter(image, 0.3, np.random.default_rng(seed))[0, 0, 0]) for seed in range(40)
    }
    # On a plain grey picture contrast and saturation do nothing; brightness is 70..130.
    assert min(seen) >= 70 and max(seen) <= 130 and len(seen) > 15
    assert np.array_equal(color_jitter(COLOR, 0.0, np.random.default_rng(0)), COLOR)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"imgSizes": []}, "imgSizes"),
        ({"padding_constant": 0}, "padding_constant is 0"),
        ({"crop_size": [3]}, r"crop_size is \[3\]"),
        ({"color_jitter": 2.0}, "color_jitter is 2.0"),
        ({"color_order": "GRB"}, "color_order is 'GRB'"),
        ({"value_range": 100}, "value_range is 100"),
        ({"std": [1.0, 1.0]}, "three numbers"),
    ],
)
def test_options_that_cannot_work_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DataOptions.read(SimpleNamespace(**change))


def test_options_defaults_are_those_of_the_configuration() -> None:
    from mit_semseg.config import get_defaults

    assert DataOptions.read(get_defaults().DATASET) == DataOptions()
