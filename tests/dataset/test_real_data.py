"""Every format on real files in their native layout, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mit_semseg.dataset import TrainDataset, ValDataset, build_split, check_sample, load_mask
from mit_semseg.dataset.base import load_pair
from mit_semseg.dataset.tools import check


def config(name: str, root: Path, num_class: int, **changes: Any) -> SimpleNamespace:
    values = {
        "format": name,
        "root_dataset": str(root),
        "list_train": "./data/training.odgt",
        "list_val": "./data/validation.odgt",
        "num_class": num_class,
    }
    return SimpleNamespace(**{**values, **changes})


def shares(split: Any, index: int = 0) -> dict[str, float]:
    """Share of the labelled pixels of each class that occurs in a sample."""
    _, ids = load_pair(split.records[index], "", split.label_map)
    counts = np.bincount(ids[ids >= 0], minlength=len(split.classes))
    return {
        split.classes.names[k]: counts[k] / counts.sum() for k in np.flatnonzero(counts).tolist()
    }


def test_camvid(real_data: Path) -> None:
    cfg = config("camvid", real_data / "CamVid", 11)
    train, val = build_split(cfg, "train"), build_split(cfg, "val")
    assert (len(train.records), len(val.records)) == (367, 101)
    assert check_sample(train, n=8) == [] and check_sample(val, n=8) == []
    report = check(train.records[::20], label_map=train.label_map, classes=train.classes)
    common = sorted(report["classes"], key=lambda row: -row["pixels"])
    assert {row["name"] for row in common[:3]} == {"road", "building", "sky"}
    opt = SimpleNamespace(
        num_class=11, imgSizes=[180], imgMaxSize=480, padding_constant=8, segm_downsampling_rate=1
    )
    batch = TrainDataset("", train.records, opt, 4, label_map=train.label_map)[0]
    assert batch["img_data"].shape == (4, 3, 184, 240)
    label = batch["seg_label"]
    assert (label[:, 180:] == -1).all() and label.max() <= 10 and (label[:, :180] >= 0).any()
    sample = ValDataset("", val.records, opt, label_map=val.label_map)[0]
    assert sample["img_ori"].shape == (360, 480, 3) and sample["seg_label"].shape == (1, 360, 480)


def test_ade20k(real_data: Path) -> None:
    split = build_split(config("ade20k", real_data / "ade20k_sample", 150), "train")
    assert len(split.records) == 3 and check_sample(split) == []
    street = shares(split)
    assert max(street, key=lambda name: street[name]) == "road" and "traffic light" in street
    data = TrainDataset("", split.records, SimpleNamespace(), 3)  # published defaults
    batch = data[0]
    assert batch["img_data"].shape[0] == 3 and batch["seg_label"].max() < 150
    assert [8 * n for n in batch["seg_label"].shape[1:]] == list(batch["img_data"].shape[2:])


def test_cityscapes_both_kinds_of_masks_agree(real_data: Path) -> None:
    split = build_split(config("cityscapes", real_data / "cityscapes_sample", 19), "val")
    (record,) = split.records
    assert check_sample(split) == []
    _, ids = load_pair(record, "", split.label_map)
    train_ids = load_mask(record["fpath_segm"].replace("labelIds", "labelTrainIds"))
    # The sample was made smaller, each mask for itself: a few border pixels differ.
    assert np.mean(np.where(train_ids == 255, -1, train_ids) == ids) > 0.995


def test_cocostuff(real_data: Path) -> None:
    split = build_split(config("cocostuff", real_data / "coco_stuff_sample", 171), "train")
    assert len(split.records) == 13 and check_sample(split) == []
    first = shares(split)
    assert max(first, key=lambda name: first[name]) == "cat"
    report = check([*split.records], label_map=split.label_map, classes=split.classes)
    assert report["ok"] and report["records"] == 13 and report["num_class"] == 171


def test_lip_as_folders_with_a_grey_image(real_data: Path) -> None:
    folders = "val_images:val_segmentations"
    cfg = config("folder", real_data / "lip_sample", 20, list_val=folders, label_offset=0)
    split = build_split(cfg, "val")
    image, ids = load_pair(split.records[0], "", split.label_map)
    assert image.shape == (377, 130, 3) and (image[..., 0] == image[..., 2]).all()
    assert set(np.unique(ids).tolist()) == {0, 1, 5, 9, 13, 15}


def test_color_coded_masks_are_refused(real_data: Path) -> None:
    path = real_data / "coco_panoptic_sample" / "panoptic_examples" / "000000142238.png"
    with pytest.raises(ValueError, match=r"000000142238\.png: a mask of mode RGB"):
        load_mask(path)


def test_sixteen_bit_values_survive(real_data: Path) -> None:
    path = next((real_data / "cityscapes_sample").rglob("*instanceIds.png"))
    with Image.open(path) as file:
        assert np.array_equal(load_mask(path), np.array(file, dtype=np.int64))
    assert load_mask(path).max() > 24000


def test_the_same_batches_for_any_number_of_workers(real_data: Path) -> None:
    split = build_split(config("camvid", real_data / "CamVid", 11), "train")
    opt = SimpleNamespace(num_class=11, imgSizes=[90, 120], padding_constant=8, crop_size=[80, 96])
    data = TrainDataset("", split.records[:12], opt, 4, label_map=split.label_map)
    loaders = [
        torch.utils.data.DataLoader(data, batch_size=None, sampler=range(6), num_workers=n)
        for n in (0, 2)
    ]
    for alone, shared in zip(*loaders):
        assert alone["info"] == shared["info"]
        assert torch.equal(alone["img_data"], shared["img_data"])
        assert torch.equal(alone["seg_label"], shared["seg_label"])
