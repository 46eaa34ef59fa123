"""Every format on a tree made here in its native layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from dataset_files import config, named
from PIL import Image

from mit_semseg.dataset import FORMATS, build_split, check_sample, class_table
from mit_semseg.dataset.cityscapes import LABEL_IDS
from mit_semseg.dataset.cocostuff import UNUSED
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.loading import load_pair
from mit_semseg.dataset.split import Split

DATA = Path(__file__).parents[2] / "data"


def put(root: Path, image: str, mask: str, stored: list[int], palette: bool = False) -> None:
    """An image and a mask of one row, in their folders."""
    for name in (image, mask):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (len(stored), 1)).save(root / image)
    array = Image.fromarray(np.array([stored], np.uint8))
    if palette:
        array.putpalette([value % 251 for value in range(768)])
    array.save(root / mask)


def labels(split: Split, index: int = 0) -> list[int]:
    """Class ids of one sample."""
    _, ids = load_pair(split.records[index], "", split.label_map)
    return ids[0].tolist()


def test_odgt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "i/a.png", "m/a.png", [0, 1, 4])
    put(tmp_path, "i/b.png", "m/b.png", [4, 1, 0])
    for name in "ab":
        line = json.dumps({"fpath_img": f"i/{name}.png", "fpath_segm": f"m/{name}.png"})
        (tmp_path / f"{name}.odgt").write_text(line + "\n\n")
    monkeypatch.chdir(tmp_path.parent)
    cfg = config("odgt", Path(tmp_path.name), 4, list_train=["a.odgt", "b.odgt"])
    split = build_split(cfg, "train")
    assert [labels(split, k) for k in (0, 1)] == [[-1, 0, 3], [3, 0, -1]]
    assert split.classes.names == ("class 0", "class 1", "class 2", "class 3")
    cfg = config("odgt", tmp_path, 5, list_val="a.odgt", label_offset=0, ignore_label=4)
    assert labels(build_split(cfg, "val")) == [0, 1, -1]
    with pytest.raises(FileNotFoundError, match=r"validation\.odgt"):
        build_split(config("odgt", tmp_path, 4), "val")


def test_folder(tmp_path: Path) -> None:
    put(tmp_path, "train/img/x/a.png", "train/seg/x/a.png", [1, 2])
    cfg = config("folder", tmp_path, 2, list_train="train/img:train/seg")
    assert labels(build_split(cfg, "train")) == [0, 1]
    cfg.list_train = f"{tmp_path}/train/img:{tmp_path}/train/seg"
    cfg.root_dataset = ""
    assert labels(build_split(cfg, "train")) == [0, 1]
    with pytest.raises(ValueError, match="images_dir:labels_dir"):
        build_split(config("folder", tmp_path, 2, list_train="train/img"), "train")


@pytest.mark.parametrize("base", ["", "ADEChallengeData2016/"])
def test_ade20k(tmp_path: Path, base: str) -> None:
    put(
        tmp_path,
        f"{base}images/training/ADE_train_1.jpg",
        f"{base}annotations/training/ADE_train_1.png",
        [0, 1, 13, 150],
    )
    split = build_split(config("ade20k", tmp_path, 150), "train")
    assert labels(split) == [-1, 0, 12, 149]
    assert named(split) == ["-", "wall", "person", "flag"]
    with pytest.raises(FileNotFoundError, match="images/validation and annotations/validation"):
        build_split(config("ade20k", tmp_path, 150), "val")


def test_camvid_understands_the_authors_paths(tmp_path: Path) -> None:
    put(tmp_path, "train/a.png", "trainannot/a.png", [0, 8, 11])
    put(tmp_path, "val/b.png", "valannot/b.png", [10, 11, 9])
    (tmp_path / "train.txt").write_text(
        "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n\n"
    )
    (tmp_path / "val.txt").write_text("val/b.png valannot/b.png\n")
    cfg = config("camvid", tmp_path, 11, list_val=["val", "train"])
    split = build_split(cfg, "train")
    assert labels(split) == [0, 8, -1] and named(split) == ["sky", "car", "-"]
    both = build_split(cfg, "val")
    assert [labels(both, k) for k in (0, 1)] == [[10, -1, 9], [0, 8, -1]]
    (tmp_path / "train.txt").write_text("a.png\n")
    with pytest.raises(ValueError, match=r"train\.txt:1: 'a\.png' is not 'image mask'"):
        build_split(cfg, "train")
    with pytest.raises(FileNotFoundError, match=r"no CamVid here, expected test\.txt"):
        build_split(config("camvid", tmp_path, 11, list_val="test"), "val")


def test_a_public_set_can_be_narrowed_by_a_list_and_ignore_more(tmp_path: Path) -> None:
    put(tmp_path, "train/a.png", "trainannot/a.png", [0, 8, 11])
    line = '{"fpath_img": "train/a.png", "fpath_segm": "trainannot/a.png"}\n'
    (tmp_path / "part.odgt").write_text(line)
    cfg = config("camvid", tmp_path, 11, list_train="part.odgt", ignore_label=[8, 200])
    assert labels(build_split(cfg, "train")) == [0, -1, -1]


def test_cityscapes_label_ids_and_train_ids_mean_the_same(tmp_path: Path) -> None:
    image = "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png"
    mask = "gtFine/val/ulm/ulm_1_gtFine_{}.png"
    put(tmp_path, image, mask.format("labelIds"), [0, 7, 11, 26, 33, 6])
    Image.new("L", (6, 1)).save(tmp_path / mask.format("instanceIds"))
    cfg = config("cityscapes", tmp_path, 19)
    split = build_split(cfg, "val")
    assert named(split) == ["-", "road", "building", "car", "bicycle", "-"]
    put(tmp_path, image, mask.format("labelTrainIds"), [255, 0, 2, 13, 18, 255])
    (tmp_path / mask.format("labelIds")).unlink()
    assert labels(build_split(cfg, "val")) == [-1, 0, 2, 13, 18, -1]
    (tmp_path / mask.format("labelTrainIds")).unlink()
    with pytest.raises(ValueError, match=r"the first without is ulm/ulm_1_leftImg8bit\.png"):
        build_split(cfg, "val")
    assert sorted(set(LABEL_IDS)) == list(LABEL_IDS) and len(LABEL_IDS) == 19


@pytest.mark.parametrize("base", ["", "VOCdevkit/VOC2012/"])
def test_voc_reads_palette_indices(tmp_path: Path, base: str) -> None:
    names = tmp_path / base / "ImageSets/Segmentation"
    names.mkdir(parents=True)
    (names / "train.txt").write_text("2007_1\n2007_2\n")
    put(
        tmp_path,
        f"{base}JPEGImages/2007_1.jpg",
        f"{base}SegmentationClass/2007_1.png",
        [0, 15, 20, 255],
        palette=True,
    )
    put(
        tmp_path,
        f"{base}JPEGImages/2007_2.jpg",
        f"{base}SegmentationClassAug/2007_2.png",
        [7, 7],
    )
    split = build_split(config("voc2012", tmp_path, 21), "train")
    assert named(split) == ["background", "person", "tvmonitor", "-"]
    assert named(split, 1) == ["car", "car"]
    # VOC's own colours: the bits of the index dealt out to the three channels.
    assert split.classes.colors[[0, 1, 2, 15, 20]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128],
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"Segmentation/val\.txt"):
        build_split(config("voc2012", tmp_path, 21), "val")


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/train2017", "annotations/train2017"),
        ("train2017", "stuffthingmaps/train2017"),
        ("train_img", "train_label"),
    ],
)
def test_cocostuff(tmp_path: Path, images: str, masks: str) -> None:
    put(tmp_path, f"{images}/1.jpg", f"{masks}/1.png", [0, 12, 91, 156, 181, 255])
    expected = ["person", "stop sign", "banner", "sky-other", "wood", "-"]
    split = build_split(config("cocostuff", tmp_path, 171), "train")
    assert labels(split) == [0, 11, 80, 145, 170, -1]
    assert named(split) == expected
    whole = build_split(config("cocostuff", tmp_path, 182), "train")
    assert labels(whole) == [0, 12, 91, 156, 181, -1]
    assert named(whole) == expected
    with pytest.raises(ValueError, match="label 11 is outside 0..10, 12..24"):
        split.label_map(np.array([UNUSED[0]]))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ade20k", 150),
        ("camvid", 11),
        ("cityscapes", 19),
        ("coco", 81),
        ("coco_panoptic", 133),
        ("cocostuff", 171),
        ("lip", 20),
        ("sbu", 2),
        ("sunrgbd", 37),
        ("voc2012", 21),
        ("vocaug", 21),
    ],
)
def test_tables(name: str, count: int) -> None:
    table = class_table(config(name, Path(), count))
    assert len(table) == len(set(table.names)) == count
    assert table.colors.dtype == np.uint8
    if name != "ade20k":  # some of its published colours are equal
        assert len(np.unique(table.colors, axis=0)) == count
    with pytest.raises(ValueError, match=r"num_class is 7.* set DATASET.num_class \d+"):
        class_table(config(name, Path(), 7))
    data_format = FORMATS.get(name)()
    assert data_format.num_class == count


def test_unknown_format_and_split() -> None:
    with pytest.raises(ValueError, match="unknown data set format 'camvit'; did you mean 'camvid'"):
        class_table(config("camvit", Path(), 11))
    with pytest.raises(ValueError, match="'train' or 'val', not 'test'"):
        build_split(config("camvid", Path(), 11), "test")


def test_own_class_table(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("Idx,Name,R,G,B\n1,cat,1,2,3\n2,dog,4,5,6\n")
    table = class_table(config("odgt", tmp_path, 2, classes="c.csv"))
    assert table.names == ("cat", "dog") and table.colors[1].tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match=r"c\.csv has 2 classes, but DATASET.num_class is 3"):
        class_table(config("odgt", tmp_path, 3, classes="c.csv"))


def test_ade20k_table_agrees_with_the_published_files() -> None:
    """Names: the first of each row, or the words of it that the published file broke up."""
    table = class_table(config("odgt", Path(), 150))
    with open(DATA / "object150_info.csv", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [row["Idx"] for row in rows] == [str(k) for k in range(1, 151)]
    for name, row in zip(table.names, rows):
        words = name.split(" ")
        assert row["Name"].split(";")[: len(words)] == words
    colors = scipy.io.loadmat(DATA / "color150.mat")["colors"]
    assert colors.shape == (150, 3) and colors.dtype == np.uint8
    assert np.array_equal(colors, table.colors)
    assert colors[:3].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230]]


# ------------------------------------------------------------------------------ check_sample
def sample(tmp_path: Path, stored: list[int], label_map: LabelMap) -> Split:
    put(tmp_path, "i/a.png", "m/a.png", stored)
    record = {"fpath_img": str(tmp_path / "i/a.png"), "fpath_segm": str(tmp_path / "m/a.png")}
    return Split([record], class_table(config("odgt", Path(), 2)), label_map)  # type: ignore[list-item]


def test_check_sample_is_silent_about_good_masks(tmp_path: Path) -> None:
    assert check_sample(sample(tmp_path, [0, 1, 2], LabelMap.shifted(2))) == []


def test_check_sample_warns_of_ignored_pixels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = sample(tmp_path, [0] * 49 + [1], LabelMap.shifted(2))
    warning, only = check_sample(split)
    assert warning.startswith("98 % of pixels are ignored")
    assert only.startswith("all labelled pixels in 1 sampled masks are of one class out of 2")
    assert "98 % of pixels are ignored" in caplog.text


def test_check_sample_warns_of_binary_masks(tmp_path: Path) -> None:
    (warning,) = check_sample(sample(tmp_path, [0, 255], LabelMap.shifted(2, 0, [255])))
    assert "hold only 0 and 255, one of which is ignored" in warning
    assert 'set DATASET.num_class 2 DATASET.label_map "[[0, 0], [255, 1]]"' in warning
    both = LabelMap({0: 0, 255: 1}, 2)
    assert check_sample(sample(tmp_path, [0, 255], both)) == []


def test_check_sample_warns_of_masks_that_lost_a_class(tmp_path: Path) -> None:
    """0 and 1 under the published offset: 0 is nothing, and 1 the first class."""
    (warning,) = check_sample(sample(tmp_path, [0, 1], LabelMap.shifted(2)))
    assert "one class out of 2, class 0; check DATASET.label_map" in warning


def test_check_sample_stops_at_unknown_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.png: label 9 is outside 0\.\.2; set DATASET"):
        check_sample(sample(tmp_path, [0, 1, 9], LabelMap.shifted(2)))


def test_check_sample_may_warn_of_a_bad_sample_instead(tmp_path: Path) -> None:
    split = sample(tmp_path, [0, 1, 2], LabelMap.shifted(2))
    bad = split.records[0].copy()
    bad["fpath_segm"] = str(tmp_path / "gone.png")
    both = Split([*split.records, bad], split.classes, split.label_map)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        check_sample(both)
    (warning,) = check_sample(both, on_error="skip")
    assert "gone.png" in warning
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):  # nothing usable at all
        check_sample(Split([bad], split.classes, split.label_map), on_error="skip")
