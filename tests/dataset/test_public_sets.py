"""Public data sets of several kinds of files, each on a tree made here in its native layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from dataset_files import config, named, put, put_image, row, stems

from mit_semseg.dataset import (
    FORMATS,
    TrainDataset,
    build_split,
    check_sample,
    class_table,
    load_mask,
)
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.engine.launch import read_config
from mit_semseg.models import ModelBuilder


# ------------------------------------------------------------------------------ VOC with SBD
@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """VOC train a, b and val c, d; SBD train b, c, e and val d, f."""
    for base in ("VOC2012", "benchmark_RELEASE/dataset"):
        (tmp_path / base).mkdir(parents=True)
    lists = tmp_path / "VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\nd\n")
    for name in "abcd":
        put_image(tmp_path / f"VOC2012/JPEGImages/{name}.jpg", 4)
        put(tmp_path / f"VOC2012/SegmentationClass/{name}.png", row(0, 1, 20, 255))
    sbd = tmp_path / "benchmark_RELEASE/dataset"
    (sbd / "train.txt").write_text("b\nc\ne\n")
    (sbd / "val.txt").write_text("d\nf\n")
    (sbd / "cls").mkdir()
    for name in "bcdef":
        put_image(sbd / f"img/{name}.jpg", 4)
        classes = {"Segmentation": row(0, 15, 20, 20), "CategoriesPresent": row(15, 20)}
        scipy.io.savemat(sbd / f"cls/{name}.mat", {"GTcls": classes}, do_compression=True)
    return tmp_path


def test_voc_with_sbd(voc: Path) -> None:
    cfg = config("vocaug", voc, 21)
    train = build_split(cfg, "train")
    assert stems(train) == ["a", "b", "e", "f"]  # nothing of VOC's val
    border = ["background", "aeroplane", "tvmonitor", "-"]
    assert named(train, 1) == border  # VOC's own mask, where there is one
    assert named(train, 2) == ["background", "person", "tvmonitor", "tvmonitor"]
    val = build_split(cfg, "val")
    assert stems(val) == ["c", "d"] and named(val) == border
    assert check_sample(train) == []
    report = check(train.records, label_map=train.label_map, classes=train.classes, progress=False)
    assert report["ok"] and report["mask_modes"] == {"L": 2, "MATLAB": 2}


@pytest.mark.parametrize("part", ["img", "cls", "train.txt", "val.txt"])
def test_sbd_names_what_is_missing(voc: Path, part: str) -> None:
    gone = voc / "benchmark_RELEASE/dataset" / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected benchmark_RELEASE/dataset/{part}"):
        build_split(config("vocaug", voc, 21), "train")
    (voc / "VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Segmentation/val\.txt"):
        build_split(config("vocaug", voc, 21), "train")


def test_matlab_files_in_capitals(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "x.mat", {"GTcls": {"Segmentation": row(0, 15)}})
    (tmp_path / "x.mat").rename(tmp_path / "X.MAT")
    assert load_mask(tmp_path / "X.MAT").tolist() == [[0, 15]]


def test_bad_matlab_files_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.mat"
    with pytest.raises(FileNotFoundError, match=r"x\.mat: no such file"):
        load_mask(file)
    for content in (b"", b"MATLAB 5.0 MAT-file", bytes(200)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.mat: no mask of GTcls\.Segmentation"):
            load_mask(file)
    for wrong in ({"GTinst": 1}, {"GTcls": {"Boundaries": 1}}, {"GTcls": 3}):
        scipy.io.savemat(file, wrong)
        with pytest.raises(ValueError, match=r"x\.mat: no mask of GTcls\.Segmentation") as caught:
            load_mask(file)
        assert "\n" not in str(caught.value)
    scipy.io.savemat(file, {"GTcls": {"Segmentation": np.zeros((2, 3))}})
    with pytest.raises(ValueError, match=r"x\.mat: GTcls\.Segmentation is float64 \(2, 3\)"):
        load_mask(file)


# ------------------------------------------------------------------------------ LIP, SBU, SUN
@pytest.mark.parametrize(
    "places",
    [("", ""), ("TrainVal_images/", "TrainVal_parsing_annotations/")],
)
def test_lip(tmp_path: Path, places: tuple[str, str]) -> None:
    images, labels = places
    put_image(tmp_path / f"{images}train_images/1_2.jpg", 4)
    put(tmp_path / f"{labels}train_segmentations/1_2.png", row(0, 1, 19, 255))
    split = build_split(config("lip", tmp_path, 20), "train")
    assert named(split) == ["background", "hat", "right-shoe", "-"]
    with pytest.raises(FileNotFoundError, match="val_images and val_segmentations"):
        build_split(config("lip", tmp_path, 20), "val")


def test_a_class_table_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no names\.csv or .*; check DATASET\.classes$"):
        class_table(config("odgt", tmp_path, 3, classes="names.csv"))


def test_lips_pairs_are_the_left_and_the_right_of_its_table() -> None:
    names = class_table(config("lip", Path(), 20)).names
    expected = {
        (names.index(name), names.index(name.replace("left", "right")))
        for name in names
        if "left" in name
    }
    assert set(FORMATS.get("lip")().mirror_pairs) == expected and len(expected) == 3
    opts = ["DATASET.format", "lip", "DATASET.num_class", "20", "MODEL.weights_encoder", "none"]
    small = ["MODEL.arch_encoder", "resnet18", "MODEL.arch_decoder", "c1", "MODEL.fc_dim", "512"]
    with torch.device("meta"):
        module = ModelBuilder.from_config(read_config(None, [*opts, *small]))
    assert set(module.mirror_pairs) == expected


@pytest.mark.parametrize("batching", ["aspect", "crop"])
def test_left_is_right_in_mirrored_samples_of_lip(tmp_path: Path, batching: str) -> None:
    """The left arm is bright, the right one dark, and what is void lies in between."""
    stored = np.repeat([14, 14, 255, 255, 15, 15, 0, 18], 2)[None].repeat(16, 0).astype(np.uint8)
    put(tmp_path / "train_segmentations/a.png", stored)
    bright = np.where(stored == 14, 255, np.where(stored == 15, 50, 0)).astype(np.uint8)
    put(tmp_path / "train_images/a.png", np.repeat(bright[:, :, None], 3, 2))
    cfg = config(
        "lip",
        tmp_path,
        20,
        imgSizes=[16],
        padding_constant=16,
        segm_downsampling_rate=1,
        batching=batching,
        crop_size=[16, 16] if batching == "crop" else [],
        scale_jitter=[1.0, 1.0],
        random_rotation=0.0,
        random_blur=0.0,
    )
    split = build_split(cfg, "train")
    data = TrainDataset(tmp_path, split.records, cfg, label_map=split.label_map, normalized=False)
    ways = set()
    for index in range(12):
        batch = data[index]
        pixels, labels = batch["img_data"][0, 0, 0].tolist(), batch["seg_label"][0, 0].tolist()
        mirrored = pixels != bright[0].tolist()
        if mirrored:
            assert pixels == bright[0, ::-1].tolist()
            assert labels == [19] * 2 + [0] * 2 + [14] * 4 + [-1] * 4 + [15] * 4
        else:
            assert labels == [14] * 4 + [-1] * 4 + [15] * 4 + [0] * 2 + [18] * 2
        ways.add(mirrored)
    assert ways == {True, False}


@pytest.mark.parametrize("base", ["", "SBU-shadow/"])
def test_sbu(tmp_path: Path, base: str) -> None:
    folder = tmp_path / f"{base}SBU-Test"
    put_image(folder / "ShadowImages/a.jpg", 3)
    put(folder / "ShadowMasks/a.png", row(0, 255, 255))
    split = build_split(config("sbu", tmp_path, 2), "val")
    assert named(split) == ["lit", "shadow", "shadow"]
    assert check_sample(split) == []  # of 0 and 255, as it should be
    put(folder / "ShadowMasks/a.png", row(0, 255, 128))
    with pytest.raises(ValueError, match=r"a\.png: label 128 is outside 0, 255"):
        named(split)
    with pytest.raises(FileNotFoundError, match="SBUTrain4KRecoveredSmall/ShadowImages"):
        build_split(config("sbu", tmp_path, 2), "train")


def sun_tree(root: Path) -> None:
    """Two frames to train on, the second of them without depth, and one to test."""
    for number, name in ((1, "c"), (5051, "a"), (5052, "b")):
        put_image(root / f"SUNRGBD/kv1/{name}/image/{name}.jpg", 3)
        put(root / f"sunrgbd_train_test_labels/img-{number:06d}.png", row(0, 1, 37))
    for folder in ("depth", "depth_bfx"):
        put(root / f"SUNRGBD/kv1/a/{folder}/a_abs.png", np.array([[0, 8000, 16008]], np.uint16))
    (root / "sunrgbd_training_images.txt").write_text(
        "SUNRGBD/kv1/a/image/a.jpg\nSUNRGBD/kv1/b/image/b.jpg\n"
    )
    (root / "sunrgbd_testing_images.txt").write_text("SUNRGBD/kv1/c/image/c.jpg\n")


def test_sunrgbd(tmp_path: Path) -> None:
    sun_tree(tmp_path)
    cfg = config("sunrgbd", tmp_path, 37)
    train, val = build_split(cfg, "train"), build_split(cfg, "val")
    assert stems(train) == ["a", "b"] and stems(val) == ["c"]
    masks = [Path(r["fpath_segm"]).stem for r in (*train.records, *val.records)]
    assert masks == ["img-005051", "img-005052", "img-000001"]
    assert named(train) == ["-", "wall", "bag"]
    assert all("fpath_depth" not in record for record in train.records)  # not asked for
    cfg.depth = True
    with pytest.raises(FileNotFoundError, match=r"kv1/b: no depth, .* in depth_bfx or depth; unp"):
        build_split(cfg, "train")
    put(tmp_path / "SUNRGBD/kv1/b/depth/x.png", np.array([[0, 8, 8]], np.uint16))
    depths = [Path(r["fpath_depth"]) for r in build_split(cfg, "train").records]
    # Where holes are filled comes first.
    assert [(path.parent.name, path.name) for path in depths] == [
        ("depth_bfx", "a_abs.png"), ("depth", "x.png"),
    ]  # fmt: skip


def test_sunrgbd_says_what_is_missing(tmp_path: Path) -> None:
    cfg = config("sunrgbd", tmp_path, 37)
    with pytest.raises(FileNotFoundError, match=r"expected sunrgbd_training_images\.txt"):
        build_split(cfg, "train")
    sun_tree(tmp_path)
    listing = tmp_path / "sunrgbd_training_images.txt"
    listing.write_text(listing.read_text() + "\n\n")  # blank lines count nothing
    assert stems(build_split(cfg, "train")) == ["a", "b"]
    with pytest.raises(ValueError, match="has the splits train, val, test, not 'nyu'"):
        build_split(config("sunrgbd", tmp_path, 37, list_train="nyu"), "train")
    shutil.rmtree(tmp_path / "sunrgbd_train_test_labels")
    with pytest.raises(FileNotFoundError, match=r"expected sunrgbd_train_test_labels/img-000001"):
        build_split(cfg, "train")


def test_label_maps_are_whole() -> None:
    """Every class is stored as one value."""
    for name in ("vocaug", "coco", "coco_panoptic", "lip", "sbu", "sunrgbd"):
        data = FORMATS.get(name)()
        options = SimpleNamespace(num_class=data.num_class)
        mapping: LabelMap = data.label_map([], options)
        classes = [k for k in mapping.values.values() if k >= 0]
        assert sorted(classes) == list(range(data.num_class))
