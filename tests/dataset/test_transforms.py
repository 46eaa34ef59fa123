"""Geometry and values of pixels, against Pillow, torch and hand numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import BILINEAR, NEAREST, apart, levels, normalize, pillow_resize
from PIL import Image

from mit_semseg.config import DataOptions, get_defaults
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
BGR = {
    "mean": (102.9801, 115.9465, 122.7717), "std": (1.0, 2.0, 3.0), "color_order": "BGR",
    "value_range": 255,
}  # fmt: skip


def test_fitted_size_by_hand():
    assert fitted_size(683, 512, 300, 1000) == (400, 300)  # 683 * 300 / 512 = 400.2
    assert fitted_size(512, 683, 300, 1000) == (300, 400)
    assert fitted_size(2000, 500, 600, 1000) == (1000, 250)  # the long side decides
    assert fitted_size(1000, 1, 2, 1000) == (1000, 1)
    assert [round_up(n, 8) for n in (1, 8, 9, 400)] == [8, 8, 16, 400]


sides = st.integers(1, 70)


@given(sides, sides, sides, sides, st.integers(0, 9))
@settings(max_examples=60)
def test_labels_resize_exactly_as_pillow_nearest(h, w, h2, w2, seed):
    labels = np.random.default_rng(seed).integers(-1, 2**20, (h, w)).astype(np.int64)
    pillow = Image.fromarray(labels.astype(np.int32)).resize((w2, h2), NEAREST)
    resized = labels[nearest_index(h, h2)][:, nearest_index(w, w2)]
    assert np.array_equal(resized, np.asarray(pillow))


@given(*[st.integers(1, 250)] * 2, *[st.integers(1, 300)] * 2, st.booleans())
@settings(max_examples=60)
def test_images_resize_within_one_grey_level_of_pillow(h, w, h2, w2, hard):
    """In bytes, and, which is not rounded, in floats."""
    image = np.random.default_rng(h * 1000 + w).integers(0, 256, (h, w, 3), dtype=np.uint8)
    if hard:  # nothing but black and white
        image = np.where(image > 127, np.uint8(255), np.uint8(0))
    result = resize_image(image, (w2, h2))
    assert result.shape == (h2, w2, 3) and result.dtype == np.uint8
    assert apart(result, pillow_resize(image, (w2, h2))).max() <= 1
    red = Image.fromarray(image[:, :, 0].astype(np.float32)).resize((w2, h2), BILINEAR)
    assert np.abs(result[:, :, 0] - np.asarray(red)).max() <= 1.01


def test_read_only_and_mirrored_arrays_are_resized():
    frozen, mirrored = COLOR.copy(), COLOR[:, ::-1]
    frozen.setflags(write=False)
    for array in (frozen, mirrored):
        assert np.array_equal(resize_image(array, (5, 4)), resize_image(array.copy(), (5, 4)))


@pytest.mark.parametrize("changes", [{}, {"imgSizes": 40}])
def test_scaled_inputs_are_resized_to_the_next_multiple(changes):
    image = RNG.integers(0, 256, (50, 75, 3), dtype=np.uint8)
    settings = {"imgSizes": [40, 100], "imgMaxSize": 90, "padding_constant": 16, **changes}
    # 40 x 60; 60 x 90, where the long side decides
    expected = [(48, 64), (64, 96)][: 1 if changes else 2]
    ready, raw = (scaled_inputs(image, SimpleNamespace(**settings), normalized=n) for n in (1, 0))
    assert [tuple(x.shape[2:]) for x in ready] == expected
    for done, pixels, (h, w) in zip(ready, raw, expected):
        assert levels(done[0], pillow_resize(image, (w, h))) <= 1.001
        assert pixels.dtype == torch.uint8 and done.dtype == torch.float32
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(Normalize()(pixels), done)


# ------------------------------------------------------------------------------ values
@pytest.mark.parametrize("settings", [{}, BGR, {**BGR, "color_order": "RGB"}])
def test_normalize_is_the_plain_formula_bit_for_bit(settings):
    """Every value in every channel, in both memory formats."""
    image = np.stack([np.roll(np.arange(256, dtype=np.uint8), k) for k in (0, 7, 99)], axis=1)
    image = image.reshape(16, 16, 3)
    expected = normalize(image, DataOptions.read(settings))[None]
    module, last = Normalize.of(settings), as_batch(image)
    assert torch.equal(module(last), expected)
    assert torch.equal(module(last.contiguous()), expected)
    assert module(last.contiguous()).is_contiguous()
    assert module(last).is_contiguous(memory_format=torch.channels_last)
    sliced = as_batch(np.dstack([image, image]))[:, :, :, ::2][:, :3]
    assert torch.equal(module(sliced), module(sliced.contiguous()))


def test_normalize_by_hand():
    """The published constants, and those of the first checkpoints."""
    pixel = as_batch(np.array([[[10, 20, 30]]], np.uint8))
    expected = [(10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225]
    assert Normalize()(pixel).flatten().tolist() == pytest.approx(expected)
    expected = [30 - 102.9801, (20 - 115.9465) / 2, (10 - 122.7717) / 3]
    assert Normalize(**BGR)(pixel).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{}, BGR])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_normalize_pads_with_the_mean(settings, format):
    images = torch.from_numpy(RNG.integers(0, 256, (3, 3, 6, 8), dtype=np.uint8))
    images = images.contiguous(memory_format=format)
    before, sizes, module = images.clone(), [(6, 8), (4, 8), (3, 5)], Normalize.of(settings)
    out, bare = module(images, torch.tensor(sizes)), module(images)
    for k, (h, w) in enumerate(sizes):
        assert torch.equal(out[k, :, :h, :w], bare[k, :, :h, :w])
        assert not out[k, :, h:].any() and not out[k, :, :, w:].any()
    assert out.is_contiguous(memory_format=format) and (bare[2, :, 3:] != 0).any()
    assert torch.equal(images, before)
    assert module.state_dict() == {} and not list(module.parameters())  # checkpoints have none
    assert {name for name, _ in module.named_buffers()} >= {"mean", "std"}


def test_normalize_refuses_other_shapes_and_types():
    with pytest.raises(ValueError, match=r"uint8, got \(1, 3, 2, 2\) torch.float32"):
        Normalize()(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"got \(3, 2, 2\) torch.uint8"):
        Normalize()(torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="value_range is 7"):
        Normalize(value_range=7)


def test_color_jitter_moves_colors_within_its_strength():
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
        ({"std": [1.0, 1.0]}, "give three numbers"),
    ],
)
def test_options_that_cannot_work_are_refused(change, says):
    assert DataOptions.read(get_defaults().DATASET) == DataOptions()
    with pytest.raises(ValueError, match=says):
        DataOptions.read(SimpleNamespace(**change))
