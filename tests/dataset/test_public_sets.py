"""Public data sets of several kinds of files, each on a tree made here in its native layout."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from mit_semseg.dataset import (
    FORMATS,
    TrainDataset,
    build_split,
    check_sample,
    class_table,
    coco,
    load_mask,
)
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.coco_panoptic import CLASSES
from mit_semseg.dataset.cocostuff import UNUSED
from mit_semseg.dataset.drawn import Drawing, drawn_once
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.loading import load_pair
from mit_semseg.dataset.split import Split
from mit_semseg.engine.launch import read_config
from mit_semseg.models import ModelBuilder


def config(name: str, root: Path, num_class: int, **changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "format": name,
        "root_dataset": str(root),
        "list_train": "./data/training.odgt",
        "list_val": "./data/validation.odgt",
        "num_class": num_class,
    }
    return SimpleNamespace(**{**values, **changes})


def put(path: Path, pixels: Any) -> None:
    """A picture of these pixels, (H, W) or (H, W, 3), in the type of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels)).save(path)


def put_image(path: Path, width: int, height: int = 1) -> None:
    put(path, np.zeros((height, width, 3), np.uint8))


def row(*stored: int) -> np.ndarray:
    return np.array([stored], np.uint8)


def named(split: Split, index: int = 0) -> list[str]:
    """Class names of the first row of one sample, `-` where ignored."""
    _, ids = load_pair(split.records[index], "", split.label_map)
    return [split.classes.names[k] if k >= 0 else "-" for k in ids[0].tolist()]


def stems(split: Split) -> list[str]:
    return [Path(record["fpath_img"]).stem for record in split.records]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vocaug", 21),
        ("coco", 81),
        ("coco_panoptic", 133),
        ("lip", 20),
        ("sbu", 2),
        ("sunrgbd", 37),
    ],
)
def test_tables(name: str, count: int) -> None:
    table = class_table(config(name, Path(), count))
    assert len(table) == len(set(table.names)) == count
    assert len({tuple(color) for color in table.colors.tolist()}) == count
    with pytest.raises(ValueError, match=r"num_class is 7.* set DATASET.num_class \d+"):
        class_table(config(name, Path(), 7))
    assert FORMATS.get(name)().num_class == count


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


# ------------------------------------------------------------------------------ COCO
def coco_categories() -> list[dict[str, Any]]:
    """As in COCO's own annotation files, whose names a test on a real one compares."""
    names = class_table(config("coco", Path(), 81)).names[1:]
    return [{"id": key, "name": name} for key, name in zip(coco.ALL, names, strict=True)]


def coco_tree(root: Path) -> dict[str, Any]:
    """One image of 6 x 8 pixels with a table, a book on it, a crowd, and a person in the crowd."""

    def box(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]

    def one(category: int, shape: Any, crowd: int = 0, image: int = 7) -> dict[str, Any]:
        return {
            "image_id": image,
            "category_id": category,
            "segmentation": shape,
            "iscrowd": crowd,
        }

    crowd_runs = [30, 18]  # down the columns: the last three of eight
    content = {
        "images": [
            {"id": 7, "file_name": "000007.jpg", "width": 8, "height": 6},
            {"id": 8, "file_name": "000008.jpg", "width": 8, "height": 6},
        ],
        "annotations": [
            one(84, box(1, 1, 3, 3)),  # a book, listed before the table below it
            one(67, box(0, 0, 4, 4)),
            one(1, {"counts": crowd_runs, "size": [6, 8]}, crowd=1),
            one(1, box(6, 0, 7, 6)),
        ],
        "categories": coco_categories(),
    }
    for name in ("000007", "000008"):
        put_image(root / f"images/train2017/{name}.jpg", 8, 6)
    (root / "annotations").mkdir()
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
    return content


def test_coco_draws_every_class_or_those_of_voc(tmp_path: Path) -> None:
    coco_tree(tmp_path)
    split = build_split(config("coco", tmp_path, 81), "train")
    assert stems(split) == ["000007", "000008"]
    assert [split.records[0][key] for key in ("width", "height")] == [8, 6]
    table, book, person, void = 61, 74, 1, 255
    assert split.classes.names[table] == "dining table" and split.classes.names[book] == "book"
    expected = np.zeros((6, 8), np.uint8)
    expected[0:4, 0:4] = table
    expected[1:3, 1:3] = book
    expected[:, 5:] = void
    expected[:, 6] = person
    assert np.array_equal(load_mask(split.records[0]["fpath_segm"]), expected)
    assert not load_mask(split.records[1]["fpath_segm"]).any()  # an image without objects
    of_voc = build_split(config("coco", tmp_path, 21), "train")
    assert named(of_voc)[:5] == ["diningtable"] * 4 + ["background"]
    inside = load_mask(of_voc.records[0]["fpath_segm"])
    assert set(np.unique(inside).tolist()) == {0, 11, 15, 255} and inside[1, 1] == 11  # no book
    assert check_sample(of_voc) == []


def test_coco_draws_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco_tree(tmp_path)
    first = build_split(config("coco", tmp_path, 81), "train")
    (tmp_path / "annotations/instances_train2017.json").unlink()
    again = build_split(config("coco", tmp_path, 81), "train")
    assert again.records == first.records
    left = [path.name for path in (tmp_path / "semantic_masks").rglob("*") if path.is_file()]
    assert sorted(left) == ["000007.png", "000008.png", "train2017.json", "train2017.odgt"]


def test_coco_draws_again_what_has_changed(tmp_path: Path) -> None:
    content = coco_tree(tmp_path)
    cfg = config("coco", tmp_path, 81)
    record = build_split(cfg, "train").records[0]
    assert 74 in load_mask(record["fpath_segm"])
    file = tmp_path / "annotations/instances_train2017.json"
    earlier = file.stat().st_mtime_ns - 10**12
    content["annotations"][0]["category_id"] = 85  # the book was a clock
    file.write_text(json.dumps(content))
    os.utime(file, ns=(earlier, earlier))  # put in its place, though written before
    assert build_split(cfg, "train").records[0] == record
    mask = load_mask(record["fpath_segm"])
    assert 75 in mask and 74 not in mask


def test_masks_of_a_copied_data_set_are_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco_tree(tmp_path / "a")
    build_split(config("coco", tmp_path / "a", 81), "train")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    monkeypatch.setattr(coco, "draw", lambda *args: pytest.fail("the masks are good"))
    assert len(build_split(config("coco", tmp_path / "b", 81), "train").records) == 2


def test_coco_with_entries_that_lack_something(tmp_path: Path) -> None:
    content = coco_tree(tmp_path)
    file = tmp_path / "annotations/instances_train2017.json"
    for one in content["annotations"]:
        del one["iscrowd"]  # as tools write it that know no crowds
    file.write_text(json.dumps(content))
    mask = load_mask(build_split(config("coco", tmp_path, 81), "train").records[0]["fpath_segm"])
    assert set(np.unique(mask).tolist()) == {0, 1, 61, 74}
    del content["annotations"][0]["segmentation"]
    file.write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "semantic_masks")
    with pytest.raises(ValueError, match=r"000007\.jpg: damaged annotation: .* not None"):
        build_split(config("coco", tmp_path, 81), "train")


def test_coco_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco_tree(tmp_path)
    drawn: list[str] = []
    real = coco.draw

    def draw(image: dict[str, Any], *args: Any) -> np.ndarray:
        drawn.append(image["file_name"])
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return real(image, *args)

    monkeypatch.setattr(coco, "draw", draw)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        build_split(config("coco", tmp_path, 81), "train")
    assert not list((tmp_path / "semantic_masks").rglob("*.part"))
    assert len(build_split(config("coco", tmp_path, 81), "train").records) == 2
    assert sorted(drawn[:2]) == ["000007.jpg", "000008.jpg"] and drawn[2:] == drawn[1:2]


def test_coco_finds_images_that_have_been_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco_tree(tmp_path)
    cfg = config("coco", tmp_path, 81)
    build_split(cfg, "train")
    (tmp_path / "images/train2017").rename(tmp_path / "train2017")
    monkeypatch.setattr(coco, "draw", lambda *args: pytest.fail("the masks are good"))
    split = build_split(cfg, "train")
    assert [Path(record["fpath_img"]).is_file() for record in split.records] == [True, True]
    assert stems(split) == ["000007", "000008"] and check_sample(split) == []
    (tmp_path / "train2017/000007.jpg").unlink()  # one image that is missing changes nothing
    monkeypatch.setattr(coco, "read_json", None)
    assert build_split(cfg, "train").records == split.records


def test_processes_that_start_together_share_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    drawn: list[int] = []

    def draw(number: int) -> np.ndarray:
        time.sleep(0.004)
        drawn.append(number)
        return np.full((1, 1), number, np.uint8)

    todo = [
        Drawing({"fpath_img": f"{k}.jpg", "fpath_segm": f"masks/{k}.png"}, partial(draw, k))
        for k in range(100)
    ]
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(drawn_once, tmp_path, "masks.odgt", lambda: todo, "", "x.json", {})
            for _ in range(3)
        ]
    assert [call.result() for call in calls] == [[one.record for one in todo]] * 3
    for k in range(100):
        assert load_mask(tmp_path / f"masks/{k}.png").tolist() == [[k]]
    assert len(drawn) < 150  # one after the other, all of them would draw most of the 100


SCALED = [{"image_id": 7, "category_id": 1, "segmentation": [[0.1, 0, 0.9, 0, 0.9, 1]]}]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": None}, "has no 'images'; it is no annotation file"),
        ({"annotations": None}, "has no 'annotations'; it is no annotation file"),
        ({"annotations": [None]}, "entry 0 of 'annotations' is None"),
        ({"images": [3]}, "entry 0 of 'images' is 3"),
        ({"height": None}, "image 000007.jpg: 'height' is None, not a number of pixels"),
        ({"width": "8"}, "image 000007.jpg: 'width' is '8'"),
        ({"width": 10**9}, "image 000007.jpg: 1000000000 x 6 pixels are more than an image has"),
        ({"id": None}, "image 000007.jpg: 'id' is None"),
        ({"id": [7]}, r"image 000007.jpg: 'id' is \[7\]"),
        ({"file_name": None}, "image 0: 'file_name' is None"),
        ({"images": []}, "its list of images is empty"),
        ({"annotations": []}, "its list of annotations is empty"),
        ({"categories": None}, "has no 'categories', a list of id and name"),
        ({"categories": [{"id": 1}]}, "entry 0 of 'categories' is {'id': 1}"),
        ({"categories": [{"id": 1, "name": " "}]}, "entry 0 of 'categories'"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            "two of its categories have the id 1",
        ),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a "}]},
            "two of its categories have the name 'a'",
        ),
        ({"category_id": 12}, "annotation 0 has category_id 12, which is none of its categories"),
        ({"category_id": None}, "annotation 0 has category_id None"),
        ({"category_id": "84"}, "annotation 0 has category_id '84'"),
        ({"segmentation": []}, "annotation 0 has an empty segmentation"),
        ({"annotations": SCALED}, "all its polygons lie within one pixel"),
        ({"id": 8}, "images 000007.jpg and 000008.jpg both have the id 8"),
        ({"file_name": "000008.png"}, "images 000008.png and 000008.jpg would share one mask"),
        ({"segmentation": [1, 1, 3, 1, 3, 3]}, r"000007.jpg: .*a polygon is a list .* not 1"),
        ({"segmentation": [[1, 1, 3, 1, 3, None]]}, "000007.jpg: .* at None, which is no number"),
        ({"segmentation": [[1, 1, 3, 1, 3, math.nan]]}, "000007.jpg: .* at nan, which is no"),
        ({"segmentation": {"size": [6, 8], "counts": None}}, "000007.jpg: .*run lengths .*None"),
        ({"segmentation": {"size": None, "counts": [48]}}, "000007.jpg: .* of size None"),
    ],
)
def test_damaged_coco_is_told_in_one_line(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    content = coco_tree(tmp_path)
    ((key, value),) = change.items()
    owner = next(
        one for one in (content, content["images"][0], content["annotations"][0]) if key in one
    )
    owner[key] = value
    file = tmp_path / "annotations/instances_train2017.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances_train2017\.json: {says}") as caught:
        build_split(config("coco", tmp_path, 81), "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_coco_says_what_is_missing(tmp_path: Path) -> None:
    cfg = config("coco", tmp_path, 81)
    with pytest.raises(FileNotFoundError, match="expected the folder images/train2017"):
        build_split(cfg, "train")
    coco_tree(tmp_path)
    file = tmp_path / "annotations/instances_train2017.json"
    file.write_text(file.read_text().replace("[6, 8]", "[8, 6]"))
    with pytest.raises(ValueError, match=r"000007\.jpg: damaged annotation: run lengths of size"):
        build_split(cfg, "train")
    shutil.rmtree(tmp_path / "semantic_masks")
    file.write_text("[")
    with pytest.raises(ValueError, match=r"instances_train2017\.json: damaged"):
        build_split(cfg, "train")
    file.write_text('{"images": [], "categories": [{"id": 1, "name": "person"}]}')
    with pytest.raises(ValueError, match=r"has no 'annotations'; it is no annotation file"):
        build_split(cfg, "train")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected annotations/instances_train2017\.json"):
        build_split(cfg, "train")
    assert not (tmp_path / "semantic_masks").exists()


# ------------------------------------------------------------------------------ COCO, of one's own
POLE_SIGN = [{"id": 1, "name": "pole"}, {"id": 5, "name": "sign"}]


def own_tree(root: Path, name: str = "train.json", **changes: Any) -> dict[str, Any]:
    """One image of 6 x 8 pixels: a pole as polygon, a sign as runs, and a crowd of signs."""
    shape = {"image_id": 3, "iscrowd": 0}
    pole = [[0, 0, 2, 0, 2, 6, 0, 6]]
    sign = {"size": [6, 8], "counts": [18, 2, 4, 2, 22]}  # two columns of two pixels
    content = {
        "images": [{"id": 3, "file_name": "sub/a.jpg", "width": 8, "height": 6}],
        "annotations": [
            {**shape, "category_id": 1, "segmentation": pole},
            {**shape, "category_id": 5, "segmentation": sign},
            {
                **shape,
                "category_id": 5,
                "iscrowd": 1,
                "segmentation": {"size": [6, 8], "counts": [42, 6]},
            },
        ],
        "categories": POLE_SIGN,
        **changes,
    }
    put_image(root / "photos/sub/a.jpg", 8, 6)
    (root / name).write_text(json.dumps(content))
    return content


def own_config(root: Path, num_class: int = 3, **changes: Any) -> SimpleNamespace:
    entry = "photos:train.json"
    return config("coco", root, num_class, list_train=entry, list_val=entry, **changes)


def test_categories_of_ones_own_keep_their_names(tmp_path: Path) -> None:
    own_tree(tmp_path)
    split = build_split(own_config(tmp_path), "train")
    assert split.classes.names == ("background", "pole", "sign")
    assert len({tuple(color) for color in split.classes.colors.tolist()}) == 3
    expected = np.zeros((6, 8), np.uint8)
    expected[:, :2] = 1
    expected[:2, 3:5] = 2
    expected[:, 7] = 255
    assert np.array_equal(load_mask(split.records[0]["fpath_segm"]), expected)
    assert named(split) == ["pole", "pole", "background", "sign", "sign", *["background"] * 2, "-"]
    assert check_sample(split) == []
    report = check("photos:train.json", tmp_path, data_format="coco", progress=False)
    assert report["ok"] and report["num_class"] == 3
    assert [row["name"] for row in report["classes"]] == ["background", "pole", "sign"]
    (tmp_path / "train.json").unlink()  # the masks and names are kept
    again = build_split(own_config(tmp_path), "train")
    assert again.records == split.records and again.classes.names == split.classes.names


@pytest.mark.parametrize("num_class", [2, 21, 81, 150])
def test_the_number_of_ones_own_categories_is_checked(tmp_path: Path, num_class: int) -> None:
    own_tree(tmp_path)
    message = (
        rf"num_class is {num_class}, but .*train\.json has 2 categories \(pole, sign\), 3 classes "
        "with background; set DATASET.num_class 3$"
    )
    with pytest.raises(ValueError, match=message):
        build_split(own_config(tmp_path, num_class), "train")
    assert not (tmp_path / "semantic_masks").exists()


def test_files_with_cocos_names_and_other_categories_are_not_taken_for_coco(tmp_path: Path) -> None:
    content = coco_tree(tmp_path)
    for one in content["annotations"]:
        one["category_id"] = 1 if one["category_id"] == 84 else 5
    content["categories"] = POLE_SIGN
    file = tmp_path / "annotations/instances_train2017.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2 categories \(pole, sign\)"):
        build_split(config("coco", tmp_path, 81), "train")
    assert build_split(config("coco", tmp_path, 3), "train").classes.names[1:] == ("pole", "sign")


def test_categories_are_compared_with_cocos_by_name(tmp_path: Path) -> None:
    """A part of COCO with ids of its own: its names decide, and `num_class` which classes."""
    content = own_tree(tmp_path)
    content["categories"] = [{"id": 5, "name": "person"}, {"id": 1, "name": "bus"}]
    (tmp_path / "train.json").write_text(json.dumps(content))
    whole = build_split(own_config(tmp_path, 81), "train")
    assert named(whole)[:4] == ["bus", "bus", "background", "person"]
    assert load_mask(whole.records[0]["fpath_segm"])[0, 0] == 6
    part = build_split(own_config(tmp_path, 3), "train")
    assert part.classes.names == ("background", "bus", "person")
    assert named(part)[:4] == named(whole)[:4]
    with pytest.raises(ValueError, match="set DATASET.num_class 3$"):  # not all of VOC's
        build_split(own_config(tmp_path, 21), "train")


def test_a_category_called_background_is_class_0(tmp_path: Path) -> None:
    own_tree(tmp_path, categories=[{"id": 0, "name": "Background"}, *POLE_SIGN])
    assert build_split(own_config(tmp_path), "train").classes.names[1:] == ("pole", "sign")


def test_images_in_folders_of_their_own_do_not_share_masks(tmp_path: Path) -> None:
    content = own_tree(tmp_path)
    other = {"id": 4, "file_name": "other/a.jpg", "width": 8, "height": 6}
    outside = {"id": 5, "file_name": "../a.jpg", "width": 8, "height": 6}
    content["images"] += [other, outside]
    (tmp_path / "train.json").write_text(json.dumps(content))
    records = build_split(own_config(tmp_path), "train").records
    masks = [Path(record["fpath_segm"]) for record in records]
    assert [load_mask(mask).any() for mask in masks] == [True, False, False]
    assert all(tmp_path / "semantic_masks" in mask.parents for mask in masks)
    assert Path(records[2]["fpath_img"]) == tmp_path / "a.jpg"


def test_files_of_one_list_have_the_same_categories(tmp_path: Path) -> None:
    own_tree(tmp_path)
    own_tree(
        tmp_path, "more.json", categories=[{"id": 1, "name": "sign"}, {"id": 5, "name": "pole"}]
    )
    cfg = own_config(tmp_path)
    cfg.list_train = ["photos:train.json", "photos:more.json"]
    with pytest.raises(ValueError, match=r"train\.json and photos:more\.json have different cat"):
        build_split(cfg, "train")
    own_tree(tmp_path, "more.json")
    assert len(build_split(cfg, "train").records) == 2


def test_annotations_of_other_images_are_refused(tmp_path: Path) -> None:
    images = [{"id": "3", "file_name": "sub/a.jpg", "width": 8, "height": 6}]
    own_tree(tmp_path, images=images)
    with pytest.raises(ValueError, match="the first has image_id 3, the first image the id '3'"):
        build_split(own_config(tmp_path), "train")


def test_list_entries_of_annotation_files_are_named(tmp_path: Path) -> None:
    own_tree(tmp_path)
    for entry, message in (
        ("photos:none.json", r"none\.json: no such annotation file; check .*'photos:none\.json'"),
        ("none:train.json", r"none: no such folder of images; .*'none:train\.json'"),
        ("train.json", r"give 'images_dir:FILE\.json'"),
        ("photos:masks", r"give 'images_dir:FILE\.json'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build_split(config("coco", tmp_path, 3, list_train=entry), "train")
    for name, message in (("odgt", "coco for images_dir:FILE.json"), ("folder", "format coco")):
        with pytest.raises(ValueError, match=message):
            build_split(config(name, tmp_path, 3, list_train="photos:train.json"), "train")


def test_images_that_are_missing_are_named(tmp_path: Path) -> None:
    own_tree(tmp_path)
    (tmp_path / "photos/sub/a.jpg").unlink()
    report = check("photos:train.json", tmp_path, data_format="coco", progress=False)
    assert not report["ok"] and "sub/a.jpg: no such file" in report["unreadable"][0]


def test_cocos_classes_in_vocs_order() -> None:
    """The two data sets name some of them in other words."""
    of_coco = class_table(config("coco", Path(), 81)).names
    of_voc = class_table(config("voc2012", Path(), 21)).names
    words = {
        "airplane": "aeroplane", "motorcycle": "motorbike", "dining table": "diningtable",
        "potted plant": "pottedplant", "couch": "sofa", "tv": "tvmonitor",
    }  # fmt: skip
    as_voc = [of_coco[coco.ALL.index(category) + 1] for category in coco.VOC]
    assert tuple(words.get(name, name) for name in as_voc) == of_voc[1:]


def test_tables_of_coco_agree_with_each_other() -> None:
    """Categories of objects are the same in all three, each by way of its ids."""
    objects = class_table(config("coco", Path(), 81))
    panoptic = class_table(config("coco_panoptic", Path(), 133))
    stuff = class_table(config("cocostuff", Path(), 182))
    assert objects.names[0] == "background" and len(set(stuff.names)) == 182
    assert objects.names[1:] == panoptic.names[:80]
    assert np.array_equal(objects.colors[1:], panoptic.colors[:80])
    assert objects.names[1:] == tuple(stuff.names[category - 1] for category in coco.ALL)
    assert not {stuff.names[value] for value in UNUSED} & set(objects.names)


def test_vocs_palette_is_that_of_its_masks() -> None:
    """The bits of a class in threes, from the highest bit of red, green and blue down."""
    colors = class_table(config("voc2012", Path(), 21)).colors
    for k, color in enumerate(colors.tolist()):
        expected = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                expected[channel] |= ((k >> (3 * place + channel)) & 1) << (7 - place)
        assert color == expected


def panoptic_tree(root: Path, zipped: bool = False) -> None:
    number = 3 + 256 * 2 + 65536 * 1
    place = root / "annotations"
    picture = [[[3, 2, 1], [3, 2, 1], [5, 0, 0], [0, 0, 0]]]
    put(place / "panoptic_val2017/000009.png", np.array(picture, np.uint8))
    put_image(root / "val2017/000009.jpg", 4)
    segments = [{"id": number, "category_id": 200}, {"id": 5, "category_id": 1, "iscrowd": 1}]
    annotation = {"image_id": 9, "file_name": "000009.png", "segments_info": segments}
    images = [{"id": 9, "file_name": "000009.jpg", "width": 4, "height": 1}]
    names = class_table(config("coco_panoptic", Path(), 133)).names
    categories = [{"id": key, "name": names[k]} for key, k in CLASSES.items()]
    content = {"images": images, "annotations": [annotation], "categories": categories}
    (place / "panoptic_val2017.json").write_text(json.dumps(content))
    if zipped:
        with zipfile.ZipFile(place / "panoptic_val2017.zip", "w") as archive:
            archive.write(place / "panoptic_val2017/000009.png", "panoptic_val2017/000009.png")
        shutil.rmtree(place / "panoptic_val2017")


@pytest.mark.parametrize("zipped", [False, True])
def test_coco_panoptic(tmp_path: Path, zipped: bool) -> None:
    panoptic_tree(tmp_path, zipped)
    split = build_split(config("coco_panoptic", tmp_path, 133), "val")
    assert named(split) == ["rug-merged", "rug-merged", "person", "-"]
    assert len(CLASSES) == 133 and list(CLASSES) == sorted(CLASSES)


def test_coco_panoptic_says_what_is_wrong(tmp_path: Path) -> None:
    cfg = config("coco_panoptic", tmp_path, 133)
    with pytest.raises(FileNotFoundError, match="expected the folder images/val2017"):
        build_split(cfg, "val")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected annotations/panoptic_val2017\.json"):
        build_split(cfg, "val")
    panoptic_tree(tmp_path)
    picture = tmp_path / "annotations/panoptic_val2017/000009.png"
    put(picture, np.array([[[3, 2, 1], [6, 0, 0]]], np.uint8))
    with pytest.raises(ValueError, match=r"000009\.png: segment 6 has no entry in the json"):
        build_split(cfg, "val")
    picture.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000009\.png: cannot be read"):
        build_split(cfg, "val")
    shutil.rmtree(picture.parent)
    with pytest.raises(FileNotFoundError, match=r"no such folder, nor panoptic_val2017\.zip"):
        build_split(cfg, "val")
    (tmp_path / "annotations/panoptic_val2017.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"panoptic_val2017\.zip: a damaged archive"):
        build_split(cfg, "val")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"categories": [{"id": 1, "name": "pole"}]},
            "its category 1 is 'pole', in COCO 'person'; .* DATASET.format folder",
        ),
        (
            {"categories": [{"id": 12, "name": "street sign"}]},
            "its category 12 .* in COCO 'unused'",
        ),
        ({"image_id": None}, "000009.png: 'image_id' is None"),
        ({"file_name": None}, "annotation 0: 'file_name' is None"),
        ({"segments_info": None}, "000009.png: 'segments_info' is None"),
        ({"segments_info": [{"id": 5}]}, "000009.png: a segment without id or category_id"),
        ({"segments_info": [None]}, "000009.png: a segment without id or category_id"),
    ],
)
def test_damaged_coco_panoptic_is_told_in_one_line(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    panoptic_tree(tmp_path)
    file = tmp_path / "annotations/panoptic_val2017.json"
    content = json.loads(file.read_text())
    owner = content if "categories" in change else content["annotations"][0]
    owner.update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"panoptic_val2017\.json: {says}"):
        build_split(config("coco_panoptic", tmp_path, 133), "val")


def test_masks_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panoptic_tree(tmp_path)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="semantic_masks, but it cannot be written to"):
        build_split(config("coco_panoptic", tmp_path, 133), "val")


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
