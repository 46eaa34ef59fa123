"""COCO's objects, and annotation files of the same kind."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dataset_files import config, named, put_image, stems

from mit_semseg.dataset import (
    build_split,
    check_sample,
    class_table,
    coco,
    load_mask,
)
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.cocostuff import UNUSED
from mit_semseg.dataset.drawn import Drawing, drawn_once


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
