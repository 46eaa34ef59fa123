"""Random crops: image, labels and depth stay together, and their chances are as set."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import options, put
from PIL import Image
from scipy.ndimage import binary_erosion
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mit_semseg.config import load_config
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.crops import _Frame
from mit_semseg.engine.launch import read_config
from mit_semseg.losses import build_loss

COLORS = np.array([[0, 0, 0], [220, 30, 90], [40, 210, 160], [120, 90, 250]], np.uint8)
MEAN = [0.4, 0.8, 0.2]  # 102, 204, 51: none of them
PLAIN = {"scale_jitter": [1.0, 1.0], "random_rotation": 0.0, "random_blur": 0.0}


def crops(**changes):
    """`cfg.DATASET` for crops of 32 x 48, with overrides."""
    base = {
        "imgSizes": [48], "imgMaxSize": 200, "padding_constant": 16, "segm_downsampling_rate": 1,
        "batching": "crop", "crop_size": [32, 48], "mean": MEAN,
    }  # fmt: skip
    return options(**{**base, **changes})


def cropped(root, *records, batch=1, normalized=False, **changes):
    return TrainDataset(root, list(records), crops(**changes), batch, normalized=normalized)


def write(root, name, size):
    """An image of blocks whose colour and depth (in metres) are their class; none is ignored."""
    width, height = size
    rng = np.random.default_rng(sum(map(ord, name)))
    blocks = rng.integers(1, 4, (-(-height // 16), -(-width // 16)), dtype=np.uint8)
    mask = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]
    files = {"img": COLORS[mask], "segm": mask, "depth": mask.astype(np.uint16) * 1000}
    for key, array in files.items():
        put(root / f"{name}-{key}.png", array)
    paths = {f"fpath_{key}": f"{name}-{key}.png" for key in files}
    return {"width": width, "height": height, **paths}


@pytest.fixture
def records(tmp_path):
    sizes = [(96, 64), (64, 96), (80, 48), (48, 48), (64, 100)]
    return [write(tmp_path, f"i{k}", size) for k, size in enumerate(sizes)]


def interior(labels, value, away):
    """Pixels of this label at least `away` from any other one and from the border."""
    return binary_erosion(labels == value, np.ones((2 * away + 1, 2 * away + 1)))


# ------------------------------------------------------------------------------ alignment
@pytest.mark.parametrize("degrees", [0.0, 10.0, 90.0])
def test_color_labels_and_depth_stay_together(tmp_path, records, degrees):
    change = {"random_rotation": degrees, "imgSizes": [80], "crop_size": [64, 96]}
    deep = cropped(tmp_path, *records, batch=3, depth=True, depth_mean=0.0, depth_std=1.0, **change)
    flat = cropped(tmp_path, *records, batch=3, **change)
    fill = np.round(255 * np.array(MEAN))
    seen = filled = 0
    for index in range(6):
        pixels, with_depth = flat[index], deep[index]
        assert torch.equal(with_depth["seg_label"], pixels["seg_label"])
        for k, (h, w) in enumerate(pixels["img_size"].tolist()):
            labels = pixels["seg_label"][k].numpy()
            depth = with_depth["img_data"][k, 3].numpy()
            assert (labels[h:] == -1).all() and (labels[:, w:] == -1).all()
            assert not depth[h:].any() and not depth[:, w:].any()
            labels, depth = labels[:h, :w], depth[:h, :w]
            image = pixels["img_data"][k, :, :h, :w].permute(1, 2, 0).numpy().astype(int)
            for class_id in range(3):
                # A blur reaches 6 pixels; where it does not, colours are exact.
                far = interior(labels, class_id, 8)
                assert np.abs(image[far] - COLORS[class_id + 1]).max(initial=0) <= 1
                seen += int(far.sum())
                near = interior(labels, class_id, 3)  # resized, but not blurred
                assert np.abs(depth[near] - (class_id + 1)).max(initial=0) < 1e-5
            beyond = interior(labels, -1, 2)  # filled after the blur
            assert (image[beyond] == fill).all() and not depth[beyond].any()
            assert np.array_equal(depth == 0, labels == -1)
            filled += int(beyond.sum())
    assert seen > 2500  # pixels that were compared
    assert bool(filled) == bool(degrees)


@pytest.mark.parametrize("angle", [0.0, 7.0, -33.0, 90.0, 141.5, 180.0])
@pytest.mark.parametrize("window", [(slice(10, 40), slice(8, 54)), (slice(0, 51), slice(30, 71))])
def test_turned_as_pillow_turns_the_whole_picture(window, angle):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 9, (9, 12)).repeat(6, 0).repeat(6, 1)[:51, :71].astype(np.int32)
    down, right = window
    middle = ((right.start + right.stop) / 2, (down.start + down.stop) / 2)
    whole = Image.fromarray(mask).rotate(angle, center=middle, fillcolor=-1)
    expected = np.asarray(whole)[down, right]
    frame = _Frame.around([down, right], (51, 71), angle)
    part = tv_tensors.Mask(torch.from_numpy(mask[frame.inside].astype(np.int64))[None])
    got = frame.rotated(part, angle, -1)[0].numpy()
    assert got.shape == expected.shape
    # Which of two pixels is nearest may be a matter of rounding.
    assert (got == expected).mean() > 0.98
    for value in range(-1, 9):
        assert (got[interior(expected, value, 1)] == value).all()


@pytest.mark.parametrize("angle", [-90.0, -71.2, -45.0, -10.3, 0.0, 4.7, 33.0, 60.1, 88.8])
def test_rotated_crops_use_the_pixels_around_them(angle):
    """As if the whole image were turned: no edge is seen where the image goes on."""
    noise = np.random.default_rng(0).integers(0, 99, (3, 90, 100), dtype=np.uint8)
    image = tv_tensors.Image(torch.from_numpy(noise))
    down, right = slice(32, 57), slice(25, 70)
    whole = F.rotate(image, angle, InterpolationMode.BILINEAR, center=[47.5, 44.5])
    expected = whole[:, down, right].int()
    frame = _Frame.around([down, right], (90, 100), angle)
    assert frame.beyond == [0, 0, 0, 0]
    part = tv_tensors.Image(image[:, frame.inside[0], frame.inside[1]])
    got = frame.rotated(part, angle, [255.0, 255.0, 255.0]).int()
    assert (got - expected).abs().max() <= 1


def test_labels_are_as_small_as_the_scores(tmp_path, records):
    """At 1/r the middle of each r x r block, as in the aspect-preserving style."""
    whole = cropped(tmp_path, *records, batch=3)
    for rate in (2, 4, 8, 16):
        small = cropped(tmp_path, *records, batch=3, segm_downsampling_rate=rate)
        for index in range(2):
            assert torch.equal(small[index]["img_data"], whole[index]["img_data"])
            expected = whole[index]["seg_label"][:, rate // 2 :: rate, rate // 2 :: rate]
            assert torch.equal(small[index]["seg_label"], expected)


# ------------------------------------------------------------------------------ values and sizes
def test_a_crop_without_augmentation_is_a_window_of_the_image(samples):
    record = samples.write("x", (80, 60))
    image = np.asarray(samples.read(record)).astype(int)
    mask = np.asarray(samples.read(record, "fpath_segm")).astype(int)
    data = cropped(samples.root, record, imgSizes=[60], random_flip=False, **PLAIN)
    places = set()
    for index in range(30):
        batch = data[index]
        got = batch["img_data"][0].permute(1, 2, 0).numpy()
        # The pixels are noise, so that two of them tell where the crop is from.
        beside = (np.roll(image, -1, axis=1) == got[0, 1]).all(2)
        ((top, left),) = np.argwhere((image == got[0, 0]).all(2) & beside)
        assert np.array_equal(got, image[top : top + 32, left : left + 48])
        labels = batch["seg_label"][0].numpy()
        assert np.array_equal(labels, mask[top : top + 32, left : left + 48] - 1)
        places.add((int(top), int(left)))
    tops, lefts = zip(*places)
    assert len(places) > 20
    assert min(tops) < 5 and max(tops) > 23 and min(lefts) < 5 and max(lefts) > 27


def test_flip_and_blur_have_their_probabilities(samples):
    record = samples.write("x", (48, 32))
    image = torch.from_numpy(np.array(samples.read(record))).permute(2, 0, 1)
    settings = {"imgSizes": [32], **PLAIN}
    images = [cropped(samples.root, record, **settings)[k]["img_data"][0] for k in range(40)]
    assert all(torch.equal(got, image) or torch.equal(got, image.flip(2)) for got in images)
    assert 8 <= sum(torch.equal(got, image.flip(2)) for got in images) <= 32
    counts = []
    for chance in (0.0, 0.5, 1.0):
        changes = {**settings, "random_flip": False, "random_blur": chance}
        batches = [cropped(samples.root, record, **changes)[index] for index in range(40)]
        counts.append(sum(not torch.equal(b["img_data"][0], image) for b in batches))
        assert all(torch.equal(b["seg_label"], batches[0]["seg_label"]) for b in batches)
    # The weakest blurs (sigma up to 0.3 of 0.1 to 2) leave pixels as they are.
    assert counts[0] == 0 and 8 <= counts[1] <= 30 < counts[2]


def test_colour_jitter_changes_pixels_and_nothing_else(tmp_path):
    record = write(tmp_path, "x", (48, 32))
    settings = {"imgSizes": [32], "random_flip": False, **PLAIN}
    plain, jittered = (
        cropped(tmp_path, record, color_jitter=strength, **settings)[0] for strength in (0.0, 0.4)
    )
    assert torch.equal(plain["seg_label"], jittered["seg_label"])
    change = (plain["img_data"].int() - jittered["img_data"].int()).abs()
    assert 5 < change.float().mean() < 110
    # The same everywhere: pixels of one colour stay pixels of one colour.
    for color in COLORS[1:]:
        here = (plain["img_data"][0] == torch.from_numpy(color)[:, None, None]).all(0)
        assert here.any() and len(jittered["img_data"][0][:, here].unique(dim=1)[0]) == 1


def test_scales_fill_their_range(tmp_path):
    """Seen in crops larger than the images: they hold all of them."""
    record = write(tmp_path, "x", (60, 40))
    settings = {"imgSizes": [40], "crop_size": [112, 128], "random_rotation": 0.0}
    data = cropped(tmp_path, record, **settings)
    sizes = np.array([data[index]["img_size"][0].tolist() for index in range(150)])
    assert np.abs(sizes[:, 1] - 1.5 * sizes[:, 0]).max() <= 1.5
    assert 20 <= sizes[:, 0].min() <= 22 and 78 <= sizes[:, 0].max() <= 80
    assert np.median(sizes[:, 0]) == pytest.approx(50, abs=6)  # uniform
    # The size that is scaled is what the evaluation sees.
    data = cropped(tmp_path, record, imgMaxSize=30, **settings)
    sides = [data[index]["img_size"][0, 1].item() for index in range(60)]
    assert 14 <= min(sides) <= 18 and 54 <= max(sides) <= 60


def test_angles_fill_their_range(tmp_path):
    """Seen in a picture that gets redder to the right."""
    x, y = np.meshgrid(np.arange(120), np.arange(100))
    put(tmp_path / "i.png", np.dstack([2 * x, 2 * y, 0 * x]).astype(np.uint8))
    put(tmp_path / "m.png", np.ones((100, 120), np.uint8))
    record = {"fpath_img": "i.png", "fpath_segm": "m.png"}
    turning = {**PLAIN, "random_rotation": 20.0}
    data = cropped(tmp_path, record, imgSizes=[100], random_flip=False, **turning)
    angles = []
    for index in range(60):
        red, green = data[index]["img_data"][0, :2].double()
        across, along = (red[16, 34] - red[16, 14]) / 20, (red[26, 24] - red[6, 24]) / 20
        angles.append(math.degrees(math.atan2(along, across)))
        assert abs(math.hypot(across, along) - 2) < 0.1  # neither stretched
        assert abs((green[26, 24] - green[6, 24]) / 20 - across) < 0.1  # nor sheared
    assert -20.5 < min(angles) < -15 and 15 < max(angles) < 20.5
    assert abs(np.mean(angles)) < 5


@pytest.mark.parametrize(("order", "value_range"), [("RGB", 1), ("BGR", 255)])
def test_padding_is_the_mean_color_and_ignored(tmp_path, order, value_range):
    record = write(tmp_path, "x", (40, 30))
    changes = {
        "imgSizes": [24], "random_rotation": 90.0, "color_jitter": 0.3, "color_order": order,
        "value_range": value_range, "mean": [m * value_range for m in MEAN],
        "std": [0.2 * value_range] * 3,
    }  # fmt: skip
    ready, raw = (cropped(tmp_path, record, normalized=n, **changes) for n in (True, False))
    corners = 0
    for index in range(20):
        batch, (h, w) = ready[index], raw[index]["img_size"][0].tolist()
        image, labels = batch["img_data"][0], batch["seg_label"][0]
        assert not image[:, h:].any() and not image[:, :, w:].any()
        assert (labels[h:] == -1).all() and (labels[:, w:] == -1).all()
        beyond = torch.from_numpy(interior(labels[:h, :w].numpy(), -1, 2))
        assert image[:, :h, :w][:, beyond].abs().max() <= 0.5 / 255 / 0.2 if beyond.any() else True
        corners += int(beyond.sum())
    assert corners > 100


def test_every_batch_has_one_size_and_one_layout(tmp_path):
    sizes = [(1, 1), (1, 90), (90, 1), (2, 3), (7, 200), (64, 96), (96, 64), (48, 48), (33, 31)]
    records = [write(tmp_path, f"s{k}", size) for k, size in enumerate(sizes)]
    upright = {r["fpath_img"]: r["height"] > r["width"] for r in records}
    settings = {"color_jitter": 0.5, "random_blur": 1.0, "segm_downsampling_rate": 4}
    for normalized in (True, False):
        data, aspect = (
            cropped(
                tmp_path, *records, batch=3, normalized=normalized, imgMaxSize=90,
                batching=batching, **settings,
            )
            for batching in ("crop", "aspect")
        )  # fmt: skip
        assert data.batches_per_pass == 3 and aspect.batches_per_pass == 4
        batches = [data[index] for index in range(12)]
        for index, batch in enumerate(batches):
            other = aspect[index]
            assert batch["img_data"].shape == (3, 3, 32, 48)
            assert batch["seg_label"].shape == (3, 8, 12)
            assert batch.keys() == other.keys()
            for key, value in batch.items():
                assert type(value) is type(other[key]) and len(value) == 3
                if isinstance(value, torch.Tensor):
                    assert value.dtype == other[key].dtype
            image = batch["img_data"]
            assert normalized or image.is_contiguous(memory_format=torch.channels_last)
        assert any(len({upright[name] for name in batch["info"]}) == 2 for batch in batches)
        shown = [name for batch in batches[3:6] for name in batch["info"]]
        assert sorted(shown) == sorted(upright)


# ------------------------------------------------------------------------------ settings
FACTORS = "give minimum and maximum"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("batching", "crops", "is 'crops'; did you mean 'crop'|give one of aspect, crop"),
        ("scale_jitter", [2.0, 0.5], rf"is \[2.0, 0.5\]; {FACTORS}"),
        ("scale_jitter", [0.5], rf"is \[0.5\]; {FACTORS}"),
        ("scale_jitter", [0, 2], rf"is \[0(.0)?, 2(.0)?\]; {FACTORS}"),
        ("random_rotation", -10, r"is -10; give degrees in \[0, 180\]"),
        ("random_rotation", 181, r"is 181; give degrees in \[0, 180\]"),
        ("random_blur", 1.5, r"is 1.5; give a probability in \[0, 1\]"),
        ("random_blur", -1, "is -1; give a probability"),
    ],
)
def test_settings_are_checked_one_by_one(key, value, says):
    with pytest.raises(ValueError, match=f"command line: DATASET.{key} {says}"):
        load_config(None, [f"DATASET.{key}", str(value)])
    with pytest.raises(ValueError, match=f"^DATASET.{key} {says}"):
        TrainDataset("", [{"fpath_img": "a", "width": 4, "height": 3}], crops(**{key: value}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crop_size": []}, r"needs a crop size: set DATASET.crop_size \[height, width"),
        ({"crop_size": [40, 48]}, r"\[40, 48\].*multiples of .*padding_constant 16.*\[48, 48\]"),
        ({"segm_downsampling_rate": 12}, "padding_constant 16 is not a multiple of .*rate 12"),
        ({"batch": 0}, "batch_size_per_gpu is 0"),
    ],
)
def test_settings_must_fit_each_other(change, says):
    with pytest.raises(ValueError, match=says):
        cropped(Path(), {"fpath_img": "a", "width": 4, "height": 3}, **change)


def test_a_crop_size_that_cannot_be_is_refused_with_the_configuration():
    opts = ["DATASET.batching", "crop", "DATASET.crop_size", "(321, 320)"]
    with pytest.raises(ValueError, match=r"crop_size is \[321, 320\].*such as \[328, 320\]"):
        read_config(None, opts)
    opts[-1] = "(320, 320)"
    assert read_config(None, opts).DATASET.crop_size == [320, 320]


# ------------------------------------------------------------------------------ odd samples
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (900, 1), (2, 999)])
@pytest.mark.parametrize("changes", [{}, {"batching": "aspect"}, {"random_rotation": 180.0}])
def test_images_of_one_row_or_column(tmp_path, size, changes):
    settings = {"imgSizes": [48, 300], "color_jitter": 0.5, "segm_downsampling_rate": 8, **changes}
    data = cropped(tmp_path, write(tmp_path, "thin", size), normalized=True, **settings)
    for index in range(4):
        batch = data[index]
        assert batch["img_data"].shape == (1, 3, 32, 48) and batch["img_data"].isfinite().all()
        assert batch["seg_label"].shape == (1, 4, 6)


@pytest.mark.parametrize("batching", ["aspect", "crop"])
def test_samples_without_a_label_have_no_loss(samples, batching):
    record = samples.write("void", (60, 60))
    put(samples.root / record["fpath_segm"], np.zeros((60, 60), np.uint8))
    label = cropped(samples.root, record, batching=batching)[0]["seg_label"]
    assert (label == -1).all()
    for loss in ("nll", "smooth", "focal", "ohem", "nll+0.5*dice", "lovasz"):
        scores = torch.randn(1, 3, *label.shape[1:], requires_grad=True)
        value = build_loss(loss, 3)(scores.log_softmax(1), label)
        value.backward()
        assert value.item() == 0 and scores.grad is not None and not scores.grad.any()
