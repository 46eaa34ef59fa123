"""Any size, mode, class count and scales: a result of the right size, or one line with the file."""

import itertools

import numpy as np
import pytest
import torch
from corpus import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.images import image_size, load_image, load_mask
from mit_semseg.dataset.transforms import scaled_inputs
from mit_semseg.segmenter import Segmenter

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F")
KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000", "ICO")
sides = st.integers(1, 80)
scales = st.lists(st.integers(1, 100), min_size=1, max_size=3)
numbers = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def picture(width, height, mode, seed=0):
    grey = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode.startswith("I"):  # values of 16 bits, the first of them bright
        kind = np.uint16 if mode == "I;16" else np.int32
        return Image.fromarray(grey[:, :, 0].astype(kind) * 257)
    if mode == "PA":
        return Image.fromarray(grey).convert("P").convert("PA")
    image = Image.fromarray(grey).convert("L" if mode == "F" else "RGB")
    return image.convert(mode)


@given(sides, sides, st.sampled_from(MODES), st.sampled_from(KINDS))
@settings(max_examples=120)
def test_every_mode_in_every_format(folder, width, height, mode, kind):
    path = folder / f"{next(numbers)}.img"
    try:
        path.write_bytes(encoded(picture(width, height, mode), kind))
        with Image.open(path) as opened:
            opened.load()
    except (OSError, ValueError, KeyError):  # no such mode in this format, or Pillow's own mistake
        return
    try:
        pixels = load_image(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
        assert mode == "F"  # numbers of 0..255 are grey levels, if they reach 1
        return
    with Image.open(path) as opened:
        assert pixels.shape == (*opened.size[::-1], 3) and image_size(path) == opened.size
    assert pixels.dtype == np.uint8


@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
    st.sampled_from(["1", "L", "P", "RGB", "I;16"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.floats(0, 2),
)
@settings(max_examples=200)
def test_damaged_files(folder, kind, mode, changes, length):
    """Bytes changed and ends cut off: what cannot be read is said of the file."""
    try:
        content = bytearray(encoded(picture(23, 17, mode), kind))
    except (OSError, ValueError):
        return
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    del content[int(length * len(content)) :]
    path = folder / f"{next(numbers)}.img"
    path.write_bytes(content)
    for read in (load_image, load_mask, image_size):
        try:
            found = read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert len(found) > 0
    path.unlink()


@given(sides, sides, scales, st.integers(1, 200), st.sampled_from([1, 8, 32]))
@settings(max_examples=60)
def test_scaled_inputs(width, height, shorts, longest, multiple):
    image = np.zeros((height, width, 3), np.uint8)
    options = {"imgSizes": shorts, "imgMaxSize": longest, "padding_constant": multiple}
    inputs = scaled_inputs(image, options)
    assert len(inputs) == len(shorts)
    for short, tensor in zip(shorts, inputs, strict=True):
        B, C, H, W = tensor.shape
        assert (B, C) == (1, 3) and H % multiple == W % multiple == 0
        assert max(H, W) < max(longest, multiple) + multiple
        assert min(H, W) < max(short, multiple) + multiple
        assert torch.isfinite(tensor).all()


@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=4),
    scales,
    st.integers(1, 300),
    st.sampled_from([(1, 8), (2, 8), (4, 8), (8, 8), (8, 32), (4, 32)]),
    st.sampled_from([(), (16, 24), (1, 1)]),
    st.integers(1, 4),
    st.integers(0, 300),
)
@settings(max_examples=40)
def test_training_batches(folder, sizes, shorts, classes, strides, crop, batch_size, highest):
    """Batches of the right shapes and labels below the class count, or the mask named."""
    records = []
    for width, height in sizes:
        name = f"{next(numbers)}"
        (folder / f"{name}.png").write_bytes(encoded(picture(width, height, "RGB"), "PNG"))
        mask = np.random.default_rng(width).integers(0, highest + 1, (height, width))
        (folder / f"{name}_mask.png").write_bytes(encoded(mask.astype(np.uint16), "PNG"))
        records.append({"fpath_img": f"{name}.png", "fpath_segm": f"{name}_mask.png"})
    rate, multiple = strides
    options = {
        "num_class": classes, "imgSizes": shorts, "imgMaxSize": 120,
        "segm_downsampling_rate": rate, "padding_constant": multiple, "crop_size": crop,
    }  # fmt: skip
    data = TrainDataset(folder, records, options, batch_per_gpu=batch_size)
    for index in range(data.batches_per_pass):
        try:
            batch = data[index]
        except ValueError as error:
            assert "_mask.png: label" in str(error) and highest > classes
            continue
        B, C, H, W = batch["img_data"].shape
        assert len(batch["info"]) == B and C == 3 and H % multiple == W % multiple == 0
        assert batch["seg_label"].shape == (B, H // rate, W // rate)
        assert batch["seg_label"].min() >= -1 and batch["seg_label"].max() < classes
    for record, size in zip(records, sizes, strict=True):
        try:
            sample = ValDataset(folder, [record], options)[0]
        except ValueError as error:
            assert record["fpath_segm"] in str(error) and highest > classes
            continue
        assert sample["seg_label"].shape == (1, size[1], size[0])
        assert len(sample["img_data"]) == len(shorts)


@pytest.fixture(scope="module")
def segmenter(model):
    return Segmenter.from_checkpoint(model.DIR, device="cpu")


@given(sides, sides, st.sampled_from(["L", "RGB", "RGBA", "P", "1", "I;16"]))
@settings(max_examples=10)
def test_any_image_through_the_network(segmenter, folder, width, height, mode):
    path = folder / f"{next(numbers)}.png"
    picture(width, height, mode).save(path)
    result = segmenter(path)
    assert result.labels.shape == (height, width)
    assert result.labels.min() >= 0 and result.labels.max() < 3
