"""Training batches: geometry by hand, padding, and one permutation a pass for everybody."""

import json
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dataset_files import options, put
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import BILINEAR, NEAREST, levels, normalize
from PIL import Image, ImageOps

from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.images import load_mask
from mit_semseg.dataset.transforms import Normalize


def equal(one, two):
    """Whether two batches hold the same, bit for bit."""
    return one.keys() == two.keys() and all(
        torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k]
        for k, v in one.items()
    )


# ------------------------------------------------------------------------------ geometry
def test_geometry_and_values_by_hand(samples):
    """Two images of one size class: resized by Pillow, top-left, padded, labels at 1/4."""
    records = [samples.write("wide", (50, 30)), samples.write("narrow", (36, 30))]
    batch = samples.train(records, 2, imgSizes=[24], random_flip=False)[0]
    # short side 24: 50x30 -> 40x24, 36x30 -> 28x24 (28.8); padded to multiples of 8: 40x24
    assert batch["img_data"].shape == (2, 3, 24, 40) and batch["img_data"].dtype == torch.float32
    assert batch["seg_label"].shape == (2, 6, 10) and batch["seg_label"].dtype == torch.int64
    for image, label, name in zip(batch["img_data"], batch["seg_label"], batch["info"]):
        width, record = (40, records[0]) if "wide" in name else (28, records[1])
        expected = np.asarray(samples.read(record).resize((width, 24), BILINEAR))
        assert levels(image[:, :, :width], expected) <= 1.001
        assert not image[:, :, width:].any()
        mask = samples.read(record, "fpath_segm").resize((width, 24), NEAREST)
        small = np.asarray(mask.resize((width // 4, 6), NEAREST)).astype(int) - 1
        assert np.array_equal(label[:, : width // 4], small)
        assert (label[:, width // 4 :] == -1).all()  # ignored, never class 0


@pytest.mark.parametrize("rate", [1, 2, 4, 8])
def test_labels_of_odd_sizes_are_padded_before_the_downsampling(samples, rate):
    """The published way, spelt out: paste into a multiple of r, then Pillow nearest by 1/r."""
    record = samples.write("odd", (37, 29))
    opt = options(imgSizes=[29], segm_downsampling_rate=rate, random_flip=False)
    label = samples.train([record], opt=opt)[0]["seg_label"][0]
    padded = np.full((32, 40), -1, np.int32)
    padded[:29, :37] = load_mask(samples.root / record["fpath_segm"]) - 1
    expected = Image.fromarray(padded).resize((40 // rate, 32 // rate), NEAREST)
    assert np.array_equal(label, np.asarray(expected))


def test_padding_to_larger_multiples_changes_the_padding_only(samples):
    records = [samples.write(f"s{k}", (50 + 9 * k, 30)) for k in range(4)]
    tight, padded = (
        samples.train(records, 2, padding_constant=24, normalized=False, pad_to=pad_to)
        for pad_to in (1, 64)
    )
    for k in range(8):
        expected, batch = tight[k], padded[k]
        assert batch["img_data"].shape[2:] == (192, 192), "multiples of 24 and of 64"
        assert batch["seg_label"].shape[1:] == (48, 48)
        assert torch.equal(batch["img_size"], expected["img_size"])
        for key, fill in (("img_data", 0), ("seg_label", -1)):
            h, w = expected[key].shape[-2:]
            assert torch.equal(batch[key][..., :h, :w], expected[key])
            assert (batch[key][..., h:, :] == fill).all() and (batch[key][..., w:] == fill).all()


def test_batches_are_of_one_orientation_and_one_short_side(samples):
    records = samples.mixed()
    data = samples.train(records, 3, normalized=False)
    assert data.batches_per_pass == 2 + 1  # 6 not upright, 3 upright
    upright = {r["fpath_img"] for r in records if r["height"] > r["width"]}
    shorts = set()
    for k in range(12):
        batch = data[k]
        assert set(batch["info"]) <= upright or not set(batch["info"]) & upright
        (short,) = set(batch["img_size"].min(dim=1).values.tolist())
        shorts.add(short)
    assert shorts == {24, 32}


@pytest.mark.parametrize("size", [(32, 24), (64, 48)])
def test_flips_are_as_published(samples, size):
    """Mirrored by Pillow first, then resized: not the same as the other way round."""
    record = samples.write("f", size)
    small = 32, 24
    both = [samples.read(record), ImageOps.mirror(samples.read(record))]
    images = [np.asarray(image.resize(small, BILINEAR)) for image in both]
    mask = samples.read(record, "fpath_segm")
    labels = [
        torch.from_numpy(np.array(image.resize(small, NEAREST)).astype(int) - 1)
        for image in (mask, ImageOps.mirror(mask))
    ]
    assert torch.equal(labels[0].flip(1), labels[1]) == (size == small)
    changes = {"imgSizes": [24], "segm_downsampling_rate": 1}
    flipped = 0
    for batch in map(samples.train([record], **changes).__getitem__, range(40)):
        (turned,) = (n for n in (0, 1) if torch.equal(batch["seg_label"][0], labels[n]))
        flipped += turned
        if size == small:
            assert torch.equal(batch["img_data"][0], normalize(images[turned]))
        assert levels(batch["img_data"][0], images[turned]) <= 1.001
    assert 8 <= flipped <= 32
    still = samples.train([record], random_flip=False, **changes)
    assert all(torch.equal(still[k]["seg_label"][0], labels[0]) for k in range(20))


def test_crops_cut_image_and_label_alike_and_pad_what_is_small(samples):
    big, small = samples.write("big", (64, 48)), samples.write("small", (20, 16))
    for record in (big, small):  # the image shows its own labels
        mask = load_mask(samples.root / record["fpath_segm"]).astype(np.uint8)
        put(samples.root / record["fpath_img"], np.dstack([mask] * 3))
    opt = options(
        imgSizes=[48], crop_size=[32, 40], segm_downsampling_rate=1, mean=[0.0] * 3, std=[1.0] * 3,
        value_range=255,
    )  # fmt: skip
    data = samples.train([big], opt=opt)
    crops = set()
    for k in range(12):
        batch = data[k]
        assert batch["img_data"].shape == (1, 3, 32, 40)
        assert torch.equal(batch["img_data"][0, 0].long() - 1, batch["seg_label"][0])
        crops.add(batch["seg_label"].sum().item())
    assert len(crops) > 6
    opt.imgSizes = [16]
    batch = samples.train([small], opt=opt)[0]
    assert batch["img_data"].shape == (1, 3, 32, 40)
    assert (batch["seg_label"][0, 16:] == -1).all() and (batch["seg_label"][0, :, 20:] == -1).all()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_size": [20, 28], "color_jitter": 0.4},
        {"color_order": "BGR", "value_range": 255, "mean": [99.0, 98.5, 97.0], "std": [1.0] * 3},
    ],
)
def test_pixels_normalised_later_are_the_same_batch(samples, change):
    records, module = samples.mixed(), Normalize.of(options(**change))
    ready = samples.train(records, 3, **change)
    raw = samples.train(records, 3, normalized=False, **change)
    padded = False
    for k in range(8):
        batch, pixels = ready[k], raw[k]
        images, sizes = pixels.pop("img_data"), pixels.pop("img_size")
        assert images.dtype == torch.uint8 and sizes.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert sizes.shape == (len(images), 2)
        padded |= bool((sizes < torch.tensor(images.shape[2:])).any())
        assert equal({**pixels, "img_data": module(images, sizes)}, batch)
    assert padded


def test_a_wrong_label_is_refused_where_the_resize_drops_it(samples):
    record = samples.write("x", (64, 48))
    file = samples.root / record["fpath_segm"]
    mask = np.array(samples.read(record, "fpath_segm"))
    for void, ignored in ((3, []), (255, [255])):
        mask[0, :2] = void
        put(file, mask)
        opt = options(imgSizes=[24], ignore_label=ignored, segm_downsampling_rate=8)
        data = samples.train([record], opt=opt)
        assert data[0]["seg_label"].max() <= 2  # 24 of 3072 pixels become labels
        mask[0, 1] = 77
        for kind in (np.uint8, np.uint16):
            put(file, mask.astype(kind))
            with pytest.raises(ValueError, match=r"x\.png: label 77 is outside 0\.\.3"):
                data[0]


def test_a_large_jpeg_with_a_mask_of_another_size(samples):
    """Sizes are compared as the files have them, however little of the JPEG is decoded."""
    record = samples.write("x", (400, 300), fpath_img="images/x.jpg")
    put(samples.root / "images/x.jpg", np.zeros((300, 400, 3), np.uint8))
    data = samples.train([record], imgSizes=[24])
    assert data[0]["img_data"].shape == (1, 3, 24, 32)
    Image.new("L", (200, 150)).save(samples.root / "masks/x.png")
    with pytest.raises(ValueError, match=r"x\.png: 200x150 pixels, but its image .* 400x300"):
        data[0]


def test_published_call(samples):
    """List path, positional arguments, only published keys; a length that never ends."""
    records = [samples.write("p", (64, 48)), samples.write("q", (48, 64))]
    del records[1]["width"], records[1]["height"]  # read from the file
    listing = samples.root / "training.odgt"
    listing.write_text("".join(json.dumps(record) + "\n" for record in records))
    opt = SimpleNamespace(
        imgSizes=(300, 375), imgMaxSize=1000, padding_constant=8, segm_downsampling_rate=8
    )
    data = TrainDataset(str(samples.root), str(listing), opt, 2)
    assert len(data) > 10**9
    for batch in (data[10**9], data[10**9 + 1]):  # one upright, one not
        short, long = sorted(batch["img_data"].shape[2:])
        assert short in (304, 376) and long > 390 and batch["seg_label"].max() <= 2


# ------------------------------------------------------------------------------ chance
@given(*(st.integers(*ends) for ends in ((1, 7), (0, 12), (1, 12), (0, 5), (1, 3))))
@settings(max_examples=50)
def test_each_pass_shows_each_image_once(batch, wide, upright, seed, ranks):
    records = [{"fpath_img": f"w{k}", "width": 4, "height": 3} for k in range(wide)]
    records += [{"fpath_img": f"u{k}", "width": 3, "height": 4} for k in range(upright)]
    data = TrainDataset("", records, options(), batch_per_gpu=batch, seed=seed)
    for first in (0, data.batches_per_pass):
        plan = range(first, first + data.batches_per_pass)
        shown = [name for rank in range(ranks) for k in plan[rank::ranks] for name in data.files(k)]
        assert sorted(shown) == sorted(record["fpath_img"] for record in records)


STYLES = {
    "aspect": {"crop_size": [16, 24], "color_jitter": 0.4},
    "skip": {"crop_size": [16, 16], "on_error": "skip"},
    "crop": {
        "batching": "crop", "crop_size": [16, 24], "color_jitter": 0.4, "random_blur": 1.0,
        "random_rotation": 45.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_a_batch_depends_on_seed_and_index_only(samples, style):
    """The same whoever makes it, in whatever order, with any number of threads."""
    records = samples.mixed()
    if style == "skip":
        for record in records[::3]:
            samples.cut(record)
    data, other = (samples.train(records, 2, seed=seed, **STYLES[style]) for seed in (3, 4))
    alone = [data[index] for index in range(12)]
    assert style != "skip" or sum(len(batch["skipped"]) for batch in alone) > 4
    random_state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        backwards = [data[index] for index in reversed(range(12))]
    finally:
        torch.set_num_threads(threads)
    # The global generators, which dropout draws from, are where they were.
    assert torch.equal(random_state[0], torch.get_rng_state())
    assert random_state[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, sampler=range(12), num_workers=2, collate_fn=dict
    )
    again = pickle.loads(pickle.dumps(data))
    for batches in (backwards[::-1], list(loader), [again[index] for index in range(12)]):
        assert all(equal(a, b) for a, b in zip(alone, batches, strict=True))
    assert not any(equal(other[index], alone[index]) for index in range(12))
    per_pass = data.batches_per_pass
    orders = [[data.files(start + k) for k in range(per_pass)] for start in (0, per_pass)]
    assert orders[0] != orders[1] != [other.files(k) for k in range(per_pass)] != orders[0]


# (width, height); first row and column; mirrored; colours; blur; angle.
DRAWN = {
    "crop": [
        ((54, 41), (21, 19), True, [0.8932, 1.2452, 1.1023], None, -8.7152),
        ((23, 17), (0, 0), True, [1.2554, 0.9644, 1.0922], None, -1.0502),
        ((69, 51), (35, 11), True, [1.0087, 1.1444, 0.8021], None, -0.6737),
        ((39, 29), (9, 11), False, [1.252, 0.7394, 1.2121], None, -2.4843),
    ],
    "aspect": [
        ((53, 40), (20, 1), False, [0.8705, 0.8085, 0.8932], None, 0.0),
        ((53, 40), (18, 7), True, [0.7987, 0.9685, 0.7006], None, 0.0),
        ((32, 24), (1, 3), False, [1.0922, 1.2489, 1.2923], None, 0.0),
        ((53, 40), (11, 15), False, [1.1702, 1.0087, 1.1444], None, 0.0),
    ],
}


@pytest.mark.parametrize("batching", DRAWN)
def test_random_numbers_of_a_seed_are_the_recorded_ones(samples, batching, monkeypatch):
    """A run of an earlier version is resumed exactly: the numbers are recorded, not computed."""
    records = [samples.write(f"s{k}", (60, 45)) for k in range(4)]
    (samples.root / records[2]["fpath_segm"]).unlink()  # the first of the batch
    data = samples.train(
        records, 4, imgSizes=[24, 32, 40], imgMaxSize=200, on_error="skip", batching=batching,
        crop_size=[16, 24], color_jitter=0.3,
    )  # fmt: skip
    seen = []
    apply = data._style.apply

    def recorded(loaded, plan):
        corner = tuple(side.start for side in plan.window)
        colors = plan.colors and [round(float(factor), 4) for factor in plan.colors]
        sigma = plan.sigma and round(plan.sigma, 4)
        seen.append((plan.size, corner, plan.flip, colors, sigma, round(plan.angle, 4)))
        return apply(loaded, plan)

    monkeypatch.setattr(data._style, "apply", recorded)
    assert len(data[0]["skipped"]) == 1
    assert seen == DRAWN[batching]
