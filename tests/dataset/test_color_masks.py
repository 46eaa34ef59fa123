"""Colour masks that are read in place, by hand."""

import os

import numpy as np
import pytest
from dataset_files import config, ids, named, put, put_image, stems

from mit_semseg.dataset import build_split
from mit_semseg.dataset.annotations import convert
from mit_semseg.dataset.split import class_table

TABLE = "# label:color_rgb:parts:actions\nvoid:0,0,0::\nroad:128,64,128::\ncar:0,0,142::\n"
COLORS = np.array([[0, 0, 0], [128, 64, 128], [0, 0, 142]], np.uint8)


@pytest.fixture
def options(tmp_path):
    (tmp_path / "labelmap.txt").write_text(TABLE)
    for name, row in (("a", [0, 1, 2]), ("sub/a", [2, 2, 1])):
        put_image(tmp_path / f"photos/{name}.png", 3)
        put(tmp_path / f"masks/{name}.png", COLORS[[row]])
    return config(
        *("colors", tmp_path, 2),
        list_train="photos:masks",
        classes="labelmap.txt",
        ignore_label=[0],
        label_offset=0,
        label_map=[],
    )


def test_colours_are_classes_in_the_order_of_the_table(options):
    split = build_split(options, "train")
    assert stems(split) == ["a", "a"]
    assert [named(split, k) for k in (0, 1)] == [["-", "road", "car"], ["car", "car", "road"]]
    assert split.classes.names == ("road", "car")
    assert split.classes.colors.tolist() == COLORS[1:].tolist()
    options.num_class, options.ignore_label = 3, []
    assert ids(build_split(options, "train")) == [0, 1, 2]


def test_masks_and_tables_that_change_are_read_again(options, tmp_path):
    assert ids(build_split(options, "train")) == [-1, 0, 1]
    mask = tmp_path / "masks/a.png"
    put(mask, COLORS[[[1, 1, 1]]])
    os.utime(mask, ns=(1, 1))
    assert ids(build_split(options, "train")) == [0, 0, 0]
    # Only what has changed: the other mask is not read.
    (tmp_path / "masks/sub/a.png").write_text("x")
    (tmp_path / "masks/sub/a.png").touch()
    with pytest.raises(ValueError, match="not a readable image"):
        build_split(options, "train")
    put(tmp_path / "masks/sub/a.png", COLORS[[[0, 0, 0]]])
    (tmp_path / "labelmap.txt").write_text(TABLE.replace("128,64,128", "1,2,3"))
    with pytest.raises(ValueError, match=r"a\.png: colour \(128, 64, 128\) at column 0, row 0"):
        build_split(options, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ""}, "needs the colours of the classes: set DATASET.classes"),
        ({"num_class": 3}, r"3 classes, 1 of which are ignored .*; set DATASET.num_class 2"),
        ({"classes": "names.txt"}, r"names.txt has no colours, for DATASET.format colors"),
        ({"list_train": "photos"}, "give 'images_dir:labels_dir'"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, changes, message, tmp_path):
    (tmp_path / "names.txt").write_text("road\ncar\n")
    for key, value in changes.items():
        setattr(options, key, value)
    with pytest.raises(ValueError, match=message):
        build_split(options, "train")


def test_the_table_of_a_model_is_that_of_its_data(options):
    assert class_table(options).names == ("road", "car")


def test_cached_masks_are_not_taken_for_annotations(options, tmp_path):
    build_split(options, "train")
    assert (tmp_path / "semantic_masks").is_dir()
    imported = convert(tmp_path, tmp_path / "out", ignore=["void"])
    assert not imported.problems
    assert imported.pixels.tolist() == [2, 3] and imported.classes.names == ("road", "car")
