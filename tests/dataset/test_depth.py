"""Depth as a fourth channel: how it is read, and that it stays with the pixels it belongs to."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mit_semseg.cli import main
from mit_semseg.config import dump_config, load_config, load_options
from mit_semseg.dataset import TestDataset, TrainDataset, ValDataset, build_split, check_sample
from mit_semseg.dataset.images import load_depth
from mit_semseg.dataset.records import find_depth, is_depth, read_odgt, write_odgt
from mit_semseg.dataset.split import check_depth
from mit_semseg.dataset.transforms import normalize_depth, resize_depth

MEAN, STD = 2.0, 0.5


# ------------------------------------------------------------------------------ reading
def test_stored_units(tmp_path: Path) -> None:
    path = tmp_path / "d.png"
    Image.fromarray(np.array([[0, 1, 1500, 65535]], np.uint16)).save(path)
    assert load_depth(path, 1000.0)[0].tolist() == pytest.approx([0, 0.001, 1.5, 65.535])
    assert load_depth(path, 256)[0, 2] == pytest.approx(1500 / 256)
    Image.fromarray(np.array([[0, 51]], np.uint8)).save(path)
    assert load_depth(path, 51.0).tolist() == [[0, 1]]
    Image.fromarray(np.array([[np.nan, -1, np.inf, 2.5]], np.float32)).save(tmp_path / "d.tif")
    read = load_depth(tmp_path / "d.tif", 1)
    assert read.tolist() == [[0, 0, 0, 2.5]] and read.dtype == np.float32


def test_sunrgbds_rotated_bits(tmp_path: Path) -> None:
    """Millimetres, rotated left by three bits of sixteen, one by one."""
    millimetres = [0, 1, 1430, 7999, 8191, 8192, 65535]
    stored = [int(f"{mm:016b}"[3:] + f"{mm:016b}"[:3], 2) for mm in millimetres]
    assert stored[:3] == [0, 8, 11440]  # the least of a real frame is stored as 11440
    path = tmp_path / "d.png"
    Image.fromarray(np.array([stored], np.uint16)).save(path)
    expected = [min(mm / 1000, 8) for mm in millimetres]
    assert load_depth(path, "sunrgbd")[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "mode", "scale", "message"),
    [
        ("d.jpg", "L", 1000.0, "a JPEG has altered depths"),
        ("d.png", "RGB", 1000.0, "an image of mode RGB is no depth"),
        ("d.png", "L", "sunrgbd", "depth_scale sunrgbd is for images of 16 bits"),
    ],
)
def test_what_is_no_depth(
    tmp_path: Path, name: str, mode: str, scale: float | str, message: str
) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_depth(tmp_path / name, scale)
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        load_depth(tmp_path / "gone.png", scale)


# ------------------------------------------------------------------------------ geometry
@pytest.mark.parametrize("size", [(17, 11), (80, 64), (40, 30), (9, 60)])
def test_resized_as_pillow_does_it(size: tuple[int, int]) -> None:
    depth = np.random.default_rng(0).uniform(0.5, 8, (30, 40)).astype(np.float32)
    expected = np.asarray(Image.fromarray(depth).resize(size, Image.Resampling.BILINEAR))
    assert np.abs(resize_depth(depth, size) - expected).max() < 1e-4


@pytest.mark.parametrize("size", [(17, 11), (80, 64)])
def test_holes_stay_holes_and_bend_nothing(size: tuple[int, int]) -> None:
    depth = np.full((30, 40), 2.5, np.float32)
    depth[5:20, 10:30] = 0
    resized = resize_depth(depth, size)
    there = resized > 0
    assert np.allclose(resized[there], 2.5, atol=1e-5)
    assert there.mean() == pytest.approx((depth > 0).mean(), abs=0.03)
    assert not resize_depth(np.zeros((30, 40), np.float32), size).any()


def test_normalised_where_there_is_depth() -> None:
    opt = SimpleNamespace(depth_mean=MEAN, depth_std=STD)
    depth = np.array([[0, 1, 2, 3]], np.float32)
    assert normalize_depth(depth, opt).tolist() == [[0, -2, 0, 2]]


# ------------------------------------------------------------------------------ samples
SIZES = [(40, 32), (32, 40), (48, 32)]  # (width, height)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images whose green channel says what their depth is: green decimetres, 0 for none."""
    rng = np.random.default_rng(0)
    records: list[Any] = []
    for k, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 81, (height, width, 3), dtype=np.uint8)
        pixels[rng.random((height, width)) < 0.2] = 0
        files = {
            "fpath_img": pixels,
            "fpath_segm": rng.integers(0, 4, (height, width), dtype=np.uint8),
            "fpath_depth": pixels[:, :, 1].astype(np.uint16) * 100,
        }
        records.append({"width": width, "height": height})
        for key, array in files.items():
            (tmp_path / key).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / key / f"{k}.png")
            records[-1][key] = f"{key}/{k}.png"
    write_odgt(tmp_path / "list.odgt", records)
    return tmp_path


def options(**changes: Any) -> SimpleNamespace:
    base = {
        "num_class": 3,
        "imgSizes": [32],
        "imgMaxSize": 64,
        "padding_constant": 8,
        "segm_downsampling_rate": 4,
        "depth": True,
        "depth_mean": MEAN,
        "depth_std": STD,
    }
    return SimpleNamespace(**{**base, **changes})


def check_batch(images: torch.Tensor, sizes: torch.Tensor | None = None) -> None:
    """Depth lies where the green channel says, and is 0 beyond the images."""
    assert images.dtype == torch.float32 and images.shape[1] == 4
    green = images[:, 1] * 0.224 + 0.456
    metres = torch.round(green * 255) / 10
    expected = torch.where(metres > 0, (metres - MEAN) / STD, torch.zeros(()))
    if sizes is not None:
        for k, (h, w) in enumerate(sizes.tolist()):
            assert not images[k, :, h:].any() and not images[k, :, :, w:].any()
            expected[k, h:] = 0
            expected[k, :, w:] = 0
    assert (images[:, 3] - expected).abs().max() < 1e-4
    assert (images[:, 3] != 0).any()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("crop", [(), (24, 24)])
def test_training_keeps_depth_with_its_pixels(
    root: Path, normalized: bool, crop: tuple[int, ...]
) -> None:
    opt = options(crop_size=crop)
    data = TrainDataset(root, "list.odgt", opt, 2, normalized=normalized)
    plain = TrainDataset(root, "list.odgt", options(crop_size=crop, depth=False), 2)
    padded = False
    for index in range(8):  # flipped and not, cropped here and there
        batch, flat = data[index], plain[index]
        assert "img_size" not in batch
        assert torch.equal(batch["img_data"][:, :3], flat["img_data"])
        assert torch.equal(batch["seg_label"], flat["seg_label"])
        sizes = [
            crop or SIZES[int(Path(name).stem)][::-1]  # none is resized
            for name in batch["info"]
        ]
        check_batch(batch["img_data"], torch.tensor(sizes))
        padded |= len(set(sizes)) > 1
    assert padded or crop


def test_validation_and_prediction_keep_depth_with_its_pixels(root: Path) -> None:
    records = read_odgt(root / "list.odgt")
    for k in range(len(SIZES)):
        sample = ValDataset(root, records, options(), normalized=False)[k]
        check_batch(sample["img_data"][0])
        assert sample["img_ori"].shape[2] == 3
    image = str(root / records[0]["fpath_img"])
    depth = str(root / records[0]["fpath_depth"])
    record = {"fpath_img": image, "fpath_depth": depth}
    check_batch(TestDataset([record], options())[0]["img_data"][0])
    several = TestDataset([record], options(imgSizes=[24, 48]))[0]["img_data"]
    assert [tuple(x.shape) for x in several] == [(1, 4, 24, 32), (1, 4, 48, 64)]


def test_depth_that_does_not_fit(root: Path) -> None:
    records = read_odgt(root / "list.odgt")
    cfg = SimpleNamespace(**vars(options()), root_dataset=str(root), list_train="list.odgt")
    split = build_split(cfg, "train")
    assert check_sample(split) == []
    Image.new("I;16", (7, 5)).save(root / "fpath_depth/1.png")
    for read in (
        lambda: check_sample(split),
        lambda: ValDataset(root, records, options())[1],
        lambda: [TrainDataset(root, "list.odgt", options())[k] for k in range(4)],
    ):
        with pytest.raises(ValueError, match=r"1\.png: 7x5 pixels, but its image .* has 32x40"):
            read()
    del records[1]["fpath_depth"]
    with pytest.raises(ValueError, match="the list gives no depth; add 'fpath_depth'"):
        ValDataset(root, records, options())[1]
    write_odgt(root / "list.odgt", records)
    with pytest.raises(ValueError, match=r"gives no depth for 1 of 3 images.*fpath_img/1\.png"):
        build_split(cfg, "train")


def test_data_check_reads_the_depth_of_a_recipe(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = ["DATASET.root_dataset", str(root), "DATASET.list_train", str(root / "list.odgt")]
    opts += ["DATASET.num_class", "3", "DATASET.depth", "True", "MODEL.in_channels", "4"]
    dump_config(load_config(None, opts), tmp_path / "depth.yaml")
    words = ["data", "check", "train", "--cfg", str(tmp_path / "depth.yaml")]
    assert main(words) == 0
    (root / "fpath_depth/1.png").write_bytes(b"broken")
    (root / "fpath_depth/2.png").unlink()
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().out
    assert all(str(root / f"fpath_depth/{k}.png") in said for k in (1, 2))


# ------------------------------------------------------------------------------ settings
def test_channels_and_data_must_agree() -> None:
    def check(*opts: Any) -> None:
        check_depth(load_options(None, list(opts)).DATASET)

    check()
    check("MODEL.in_channels", 4, "DATASET.depth", True)
    check("MODEL.in_channels", 4, "DATASET.depth", True, "DATASET.format", "sunrgbd")
    check("DATASET.format", "sunrgbd")  # in colour alone
    with pytest.raises(ValueError, match="in_channels is 4 and DATASET.depth False: set"):
        check("MODEL.in_channels", 4)
    with pytest.raises(
        ValueError, match="in_channels is 3 and DATASET.depth True: set .*channels 4"
    ):
        check("DATASET.depth", True)
    with pytest.raises(ValueError, match="format camvid has no depth; it is in .*sunrgbd"):
        check("MODEL.in_channels", 4, "DATASET.depth", True, "DATASET.format", "camvid")


def test_settings_are_checked() -> None:
    for value in ("auto", "sunrgbd", 1000.0):
        assert load_config(None, ["DATASET.depth_scale", value]).DATASET.depth_scale == value
    assert load_config(None, ["DATASET.depth_scale", "5000"]).DATASET.depth_scale == 5000
    for key, value in [
        ("DATASET.depth_scale", "mm"), ("DATASET.depth_scale", 0), ("DATASET.depth_scale", True),
        ("DATASET.depth_std", 0), ("MODEL.in_channels", 5), ("DATASET.depth", "yes"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=key):
            load_config(None, [key, value])
    for key, value in [("depth_scale", "mm"), ("depth_scale", -1), ("depth_std", 0)]:
        with pytest.raises(ValueError, match=f"DATASET.{key} is"):
            TestDataset([{"fpath_img": "x"}], SimpleNamespace(**{key: value}))


# ------------------------------------------------------------------------------ names
def test_where_depth_is_looked_for(tmp_path: Path) -> None:
    def touch(name: str) -> Path:
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
    assert find_depth(image) == order[-1]
    for place in reversed(order):
        assert find_depth(image) == place and is_depth(place)
        place.unlink()
    assert is_depth(only) and not is_depth(image)


def test_folders_of_many_images_are_not_read_for_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(50):
        for name in (f"image/{k}.jpg", f"depth/of_{k}.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    seen: list[str] = []
    real = os.path.splitext
    monkeypatch.setattr("os.path.splitext", lambda name: seen.append(name) or real(name))
    monkeypatch.setattr("os.listdir", lambda folder: pytest.fail("reads a whole folder"))
    for k in range(50):
        assert find_depth(tmp_path / f"image/{k}.jpg") is None
    assert len(seen) <= 50 * 2
