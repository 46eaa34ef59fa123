"""Every format on real files in their native layout, where they are at hand."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dataset_files import config, options
from PIL import Image

from mit_semseg.dataset import (
    TrainDataset,
    ValDataset,
    build_split,
    check_sample,
    coco,
    load_image,
    load_mask,
)
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.coco_panoptic import CLASSES
from mit_semseg.dataset.images import load_depth
from mit_semseg.dataset.loading import load_pair
from mit_semseg.dataset.records import find_depth, is_depth


def areas(split, index=0):
    """Pixels of each class that occurs in a sample."""
    _, ids = load_pair(split.records[index], "", split.label_map)
    counts = np.bincount(ids[ids >= 0], minlength=len(split.classes))
    return {split.classes.names[k]: int(counts[k]) for k in np.flatnonzero(counts)}


def most(split):
    found = areas(split)
    return max(found, key=lambda name: found[name])


def test_camvid(real_data):
    cfg = config("camvid", real_data / "CamVid", 11)
    train, val = build_split(cfg, "train"), build_split(cfg, "val")
    assert (len(train.records), len(val.records)) == (367, 101)
    assert check_sample(train, n=3) == [] and check_sample(val, n=3) == []
    report = check(train.records[::60], label_map=train.label_map, classes=train.classes)
    common = sorted(report["classes"], key=lambda row: -row["pixels"])
    assert {row["name"] for row in common[:3]} == {"road", "building", "sky"}
    opt = options(num_class=11, imgSizes=[180], imgMaxSize=480, segm_downsampling_rate=1)
    batch = TrainDataset("", train.records, opt, 4, label_map=train.label_map)[0]
    assert batch["img_data"].shape == (4, 3, 184, 240)
    label = batch["seg_label"]
    assert (label[:, 180:] == -1).all() and label.max() <= 10 and (label[:, :180] >= 0).any()
    sample = ValDataset("", val.records, opt, label_map=val.label_map)[0]
    assert sample["img_ori"].shape == (360, 480, 3) and sample["seg_label"].shape == (1, 360, 480)


def test_ade20k(real_data):
    split = build_split(config("ade20k", real_data / "ade20k_sample", 150), "train")
    assert len(split.records) == 3 and check_sample(split) == []
    assert most(split) == "road" and "traffic light" in areas(split)
    batch = TrainDataset("", split.records, {}, 3)[0]  # published defaults
    assert batch["img_data"].shape[0] == 3 and batch["seg_label"].max() < 150
    assert [8 * n for n in batch["seg_label"].shape[1:]] == list(batch["img_data"].shape[2:])


def test_cityscapes_both_kinds_of_masks_agree(real_data):
    root = real_data / "cityscapes_sample"
    split = build_split(config("cityscapes", root, 19), "val")
    (record,) = split.records
    (warning,) = check_sample(split)
    assert "the highest class in 1 sampled mask is 13" in warning
    _, ids = load_pair(record, "", split.label_map)
    train_ids = load_mask(record["fpath_segm"].replace("labelIds", "labelTrainIds"))
    # The sample was made smaller, each mask for itself: a few border pixels differ.
    assert np.mean(np.where(train_ids == 255, -1, train_ids) == ids) > 0.995
    path = next(root.rglob("*instanceIds.png"))  # 16 bits
    with Image.open(path) as file:
        assert np.array_equal(load_mask(path), np.array(file, dtype=np.int64))
    assert load_mask(path).max() > 24000


def test_cocostuff(real_data):
    split = build_split(config("cocostuff", real_data / "coco_stuff_sample", 171), "train")
    assert len(split.records) == 13 and check_sample(split, 2) == [] and most(split) == "cat"
    report = check(split.records, label_map=split.label_map, classes=split.classes)
    assert report["ok"] and report["records"] == 13 and report["num_class"] == 171


def test_lip_with_a_grey_image(real_data):
    split = build_split(config("lip", real_data / "lip_sample", 20), "val")
    image, ids = load_pair(split.records[0], "", split.label_map)
    assert image.shape == (377, 130, 3) and (image[..., 0] == image[..., 2]).all()
    assert set(np.unique(ids).tolist()) == {0, 1, 5, 9, 13, 15}


def test_coco_panoptic(real_data, tmp_path):
    root = tmp_path / "sample"
    shutil.copytree(real_data / "coco_panoptic_sample", root, copy_function=shutil.copyfile)
    for folder in (root, *root.iterdir()):
        if folder.is_dir():
            folder.chmod(0o755)
    split = build_split(config("coco_panoptic", root, 133, list_val="examples"), "val")
    assert len(split.records) == 2 and check_sample(split) == []
    content = json.loads((root / "panoptic_examples.json").read_text())
    listed = {one["id"]: one for one in content["categories"]}
    assert [listed[k]["name"] for k in CLASSES] == list(split.classes.names)
    assert [listed[k]["color"] for k in CLASSES] == split.classes.colors.tolist()
    for index, annotation in enumerate(content["annotations"]):
        expected = Counter()
        for one in annotation["segments_info"]:
            expected[listed[one["category_id"]]["name"]] += one["area"]
        assert areas(split, index) == expected
    picture = root / "panoptic_examples/000000142238.png"
    with pytest.raises(ValueError, match=r"000000142238\.png: a mask of mode RGB"):
        load_mask(picture)

    # The same segments, as compressed run lengths and as colours: nothing overlaps.
    numbers = np.asarray(Image.open(picture)).astype(int) @ [1, 256, 65536]
    drawn = np.zeros(numbers.shape, dtype=np.uint8)
    for one in content["annotations"][0]["segments_info"]:
        stored = coco.IGNORED if one["iscrowd"] else CLASSES[one["category_id"]] + 1
        drawn[numbers == one["id"]] = stored
    content = json.loads((root / "panoptic_coco_detection_format.json").read_text())
    image = next(one for one in content["images"] if one["id"] == 142238)
    objects = [one for one in content["annotations"] if one["image_id"] == 142238]
    categories = {category: k + 1 for category, k in CLASSES.items()}
    assert np.array_equal(coco.draw(image, objects, categories, Path("x.json")), drawn)


def test_sunrgbd_depth(real_data):
    """An office: all depth is between 1.4 and 2.6 m, and holes are filled with the like."""
    frame = real_data / "sunrgbd_sample" / "img_0063"
    depth = find_depth(frame / "image" / "img_0063.jpg")
    assert depth == frame / "depth_bfx" / "img_0063_abs.png"
    filled = load_depth(depth, "sunrgbd")
    raw = load_depth(frame / "depth" / "img_0063_abs.png", "sunrgbd")
    assert filled.shape == load_image(frame / "image" / "img_0063.jpg").shape[:2] == raw.shape
    assert filled.min() > 1.4 and filled.max() < 2.6
    assert 0.3 < np.mean(raw == 0) < 0.35 and raw.max() < 2.6
    there = raw > 0
    assert np.mean(np.abs(filled - raw)[there] < 0.02) > 0.95
    assert is_depth(depth) and not is_depth(frame / "image" / "img_0063.jpg")
