"""Depth as a fourth channel: how it is read, and that it stays with the pixels it belongs to."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dataset_files import options, put, row
from PIL import Image

from mit_semseg.cli import main
from mit_semseg.config import dump_config, load_config, load_options
from mit_semseg.dataset import TestDataset, TrainDataset, ValDataset, build_split, check_sample
from mit_semseg.dataset.images import load_depth
from mit_semseg.dataset.records import find_depth, is_depth, read_odgt, write_odgt
from mit_semseg.dataset.split import check_depth
from mit_semseg.dataset.transforms import normalize_depth, resize_depth

MEAN, STD = 2.0, 0.5
DEEP = {"imgSizes": [32], "depth": True, "depth_mean": MEAN, "depth_std": STD}
MILLIMETRES = [0, 1, 1430, 7999, 8191, 8192, 65535]
# Rotated left by three bits of sixteen, one by one, as SUN RGB-D stores them.
ROTATED = [int(f"{mm:016b}"[3:] + f"{mm:016b}"[:3], 2) for mm in MILLIMETRES]


# ------------------------------------------------------------------------------ reading
@pytest.mark.parametrize(
    ("name", "stored", "scale", "metres"),
    [
        ("d.png", np.array([0, 1, 1500, 65535], np.uint16), 1000.0, [0, 0.001, 1.5, 65.535]),
        ("d.png", np.array([0, 1500], np.uint16), 256, [0, 1500 / 256]),
        ("d.png", np.array([0, 51], np.uint8), 51.0, [0, 1]),
        ("d.tif", np.array([np.nan, -1, np.inf, 2.5], np.float32), 1, [0, 0, 0, 2.5]),
        ("d.png", np.array(ROTATED, np.uint16), "sunrgbd", [min(m / 1000, 8) for m in MILLIMETRES]),
    ],
)
def test_stored_units(tmp_path, name, stored, scale, metres):
    assert ROTATED[:3] == [0, 8, 11440]  # the least of a real frame is stored as 11440
    put(tmp_path / name, stored[None])
    depth = load_depth(tmp_path / name, scale)
    assert depth.dtype == np.float32 and depth[0].tolist() == pytest.approx(metres)


@pytest.mark.parametrize(
    ("name", "mode", "scale", "message"),
    [
        ("d.jpg", "L", 1000.0, "a JPEG has altered depths"),
        ("d.png", "RGB", 1000.0, "a depth image cannot have mode RGB"),
        ("d.png", "L", "sunrgbd", "depth_scale sunrgbd is for images of 16 bits"),
    ],
)
def test_invalid_depth_images(tmp_path, name, mode, scale, message):
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"d\.\w+: .*{message}"):
        load_depth(tmp_path / name, scale)
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        load_depth(tmp_path / "gone.png", scale)


@pytest.mark.parametrize("size", [(17, 11), (80, 64), (40, 30), (9, 60)])
def test_resized_as_pillow_does_it_and_holes_stay_holes(size):
    depth = np.random.default_rng(0).uniform(0.5, 8, (30, 40)).astype(np.float32)
    expected = np.asarray(Image.fromarray(depth).resize(size, Image.Resampling.BILINEAR))
    assert np.abs(resize_depth(depth, size) - expected).max() < 1e-4
    depth[:] = 2.5
    depth[5:20, 10:30] = 0
    resized = resize_depth(depth, size)
    there = resized > 0
    assert np.allclose(resized[there], 2.5, atol=1e-5)  # bent by no hole
    assert there.mean() == pytest.approx((depth > 0).mean(), abs=0.05)
    assert not resize_depth(np.zeros((30, 40), np.float32), size).any()
    opt = SimpleNamespace(depth_mean=MEAN, depth_std=STD)
    assert normalize_depth(row(0, 1, 2, 3).astype(np.float32), opt).tolist() == [[0, -2, 0, 2]]


# ------------------------------------------------------------------------------ samples
SIZES = [(40, 32), (32, 40), (48, 32)]  # (width, height)


@pytest.fixture
def root(tmp_path):
    """Images whose green channel says what their depth is: green decimetres, 0 for none."""
    rng = np.random.default_rng(0)
    records = []
    for k, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 81, (height, width, 3), dtype=np.uint8)
        pixels[rng.random((height, width)) < 0.2] = 0
        files = {
            "fpath_img": pixels,
            "fpath_segm": rng.integers(0, 4, (height, width), dtype=np.uint8),
            "fpath_depth": pixels[:, :, 1].astype(np.uint16) * 100,
        }
        for key, array in files.items():
            put(tmp_path / key / f"{k}.png", array)
        paths = {key: f"{key}/{k}.png" for key in files}
        records.append({"width": width, "height": height, **paths})
    write_odgt(tmp_path / "list.odgt", records)
    return tmp_path


def check_batch(images, sizes=None):
    """Depth lies where the green channel says, and is 0 beyond the images."""
    assert images.dtype == torch.float32 and images.shape[1] == 4
    metres = torch.round((images[:, 1] * 0.224 + 0.456) * 255) / 10
    expected = torch.where(metres > 0, (metres - MEAN) / STD, torch.zeros(()))
    for k, (h, w) in enumerate([] if sizes is None else sizes.tolist()):
        assert not images[k, :, h:].any() and not images[k, :, :, w:].any()
        expected[k, h:] = expected[k, :, w:] = 0
    assert (images[:, 3] - expected).abs().max() < 1e-4
    assert (images[:, 3] != 0).any()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("crop", [(), (24, 24)])
def test_training_keeps_depth_with_its_pixels(root, normalized, crop):
    deep = options(**DEEP, crop_size=crop)
    data = TrainDataset(root, "list.odgt", deep, 2, normalized=normalized)
    plain = TrainDataset(root, "list.odgt", options(imgSizes=[32], crop_size=crop), 2)
    padded = False
    for index in range(8):  # flipped and not, cropped here and there
        batch, flat = data[index], plain[index]
        assert "img_size" not in batch
        assert torch.equal(batch["img_data"][:, :3], flat["img_data"])
        assert torch.equal(batch["seg_label"], flat["seg_label"])
        # None is resized.
        sizes = [crop or SIZES[int(Path(name).stem)][::-1] for name in batch["info"]]
        check_batch(batch["img_data"], torch.tensor(sizes))
        padded |= len(set(sizes)) > 1
    assert padded or crop


def test_validation_and_prediction_keep_depth_with_its_pixels(root):
    records = read_odgt(root / "list.odgt")
    for k in range(len(SIZES)):
        sample = ValDataset(root, records, options(**DEEP), normalized=False)[k]
        check_batch(sample["img_data"][0])
        assert sample["img_ori"].shape[2] == 3
    record = {key: str(root / records[0][key]) for key in ("fpath_img", "fpath_depth")}
    check_batch(TestDataset([record], options(**DEEP))[0]["img_data"][0])
    two = options(**{**DEEP, "imgSizes": [24, 48]})
    several = TestDataset([record], two)[0]["img_data"]
    assert [tuple(x.shape) for x in several] == [(1, 4, 24, 32), (1, 4, 48, 64)]


def test_depth_that_does_not_fit(root, capsys):
    records = read_odgt(root / "list.odgt")
    opt = options(**DEEP, root_dataset=str(root), list_train="list.odgt")
    split = build_split(opt, "train")
    assert check_sample(split) == []
    # `data check` reads the depth of a recipe as well.
    opts = ["DATASET.root_dataset", str(root), "DATASET.list_train", str(root / "list.odgt")]
    opts += ["DATASET.num_class", "3", "DATASET.depth", "True", "MODEL.in_channels", "4"]
    dump_config(load_config(None, opts), root / "depth.yaml")
    words = ["data", "check", "train", "--cfg", str(root / "depth.yaml")]
    assert main(words) == 0
    Image.new("I;16", (7, 5)).save(root / "fpath_depth/1.png")
    (root / "fpath_depth/2.png").rename(root / "2.png")
    capsys.readouterr()
    assert main(words) == 1
    output = capsys.readouterr().out
    assert all(str(root / f"fpath_depth/{k}.png") in output for k in (1, 2))
    (root / "2.png").rename(root / "fpath_depth/2.png")
    for read in (
        lambda: check_sample(split),
        lambda: ValDataset(root, records, opt)[1],
        lambda: [TrainDataset(root, "list.odgt", opt)[k] for k in range(4)],
    ):
        with pytest.raises(ValueError, match=r"1\.png: 7x5 pixels, but its image .* has 32x40"):
            read()
    del records[1]["fpath_depth"]
    with pytest.raises(ValueError, match="the list has no depth; add 'fpath_depth'"):
        ValDataset(root, records, opt)[1]
    write_odgt(root / "list.odgt", records)
    with pytest.raises(
        ValueError, match=r"has no depth for 1 of 3 images, first .*fpath_img/1\.png"
    ):
        build_split(opt, "train")


# ------------------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("opts", "says"),
    [
        ("", ""),
        ("MODEL.in_channels 4 DATASET.depth True", ""),
        ("MODEL.in_channels 4 DATASET.depth True DATASET.format sunrgbd", ""),
        ("DATASET.format sunrgbd", ""),  # in colour alone
        ("DATASET.depth_scale auto", ""),
        ("DATASET.depth_scale 5000", ""),
        ("MODEL.in_channels 4", "in_channels is 4 and DATASET.depth False: set"),
        ("DATASET.depth True", "in_channels is 3 and DATASET.depth True: set .*channels 4"),
        ("MODEL.in_channels 4 DATASET.depth True DATASET.format camvid",
         "format camvid has no depth; formats with depth: .*sunrgbd"),
        ("DATASET.depth_scale mm", "DATASET.depth_scale is"),
        ("DATASET.depth_scale -1", "DATASET.depth_scale is"),
        ("DATASET.depth_std 0", "DATASET.depth_std is"),
        ("MODEL.in_channels 5", "in_channels"),
        ("DATASET.depth yes", "DATASET.depth"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(opts, says):
    if not says:
        return check_depth(load_options(None, opts.split()).DATASET)
    with pytest.raises(ValueError, match=says):
        check_depth(load_options(None, opts.split()).DATASET)
    return None


# ------------------------------------------------------------------------------ names
def test_where_depth_is_looked_for(tmp_path, monkeypatch):
    def touch(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    image = touch("frame/image/x.jpg")
    assert find_depth(image) is None
    only = touch("frame/depth/x_abs.png")
    assert find_depth(image) == only
    touch("frame/image/y.jpg")
    assert find_depth(image) is None  # whose would it be?
    order = [touch("frame/depth/x.png"), touch("frame/depth_bfx/x.png")]
    order += [touch("frame/image/x_depth.tif"), touch("frame/image/x_depth.png")]
    for place in reversed(order):
        assert find_depth(image) == place and is_depth(place)
        place.unlink()
    assert is_depth(only) and not is_depth(image)
    # Folders of many images are not read for each of them.
    images = [touch(f"many/image/{k}.jpg") for k in range(50)]
    for k in range(50):
        touch(f"many/depth/of_{k}.png")
    seen = []
    real = os.path.splitext
    monkeypatch.setattr("os.path.splitext", lambda name: seen.append(name) or real(name))
    monkeypatch.setattr("os.listdir", lambda folder: pytest.fail("reads a whole folder"))
    assert [find_depth(image) for image in images] == [None] * 50 and len(seen) <= 50 * 2
