"""COCO's objects, and annotation files of the same kind."""

import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dataset_files import config, named, put_image, stems

from mit_semseg.dataset import build_split, check_sample, class_table, coco, load_mask
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.cocostuff import UNUSED
from mit_semseg.dataset.mask_cache import MaskJob, cached_masks


def pixels(expected):
    """Rows of letters, as the names of classes begin: `.` is background, `-` ignored."""
    stored = {".": 0, "-": 255, "t": 61, "b": 74, "p": 1, "s": 2}
    return np.array([[stored[letter] for letter in row] for row in expected.split()])


# ------------------------------------------------------------------------------ COCO
INSTANCES = "annotations/instances_train2017.json"


@pytest.fixture
def tree(tmp_path):
    """An image of 6 x 8 pixels with a table, a book on it, a crowd, and a person in the crowd."""

    def box(x0, y0, x1, y1):
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]

    def one(category, shape, crowd=0):
        names = ("image_id", "category_id", "segmentation", "iscrowd")
        return dict(zip(names, (7, category, shape, crowd)))

    crowd_runs = [30, 18]  # down the columns: the last three of eight
    images = ["000007.jpg", "000008.jpg"]
    # As in COCO's own annotation files, whose names a test on a real one compares.
    names = class_table(config("coco", "", 81)).names[1:]
    content = {
        "images": [
            {"id": int(name[:6]), "file_name": name, "width": 8, "height": 6} for name in images
        ],
        "annotations": [
            one(84, box(1, 1, 3, 3)),  # a book, listed before the table below it
            one(67, box(0, 0, 4, 4)),
            one(1, {"counts": crowd_runs, "size": [6, 8]}, crowd=1),
            one(1, box(6, 0, 7, 6)),
        ],
        "categories": [
            {"id": key, "name": name} for key, name in zip(coco.ALL, names, strict=True)
        ],
    }
    for name in images:
        put_image(tmp_path / "images/train2017" / name, 8, 6)
    save(tmp_path / INSTANCES, content)
    return content


def save(file, content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture
def no_drawing(monkeypatch):
    """Call it where masks are there, and must not be drawn again."""
    return lambda: monkeypatch.setattr(coco, "draw", lambda *_: pytest.fail("the masks are good"))


def first_mask(root, num_class=81):
    return load_mask(build_split(config("coco", root, num_class), "train").records[0]["fpath_segm"])


@pytest.mark.usefixtures("tree")
def test_coco_draws_every_class_or_those_of_voc_once(tmp_path, no_drawing):
    split = build_split(config("coco", tmp_path, 81), "train")
    assert stems(split) == ["000007", "000008"]
    assert [split.records[0][key] for key in ("width", "height")] == [8, 6]
    assert [split.classes.names[k] for k in (61, 74)] == ["dining table", "book"]
    expected = "tttt.-p- tbbt.-p- tbbt.-p- tttt.-p- .....-p- .....-p-"
    assert np.array_equal(first_mask(tmp_path), pixels(expected))
    assert not load_mask(split.records[1]["fpath_segm"]).any()  # an image without objects
    of_voc = build_split(config("coco", tmp_path, 21), "train")
    assert named(of_voc)[:5] == ["diningtable"] * 4 + ["background"]
    inside = first_mask(tmp_path, 21)
    assert set(np.unique(inside).tolist()) == {0, 11, 15, 255} and inside[1, 1] == 11  # no book
    assert check_sample(of_voc) == []
    left = sorted(path.name for path in (tmp_path / "semantic_masks/coco81").rglob("*.*"))
    assert left == ["000007.png", "000008.png", "train2017.json", "train2017.odgt"]
    # Copied, without its annotations, or with its images elsewhere: the masks are good.
    no_drawing()
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, copy_function=shutil.copyfile)
    assert len(build_split(config("coco", copy, 81), "train").records) == 2
    (copy / INSTANCES).unlink()
    assert len(build_split(config("coco", copy, 81), "train").records) == 2
    (tmp_path / "images/train2017").rename(tmp_path / "train2017")
    moved = build_split(config("coco", tmp_path, 81), "train")
    assert stems(moved) == ["000007", "000008"] and check_sample(moved) == []
    (tmp_path / "train2017/000007.jpg").unlink()  # one image that is missing changes nothing
    assert build_split(config("coco", tmp_path, 81), "train").records == moved.records


def test_coco_draws_again_what_has_changed(tmp_path, tree):
    record = build_split(config("coco", tmp_path, 81), "train").records[0]
    assert 74 in load_mask(record["fpath_segm"])
    earlier = (tmp_path / INSTANCES).stat().st_mtime_ns - 10**12
    tree["annotations"][0]["category_id"] = 85  # the book was a clock
    for one in tree["annotations"]:
        del one["iscrowd"]  # as tools write it that know no crowds
    save(tmp_path / INSTANCES, tree)
    os.utime(tmp_path / INSTANCES, ns=(earlier, earlier))  # put in place, though written before
    assert build_split(config("coco", tmp_path, 81), "train").records[0] == record
    assert set(np.unique(load_mask(record["fpath_segm"])).tolist()) == {0, 1, 61, 75}


@pytest.mark.usefixtures("tree")
def test_coco_resumes_an_interrupted_call(tmp_path, monkeypatch):
    drawn = []
    real = coco.draw

    def draw(image, *args):
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


def test_concurrent_processes_draw_each_mask_once(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    drawn = []

    def draw(number):
        time.sleep(0.004)
        drawn.append(number)
        return np.full((1, 1), number, np.uint8)

    todo = [
        MaskJob({"fpath_img": f"{k}.jpg", "fpath_segm": f"masks/{k}.png"}, partial(draw, k))
        for k in range(100)
    ]
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(cached_masks, tmp_path, "masks.odgt", lambda: todo, "", "x.json", {})
            for _ in range(3)
        ]
    assert [call.result() for call in calls] == [[one.record for one in todo]] * 3
    for k in range(100):
        assert load_mask(tmp_path / f"masks/{k}.png").tolist() == [[k]]
    assert len(drawn) < 150  # one after the other, all of them would draw most of the 100


def categories(*names, second=2):
    return [{"id": number, "name": name} for number, name in zip((1, second), names)]


SCALED = [{"image_id": 7, "category_id": 1, "segmentation": [[0.1, 0, 0.9, 0, 0.9, 1]]}]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": None}, "has no 'images'; it is not an annotation file"),
        ({"annotations": None}, "has no 'annotations'; it is not an annotation file"),
        ({"annotations": [None]}, "entry 0 of 'annotations' is None"),
        ({"images": [3]}, "entry 0 of 'images' is 3"),
        ({"height": None}, "image 000007.jpg: 'height' is None, not a number of pixels"),
        ({"width": "8"}, "image 000007.jpg: 'width' is '8'"),
        ({"width": 10**9}, "image 000007.jpg: 1000000000 x 6 pixels are more than images may have"),
        ({"id": None}, "image 000007.jpg: 'id' is None"),
        ({"id": [7]}, r"image 000007.jpg: 'id' is \[7\]"),
        ({"file_name": None}, "image 0: 'file_name' is None"),
        ({"images": []}, "its list of images is empty"),
        ({"annotations": []}, "its list of annotations is empty"),
        ({"categories": None}, "has no 'categories', a list with the id and name"),
        ({"categories": [{"id": 1}]}, "entry 0 of 'categories' is {'id': 1}"),
        ({"categories": [{"id": 1, "name": " "}]}, "entry 0 of 'categories'"),
        ({"categories": categories("a", "b", second=1)}, "two of its categories have the id 1"),
        ({"categories": categories("a", "a ")}, "two of its categories have the name 'a'"),
        ({"category_id": 12}, "annotation 0 has category_id 12, not one of its categories"),
        ({"category_id": None}, "annotation 0 has category_id None"),
        ({"category_id": "84"}, "annotation 0 has category_id '84'"),
        ({"segmentation": []}, "annotation 0 has an empty segmentation"),
        ({"annotations": SCALED}, "all its polygons lie within one pixel"),
        ({"id": 8}, "images 000007.jpg and 000008.jpg both have the id 8"),
        ({"file_name": "000008.png"}, "images 000008.png and 000008.jpg would share one mask"),
        ({"segmentation": [1, 1, 3, 1, 3, 3]}, r"000007.jpg: .*a polygon is a list .* not 1"),
        (
            {"segmentation": [[1, 1, 3, 1, 3, None]]},
            "000007.jpg: .* at None, which is not a number",
        ),
        ({"segmentation": [[1, 1, 3, 1, 3, math.nan]]}, "000007.jpg: .* at nan, which is no"),
        ({"segmentation": {"size": [6, 8], "counts": None}}, "000007.jpg: .*run lengths .*None"),
        ({"segmentation": {"size": None, "counts": [48]}}, "000007.jpg: .* of size None"),
    ],
)
def test_damaged_coco_is_told_in_one_line(tmp_path, tree, change, says):
    ((key, value),) = change.items()
    owners = (tree, tree["images"][0], tree["annotations"][0])
    next(one for one in owners if key in one)[key] = value
    save(tmp_path / INSTANCES, tree)
    with pytest.raises(ValueError, match=rf"instances_train2017\.json: {says}") as caught:
        build_split(config("coco", tmp_path, 81), "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_coco_says_what_is_missing(tmp_path):
    cfg = config("coco", tmp_path, 81)
    with pytest.raises(FileNotFoundError, match="expected the folder images/train2017"):
        build_split(cfg, "train")
    put_image(tmp_path / "images/train2017/x.jpg", 8, 6)
    with pytest.raises(FileNotFoundError, match=r"expected annotations/instances_train2017\.json"):
        build_split(cfg, "train")
    (tmp_path / "annotations").mkdir()
    (tmp_path / INSTANCES).write_text("[")
    with pytest.raises(ValueError, match=r"instances_train2017\.json: damaged"):
        build_split(cfg, "train")
    assert not (tmp_path / "semantic_masks").exists()


# ------------------------------------------------------------------------------ COCO, of one's own
POLE_SIGN = [{"id": 1, "name": "pole"}, {"id": 5, "name": "sign"}]


def own_tree(root, name="train.json", **changes):
    """One image of 6 x 8 pixels: a pole as polygon, a sign as runs, and a crowd of signs."""

    def one(category, shape, crowd=0):
        return {"image_id": 3, "category_id": category, "segmentation": shape, "iscrowd": crowd}

    content = {
        "images": [{"id": 3, "file_name": "sub/a.jpg", "width": 8, "height": 6}],
        "annotations": [
            one(1, [[0, 0, 2, 0, 2, 6, 0, 6]]),
            one(5, {"size": [6, 8], "counts": [18, 2, 4, 2, 22]}),  # two columns of two pixels
            one(5, {"size": [6, 8], "counts": [42, 6]}, crowd=1),
        ],
        "categories": POLE_SIGN,
        **changes,
    }
    put_image(root / "photos/sub/a.jpg", 8, 6)
    save(root / name, content)
    return content


def own_config(root, num_class=3, entry="photos:train.json"):
    return config("coco", root, num_class, list_train=entry, list_val=entry)


def test_categories_of_ones_own_keep_their_names(tmp_path):
    # A category called background is class 0.
    own_tree(tmp_path, categories=[{"id": 0, "name": "Background"}, *POLE_SIGN])
    split = build_split(own_config(tmp_path), "train")
    assert split.classes.names == ("background", "pole", "sign")
    assert len({tuple(color) for color in split.classes.colors.tolist()}) == 3
    expected = "pp.ss..- pp.ss..- pp.....- pp.....- pp.....- pp.....-"
    assert np.array_equal(load_mask(split.records[0]["fpath_segm"]), pixels(expected))
    assert named(split) == ["pole", "pole", "background", "sign", "sign", *["background"] * 2, "-"]
    assert check_sample(split) == []
    report = check("photos:train.json", tmp_path, data_format="coco", progress=False)
    assert report["ok"] and report["num_class"] == 3
    assert [row["name"] for row in report["classes"]] == ["background", "pole", "sign"]
    (tmp_path / "photos/sub/a.jpg").unlink()
    report = check("photos:train.json", tmp_path, data_format="coco", progress=False)
    assert not report["ok"] and "sub/a.jpg: no such file" in report["unreadable"][0]
    (tmp_path / "train.json").unlink()  # the masks and names are kept
    again = build_split(own_config(tmp_path), "train")
    assert again.records == split.records and again.classes.names == split.classes.names


@pytest.mark.parametrize("num_class", [2, 21, 81, 150])
def test_the_number_of_ones_own_categories_is_checked(tmp_path, num_class):
    own_tree(tmp_path)
    says = r"has 2 categories \(pole, sign\), 3 classes with background; set DATASET.num_class 3$"
    with pytest.raises(ValueError, match=rf"num_class is {num_class}, but .*train\.json {says}"):
        build_split(own_config(tmp_path, num_class), "train")
    assert not (tmp_path / "semantic_masks").exists()


def test_files_with_cocos_names_and_other_categories_are_not_taken_for_coco(tmp_path, tree):
    for one in tree["annotations"]:
        one["category_id"] = 1 if one["category_id"] == 84 else 5
    save(tmp_path / INSTANCES, {**tree, "categories": POLE_SIGN})
    with pytest.raises(ValueError, match=r"2 categories \(pole, sign\)"):
        build_split(config("coco", tmp_path, 81), "train")
    assert build_split(config("coco", tmp_path, 3), "train").classes.names[1:] == ("pole", "sign")


def test_categories_are_compared_with_cocos_by_name(tmp_path):
    """A part of COCO with ids of its own: its names decide, and `num_class` which classes."""
    own_tree(tmp_path, categories=[{"id": 5, "name": "person"}, {"id": 1, "name": "bus"}])
    whole = build_split(own_config(tmp_path, 81), "train")
    assert named(whole)[:4] == ["bus", "bus", "background", "person"]
    assert load_mask(whole.records[0]["fpath_segm"])[0, 0] == 6
    part = build_split(own_config(tmp_path, 3), "train")
    assert part.classes.names == ("background", "bus", "person")
    assert named(part)[:4] == named(whole)[:4]
    with pytest.raises(ValueError, match="set DATASET.num_class 3$"):  # not all of VOC's
        build_split(own_config(tmp_path, 21), "train")


def test_images_in_folders_of_their_own_do_not_share_masks(tmp_path):
    content = own_tree(tmp_path)
    for number, name in ((4, "other/a.jpg"), (5, "../a.jpg")):
        image = {"id": number, "file_name": name, "width": 8, "height": 6}
        content["images"].append(image)
    save(tmp_path / "train.json", content)
    records = build_split(own_config(tmp_path), "train").records
    masks = [Path(record["fpath_segm"]) for record in records]
    assert [load_mask(mask).any() for mask in masks] == [True, False, False]
    assert all(tmp_path / "semantic_masks" in mask.parents for mask in masks)
    assert Path(records[2]["fpath_img"]) == tmp_path / "a.jpg"


def test_files_of_one_list_have_the_same_categories(tmp_path):
    own_tree(tmp_path)
    renamed = [{"id": 1, "name": "sign"}, {"id": 5, "name": "pole"}]
    own_tree(tmp_path, "more.json", categories=renamed)
    cfg = own_config(tmp_path, entry=["photos:train.json", "photos:more.json"])
    with pytest.raises(ValueError, match=r"train\.json and photos:more\.json have different cat"):
        build_split(cfg, "train")
    own_tree(tmp_path, "more.json")
    assert len(build_split(cfg, "train").records) == 2


@pytest.mark.parametrize(
    ("name", "entry", "says"),
    [
        ("coco", "photos:none.json", r"none\.json: no such annotation file; check .*'photos:none"),
        ("coco", "none:train.json", "none: no such folder of images; .*'none:train"),
        ("coco", "train.json", r"give 'images_dir:FILE\.json'"),
        ("coco", "photos:masks", r"give 'images_dir:FILE\.json'"),
        ("coco", "photos:train.json", "has image_id 3, the first image the id '3'"),
        ("odgt", "photos:train.json", "coco for images_dir:FILE.json"),
        ("folder", "photos:train.json", "format coco"),
    ],
)
def test_list_entries_of_annotation_files_are_named(tmp_path, name, entry, says):
    own_tree(tmp_path, images=[{"id": "3", "file_name": "sub/a.jpg", "width": 8, "height": 6}])
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        build_split(config(name, tmp_path, 3, list_train=entry), "train")


def test_cocos_classes_in_vocs_order():
    """The two data sets name some of them in other words."""
    of_coco = class_table(config("coco", Path(), 81)).names
    of_voc = class_table(config("voc2012", Path(), 21)).names
    words = {
        "airplane": "aeroplane", "motorcycle": "motorbike", "dining table": "diningtable",
        "potted plant": "pottedplant", "couch": "sofa", "tv": "tvmonitor",
    }  # fmt: skip
    as_voc = [of_coco[coco.ALL.index(category) + 1] for category in coco.VOC]
    assert tuple(words.get(name, name) for name in as_voc) == of_voc[1:]


def test_tables_of_coco_agree_with_each_other():
    """Categories of objects are the same in all three, each by way of its ids."""
    objects = class_table(config("coco", Path(), 81))
    panoptic = class_table(config("coco_panoptic", Path(), 133))
    stuff = class_table(config("cocostuff", Path(), 182))
    assert objects.names[0] == "background" and len(set(stuff.names)) == 182
    assert objects.names[1:] == panoptic.names[:80]
    assert np.array_equal(objects.colors[1:], panoptic.colors[:80])
    assert objects.names[1:] == tuple(stuff.names[category - 1] for category in coco.ALL)
    assert not {stuff.names[value] for value in UNUSED} & set(objects.names)
