"""Every format on a tree made here in its native layout, class tables, and `check_sample`."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from dataset_files import ROOT, config, ids, named, put, put_image, put_pair, row, stems

from mit_semseg.config import DataOptions
from mit_semseg.dataset import (
    FORMATS,
    ClassTable,
    Split,
    TrainDataset,
    build_split,
    check_sample,
    class_table,
    load_mask,
)
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.cityscapes import LABEL_IDS
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.engine.launch import read_config
from mit_semseg.models import ModelBuilder

COUNTS = {
    "ade20k": 150, "camvid": 11, "cityscapes": 19, "coco": 81, "coco_panoptic": 133,
    "cocostuff": 171, "lip": 20, "sbu": 2, "sunrgbd": 37, "voc2012": 21, "vocaug": 21,
}  # fmt: skip
OUTSIDE = {
    "cocostuff": r"label 11 is outside 0\.\.10, 12\.\.24",
    "sbu": "label 11, 128 is outside 0, 255",
}

ADE = {-1: "-", 0: "wall", 12: "person", 149: "flag"}
CITY = {-1: "-", 0: "road", 2: "building", 13: "car", 18: "bicycle"}
LIP = {0: "background", 1: "hat", 19: "right-shoe", -1: "-"}
SBU = {0: "lit", 1: "shadow"}
STUFF = {0: "person", 11: "stop sign", 80: "banner", 145: "sky-other", 170: "wood", -1: "-"}
WHOLE = dict(zip([0, 12, 91, 156, 181, -1], STUFF.values()))  # with its unused ids
VOC = {0: "background", 15: "person", 20: "tvmonitor", -1: "-"}
# What masks store; class ids and names of it; folders, image and mask; what the other split lacks.
LAYOUTS = [
    ("ade20k", [0, 1, 13, 150], ADE, ["", "ADEChallengeData2016/"], "images/training/x.jpg",
     "annotations/training/x.png", "images/validation and annotations/validation"),
    ("cityscapes", [0, 7, 11, 26, 33], CITY, [""], "leftImg8bit/val/ulm/x_leftImg8bit.png",
     "gtFine/val/ulm/x_gtFine_labelIds.png", "leftImg8bit/train"),
    ("cityscapes", [255, 0, 2, 13, 18], CITY, [""], "leftImg8bit/val/ulm/x_leftImg8bit.png",
     "gtFine/val/ulm/x_gtFine_labelTrainIds.png", "leftImg8bit/train"),
    ("cocostuff", [0, 12, 91, 156, 181, 255], STUFF, [""], "images/train2017/x.jpg",
     "annotations/train2017/x.png", "images/val2017"),
    ("cocostuff", [0, 12, 91, 156, 181, 255], WHOLE, [""], "train2017/x.jpg",
     "stuffthingmaps/train2017/x.png", "annotations/val2017"),
    ("cocostuff", [0, 12, 91, 156, 181, 255], WHOLE, [""], "train_img/x.jpg",
     "train_label/x.png", "val2017"),
    ("lip", [0, 1, 19, 255], LIP, [""], "train_images/x.jpg", "train_segmentations/x.png",
     "val_images and val_segmentations"),
    ("lip", [0, 1, 19, 255], LIP, [""], "TrainVal_images/train_images/x.jpg",
     "TrainVal_parsing_annotations/train_segmentations/x.png", "val_images"),
    ("sbu", [0, 255], SBU, ["", "SBU-shadow/"], "SBU-Test/ShadowImages/x.jpg",
     "SBU-Test/ShadowMasks/x.png", "SBUTrain4KRecoveredSmall/ShadowImages"),
    ("voc2012", [0, 15, 20, 255], VOC, ["", "VOCdevkit/VOC2012/"], "JPEGImages/x.jpg",
     "SegmentationClass/x.png", "Segmentation/val.txt"),
    ("voc2012", [0, 15, 20, 255], VOC, [""], "JPEGImages/x.jpg",
     "SegmentationClassAug/x.png", "Segmentation/val.txt"),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}-{layout[4]}")
def test_native_layouts(tmp_path, layout):
    name, stored, classes, bases, image, mask, missing = layout
    cfg = config(name, tmp_path, 182 if classes is WHOLE else COUNTS[name])
    this, other = ("val", "train") if name in ("cityscapes", "sbu") else ("train", "val")
    for base in bases:
        palette = range(767, -1, -1) if name == "voc2012" else ()
        put_pair(tmp_path / base, image, mask, *stored, palette=[v % 251 for v in palette])
        if name == "voc2012":
            names = tmp_path / base / "ImageSets/Segmentation/train.txt"
            names.parent.mkdir(parents=True)
            names.write_text("x\n")
        split = build_split(cfg, this)
        assert ids(split) == list(classes) and named(split) == list(classes.values())
        assert name != "sbu" or check_sample(split) == []  # of 0 and 255, as it should be
        with pytest.raises(FileNotFoundError, match=missing):
            build_split(cfg, other)
        shutil.rmtree(tmp_path)


def test_cityscapes_without_a_mask(tmp_path):
    image = "leftImg8bit/val/ulm/x_leftImg8bit.png"
    put_pair(tmp_path, image, "gtFine/val/ulm/x_gtFine_instanceIds.png", 0)
    with pytest.raises(ValueError, match=r"the first without is ulm/x_leftImg8bit\.png"):
        build_split(config("cityscapes", tmp_path, 19), "val")
    assert sorted(set(LABEL_IDS)) == list(LABEL_IDS) and len(LABEL_IDS) == 19


def test_camvid_understands_the_authors_paths(tmp_path):
    put_pair(tmp_path, "train/a.png", "trainannot/a.png", 0, 8, 11)
    put_pair(tmp_path, "val/b.png", "valannot/b.png", 10, 11, 9)
    (tmp_path / "train.txt").write_text("/CamVid/train/a.png /CamVid/trainannot/a.png\n\n")
    (tmp_path / "val.txt").write_text("val/b.png valannot/b.png\n")
    cfg = config("camvid", tmp_path, 11, list_val=["val", "train"])
    assert named(build_split(cfg, "train")) == ["sky", "car", "-"]
    both = build_split(cfg, "val")
    assert [ids(both, k) for k in (0, 1)] == [[10, -1, 9], [0, 8, -1]]
    # A public set can be narrowed by a list, and ignore more.
    line = '{"fpath_img": "train/a.png", "fpath_segm": "trainannot/a.png"}\n'
    (tmp_path / "part.odgt").write_text(line)
    part = config("camvid", tmp_path, 11, list_train="part.odgt", ignore_label=[8, 200])
    assert ids(build_split(part, "train")) == [0, -1, -1]
    (tmp_path / "train.txt").write_text("a.png\n")
    with pytest.raises(ValueError, match=r"train\.txt:1: 'a\.png' is not 'image mask'"):
        build_split(cfg, "train")
    with pytest.raises(FileNotFoundError, match=r"no CamVid here, expected test\.txt"):
        build_split(config("camvid", tmp_path, 11, list_val="test"), "val")


def test_lists_and_folders(tmp_path, monkeypatch):
    for name, stored in (("a", [0, 1, 4]), ("b", [4, 1, 0])):
        put_pair(tmp_path, f"i/x/{name}.png", f"m/x/{name}.png", *stored)
        line = json.dumps({"fpath_img": f"i/x/{name}.png", "fpath_segm": f"m/x/{name}.png"})
        (tmp_path / f"{name}.odgt").write_text(line + "\n\n")
    monkeypatch.chdir(tmp_path.parent)
    beside = Path(tmp_path.name)
    for name, entry in (("odgt", ["a.odgt", "b.odgt"]), ("folder", "i:m")):
        split = build_split(config(name, beside, 4, list_train=entry), "train")
        assert [ids(split, k) for k in (0, 1)] == [[-1, 0, 3], [3, 0, -1]]
        assert split.classes.names == ("class 0", "class 1", "class 2", "class 3")
    far = config("folder", "", 4, list_train=f"{tmp_path}/i:{tmp_path}/m")
    assert ids(build_split(far, "train")) == [-1, 0, 3]
    cfg = config("odgt", tmp_path, 5, list_val="a.odgt", label_offset=0, ignore_label=4)
    assert ids(build_split(cfg, "val")) == [0, 1, -1]
    with pytest.raises(FileNotFoundError, match=r"validation\.odgt"):
        build_split(config("odgt", tmp_path, 4), "val")
    with pytest.raises(ValueError, match="images_dir:labels_dir"):
        build_split(config("folder", tmp_path, 2, list_train="train/img"), "train")
    with pytest.raises(ValueError, match="unknown data set format 'camvit'; did you mean 'camvid'"):
        class_table(config("camvit", Path(), 11))
    with pytest.raises(ValueError, match="'train' or 'val', not 'test'"):
        build_split(cfg, "test")


# ------------------------------------------------------------------------------ VOC with SBD
@pytest.fixture
def voc(tmp_path):
    """VOC train a, b and val c, d; SBD train b, c, e and val d, f."""
    lists, sbd = tmp_path / "VOC2012/ImageSets/Segmentation", tmp_path / "benchmark_RELEASE/dataset"
    for folder, train, val in ((lists, "ab", "cd"), (sbd, "bce", "df")):
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text("\n".join(train))
        (folder / "val.txt").write_text("\n".join(val))
    for name in "abcd":
        mask = f"SegmentationClass/{name}.png"
        put_pair(tmp_path / "VOC2012", f"JPEGImages/{name}.jpg", mask, 0, 1, 20, 255)
    (sbd / "cls").mkdir()
    for name in "bcdef":
        put_image(sbd / f"img/{name}.jpg", 4)
        classes = {"Segmentation": row(0, 15, 20, 20), "CategoriesPresent": row(15, 20)}
        scipy.io.savemat(sbd / f"cls/{name}.mat", {"GTcls": classes}, do_compression=True)
    return tmp_path


def test_voc_with_sbd(voc):
    cfg = config("vocaug", voc, 21)
    train, val = build_split(cfg, "train"), build_split(cfg, "val")
    assert stems(train) == ["a", "b", "e", "f"]  # nothing of VOC's val
    border = ["background", "aeroplane", "tvmonitor", "-"]
    assert named(train, 1) == border  # VOC's own mask, where there is one
    assert named(train, 2) == ["background", "person", "tvmonitor", "tvmonitor"]
    assert stems(val) == ["c", "d"] and named(val) == border
    assert check_sample(train) == []
    report = check(train.records, label_map=train.label_map, classes=train.classes, progress=False)
    assert report["ok"] and report["mask_modes"] == {"L": 2, "MATLAB": 2}
    for part in ("cls", "img", "val.txt", "train.txt"):
        (voc / "benchmark_RELEASE/dataset" / part).rename(voc / part)
        with pytest.raises(FileNotFoundError, match=f"expected benchmark_RELEASE/dataset/{part}"):
            build_split(cfg, "train")
        (voc / part).rename(voc / "benchmark_RELEASE/dataset" / part)
    (voc / "VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Segmentation/val\.txt"):
        build_split(cfg, "train")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no mask GTcls.Segmentation"),
        (b"MATLAB 5.0 MAT-file", "has no mask GTcls.Segmentation"),
        (bytes(200), "has no mask GTcls.Segmentation"),
        ({"GTinst": 1}, "has no mask GTcls.Segmentation"),
        ({"GTcls": {"Boundaries": 1}}, "has no mask GTcls.Segmentation"),
        ({"GTcls": 3}, "has no mask GTcls.Segmentation"),
        ({"GTcls": {"Segmentation": np.zeros((2, 3))}}, r"GTcls.Segmentation is float64 \(2, 3\)"),
        (None, "no such file"),
    ],
)
def test_bad_matlab_files_are_one_line(tmp_path, content, says):
    file = tmp_path / "X.MAT"
    with open(file, "wb") as stream:
        scipy.io.savemat(stream, {"GTcls": {"Segmentation": row(0, 15)}})
    assert load_mask(file).tolist() == [[0, 15]]
    if isinstance(content, dict):
        with open(file, "wb") as stream:
            scipy.io.savemat(stream, content)
    elif content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"X\.MAT: {says}") as caught:
        load_mask(file)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ LIP, SUN RGB-D
def test_mirror_pairs_of_lip():
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
def test_mirrored_samples_of_lip_swap_left_and_right(tmp_path, batching):
    """The left arm is bright, the right one dark, and what is void lies in between."""
    stored = np.repeat([14, 14, 255, 255, 15, 15, 0, 18], 2)[None].repeat(16, 0).astype(np.uint8)
    put(tmp_path / "train_segmentations/a.png", stored)
    bright = np.where(stored == 14, 255, np.where(stored == 15, 50, 0)).astype(np.uint8)
    put(tmp_path / "train_images/a.png", np.repeat(bright[:, :, None], 3, 2))
    cfg = config(
        "lip", tmp_path, 20, imgSizes=[16], padding_constant=16, segm_downsampling_rate=1,
        batching=batching, crop_size=[16, 16] if batching == "crop" else [],
        scale_jitter=[1.0, 1.0], random_rotation=0.0, random_blur=0.0,
    )  # fmt: skip
    split = build_split(cfg, "train")
    data = TrainDataset(tmp_path, split.records, cfg, label_map=split.label_map, normalized=False)
    ways = set()
    for batch in map(data.__getitem__, range(12)):
        pixels, labels = batch["img_data"][0, 0, 0].tolist(), batch["seg_label"][0, 0].tolist()
        mirrored = pixels != bright[0].tolist()
        if mirrored:
            assert pixels == bright[0, ::-1].tolist()
            assert labels == [19] * 2 + [0] * 2 + [14] * 4 + [-1] * 4 + [15] * 4
        else:
            assert labels == [14] * 4 + [-1] * 4 + [15] * 4 + [0] * 2 + [18] * 2
        ways.add(mirrored)
    assert ways == {True, False}


def test_sunrgbd(tmp_path):
    """Two frames to train on, the second of them at first without depth, and one to test."""
    cfg, labels = config("sunrgbd", tmp_path, 37), tmp_path / "sunrgbd_train_test_labels"
    with pytest.raises(FileNotFoundError, match=r"expected sunrgbd_training_images\.txt"):
        build_split(cfg, "train")
    for number, name in ((1, "c"), (5051, "a"), (5052, "b")):
        put_image(tmp_path / f"SUNRGBD/kv1/{name}/image/{name}.jpg", 3)
        put(labels / f"img-{number:06d}.png", row(0, 1, 37))
    for folder in ("depth", "depth_bfx"):
        put(tmp_path / f"SUNRGBD/kv1/a/{folder}/a_abs.png", row(0, 8, 16).astype(np.uint16))
    for part, frames in (("training", "a b"), ("testing", "c")):  # blank lines count nothing
        lines = [f"SUNRGBD/kv1/{name}/image/{name}.jpg" for name in frames.split()]
        (tmp_path / f"sunrgbd_{part}_images.txt").write_text("\n".join([*lines, "", ""]))
    train, val = build_split(cfg, "train"), build_split(cfg, "val")
    assert stems(train) == ["a", "b"] and stems(val) == ["c"]
    masks = [Path(r["fpath_segm"]).stem for r in (*train.records, *val.records)]
    assert masks == ["img-005051", "img-005052", "img-000001"]
    assert named(train) == ["-", "wall", "bag"]
    assert all("fpath_depth" not in record for record in train.records)  # not asked for
    cfg.depth = True
    with pytest.raises(FileNotFoundError, match=r"kv1/b: no depth, .* in depth_bfx or depth; unp"):
        build_split(cfg, "train")
    put(tmp_path / "SUNRGBD/kv1/b/depth/x.png", row(0, 8, 8).astype(np.uint16))
    depths = [Path(r["fpath_depth"]) for r in build_split(cfg, "train").records]
    # Where holes are filled comes first.
    assert ["/".join(path.parts[-2:]) for path in depths] == ["depth_bfx/a_abs.png", "depth/x.png"]
    with pytest.raises(ValueError, match="has the splits train, val, test, not 'nyu'"):
        build_split(config("sunrgbd", tmp_path, 37, list_train="nyu"), "train")
    labels.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"expected sunrgbd_train_test_labels/img-000001"):
        build_split(cfg, "train")


# ------------------------------------------------------------------------------ class tables
@pytest.mark.parametrize("name", COUNTS)
def test_tables(name):
    table, data = class_table(config(name, Path(), COUNTS[name])), FORMATS.get(name)()
    assert len(table) == len(set(table.names)) == data.num_class == COUNTS[name]
    assert table.colors.dtype == np.uint8
    if name != "ade20k":  # some of its published colours are equal
        assert len(np.unique(table.colors, axis=0)) == len(table)
    mapping = data.label_map([], DataOptions(num_class=len(table)))
    assert {*mapping.values.values()} - {-1} == {*range(len(table))}
    if name in OUTSIDE:
        with pytest.raises(ValueError, match=OUTSIDE[name]):
            mapping(row(11, 128))
    with pytest.raises(ValueError, match=r"num_class is 7.* set DATASET.num_class \d+"):
        class_table(config(name, Path(), 7))


def test_own_class_table(tmp_path):
    (tmp_path / "c.csv").write_text("Idx,Name,R,G,B\n1,cat,1,2,3\n2,dog,4,5,6\n")
    table = class_table(config("odgt", tmp_path, 2, classes="c.csv"))
    assert table.names == ("cat", "dog") and table.colors[1].tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match=r"c\.csv has 2 classes, but DATASET.num_class is 3"):
        class_table(config("odgt", tmp_path, 3, classes="c.csv"))
    with pytest.raises(FileNotFoundError, match=r"no names\.csv or .*; check DATASET\.classes$"):
        class_table(config("odgt", tmp_path, 3, classes="names.csv"))


def test_ade20k_table_agrees_with_the_published_files():
    """Names: the first of each row, or the words of it that the published file broke up."""
    table = class_table(config("odgt", Path(), 150))
    with open(ROOT / "data/object150_info.csv", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [line["Idx"] for line in rows] == [str(k) for k in range(1, 151)]
    for name, line in zip(table.names, rows):
        words = name.split(" ")
        assert line["Name"].split(";")[: len(words)] == words
    colors = scipy.io.loadmat(ROOT / "data/color150.mat")["colors"]
    assert np.array_equal(colors, table.colors) and colors.dtype == np.uint8
    assert colors[:3].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230]]


def test_vocs_palette_is_that_of_its_masks():
    """The bits of a class in threes, from the highest bit of red, green and blue down."""
    colors = class_table(config("voc2012", Path(), 21)).colors
    for k, color in enumerate(colors.tolist()):
        expected = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                expected[channel] |= ((k >> (3 * place + channel)) & 1) << (7 - place)
        assert color == expected


# ------------------------------------------------------------------------------ check_sample
ONE = "all labelled pixels in 1 sampled mask are of one class out of 2"


def sample(root, label_map, *stored):
    put_pair(root, "a.jpg", "a.png", *stored)
    record = {"fpath_img": str(root / "a.jpg"), "fpath_segm": str(root / "a.png")}
    return Split([record], class_table(config("odgt", Path(), 2)), label_map)


@pytest.mark.parametrize(
    ("stored", "label_map", "warnings"),
    [
        ([0, 1, 2], LabelMap.shifted(2), []),
        ([0, 255], LabelMap({0: 0, 255: 1}, 2), []),
        ([0] * 49 + [1], LabelMap.shifted(2), ["98 % of pixels are ignored", ONE]),
        # 0 and 1 under the published offset: 0 is nothing, and 1 the first class.
        ([0, 1], LabelMap.shifted(2), [f"{ONE}, class 0; check DATASET.label_map"]),
        (
            [0, 255],
            LabelMap.shifted(2, 0, [255]),
            [r"only 0 and 255 occur in 1 .*and one is ignored: .*\[\[0, 0\], \[255, 1\]\]"],
        ),
    ],
)
def test_check_sample_warns_of_what_looks_wrong(tmp_path, caplog, stored, label_map, warnings):
    found = check_sample(sample(tmp_path, label_map, *stored))
    assert len(found) == len(warnings) and caplog.messages == found
    for line, pattern in zip(found, warnings):
        assert re.search(pattern, line), line


@pytest.mark.parametrize(
    ("num_class", "labels", "warns"),
    [(4, [0, 1, 2], True), (4, [0, 3], False), (5, [0, 1, 2, 3], False), (150, [0, 7, 111], True)],
)
def test_check_sample_warns_of_too_many_classes(tmp_path, num_class, labels, warns):
    split = sample(tmp_path, LabelMap.shifted(num_class, 0), *labels)
    split = Split(split.records, ClassTable.numbered(num_class), split.label_map)
    message = (
        f"the highest class in 1 sampled mask is {max(labels)}, but DATASET.num_class is "
        f"{num_class}; check DATASET.num_class"
    )
    assert check_sample(split) == ([message] if warns else [])


def test_check_sample_stops_at_a_bad_sample_or_warns_of_it(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: label 9 is outside 0\.\.2; set DATASET"):
        check_sample(sample(tmp_path, LabelMap.shifted(2), 0, 1, 9))
    split = sample(tmp_path, LabelMap.shifted(2), 0, 1, 2)
    bad = split.records[0].copy()
    bad["fpath_segm"] = str(tmp_path / "gone.png")
    both = Split([*split.records, bad], split.classes, split.label_map)
    (warning,) = check_sample(both, on_error="skip")
    assert "gone.png" in warning
    for records, on_error in ((both.records, "stop"), ([bad], "skip")):  # nothing usable at all
        with pytest.raises(FileNotFoundError, match=r"gone\.png"):
            check_sample(Split(records, split.classes, split.label_map), on_error=on_error)
