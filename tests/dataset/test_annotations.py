"""Annotations of other tools: against what these tools draw themselves, and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from dataset_files import ROOT, put
from PIL import Image, ImageOps

from mit_semseg.arguments import ANNOTATIONS
from mit_semseg.config import load_options
from mit_semseg.dataset.annotations import READERS, Choices, Tree, convert, recognise
from mit_semseg.dataset.annotations.label_studio import unpack
from mit_semseg.dataset.annotations.masks import voc_palette
from mit_semseg.dataset.class_files import ClassFile
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.loading import load_pair
from mit_semseg.dataset.split import build_split

EXPORTS = ROOT / "tests" / "fixtures" / "exports"
W, H = 12, 8


def photo(path, size=(W, H)):
    put(Path(path), np.full((size[1], size[0], 3), 90, np.uint8))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def masks(imported):
    """Image name -> stored values."""
    return {
        Path(record["fpath_img"]).name: np.array(Image.open(imported.root / record["fpath_segm"]))
        for found in imported.records.values()
        for record in found
    }


def box(number, left, top, right, bottom, labels=None):
    labels = np.zeros((H, W), int) if labels is None else labels
    labels[top:bottom, left:right] = number
    return labels


# ------------------------------------------------------------------------------ formats
@pytest.mark.parametrize("tool", sorted(path.name for path in EXPORTS.iterdir()))
def test_exports_of_the_tools_become_what_the_tools_draw(tool, tmp_path):
    expected = np.load(EXPORTS / tool / "expected.npy")
    imported = convert(EXPORTS / tool, tmp_path)
    assert imported.classes.names == ("background", "cat", "road")
    assert not imported.problems
    found = masks(imported)
    assert found
    for mask in found.values():
        assert mask.tolist() == expected.tolist()
    assert imported.pixels.tolist() == (np.bincount(expected.ravel()) * len(found)).tolist()


def test_the_command_line_knows_the_formats():
    assert tuple(READERS) == ANNOTATIONS


def test_yolo_by_hand(tmp_path):
    for name in "ab":
        photo(tmp_path / f"set/train/images/{name}.png")
    photo(tmp_path / "set/valid/images/c.png")
    write(tmp_path / "set/data.yaml", "train: ../train/images\nval: ../valid/images\nnames: [x, y]")
    # The larger one is written last, but the smaller one is on top.
    small, large = "1 0.25 0.5 0.5 0.5 0.5 1 0.25 1", "0 0 0 0.5 0 0.5 1 0 1"
    write(tmp_path / "set/train/labels/a.txt", f"{small}\n\n{large}\n")
    write(tmp_path / "set/valid/labels/c.txt", small)
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names == ("background", "x", "y")
    found = masks(imported)
    assert found["a.png"].tolist() == box(2, 3, 4, 6, 8, box(1, 0, 0, 6, 8)).tolist()
    assert not found["b.png"].any()  # no label file: background
    assert {kind: len(x) for kind, x in imported.records.items()} == {
        "training": 2, "validation": 1
    }  # fmt: skip


def coco(images, annotations, names=("x", "y")):
    categories = [{"id": 10 * k, "name": name} for k, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def image(key, name, size=(W, H)):
    return {"id": key, "file_name": name, "width": size[0], "height": size[1]}


def area(key, category, corners, **more):
    return {"id": 1, "image_id": key, "category_id": category, "segmentation": [corners], **more}


def test_coco_by_hand_and_its_run_lengths(tmp_path):
    pycocotools = pytest.importorskip("pycocotools.mask")
    photo(tmp_path / "set/images/a.png")
    photo(tmp_path / "set/images/b.png")
    small, large = [3, 4, 6, 4, 6, 8, 3, 8], [0, 0, 8, 0, 8, 8, 0, 8]
    area_of_y = box(1, 1, 2, 9, 5)
    code = pycocotools.encode(np.asfortranarray(area_of_y.astype(np.uint8)))
    code["counts"] = code["counts"].decode()
    crowd = [0, 0, 12, 0, 12, 2, 0, 2]
    content = coco(
        [image(1, "a.png"), image("b", "b.png")],
        [
            area(1, 20, small), area(1, 10, large), area(1, 10, crowd, iscrowd=1),
            {"id": 9, "image_id": "b", "category_id": 20, "segmentation": code},
        ],
    )  # fmt: skip
    write(tmp_path / "set/result.json", content)
    found = masks(convert(tmp_path / "set", tmp_path / "out"))
    expected = box(2, 3, 4, 6, 8, box(1, 0, 0, 8, 8, box(255, 0, 0, 12, 2)))
    assert found["a.png"].tolist() == expected.tolist()
    assert found["b.png"].tolist() == (2 * area_of_y).tolist()


def region(kind, value):
    return {"type": kind, "value": value, "original_width": W, "original_height": H}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("rectangle", {"x": 25, "y": 50, "width": 50, "height": 25}, (3, 4, 9, 6)),
        # A quarter turn clockwise about the upper left corner.
        (
            "rectangle",
            {"x": 50, "y": 0, "width": 50, "height": 25, "rotation": 90},
            (4, 0, 6, 6),
        ),
    ],
)
def test_rectangles_of_label_studio_by_hand(kind, value, expected, tmp_path):
    photo(tmp_path / "set/a.png")
    regions = [region(f"{kind}labels", {**value, f"{kind}labels": ["x"]})]
    task = {"data": {"image": "/data/local-files/?d=set%2Fa.png"}, "annotations": []}
    write(tmp_path / "set/x.json", [{**task, "annotations": [{"result": regions}]}])
    (found,) = masks(convert(tmp_path / "set", tmp_path / "out")).values()
    assert found.tolist() == box(1, *expected).tolist()


def test_an_ellipse_has_its_area(tmp_path):
    photo(tmp_path / "set/a.png", (200, 100))
    value = {"x": 50, "y": 50, "radiusX": 20, "radiusY": 10, "rotation": 30, "ellipselabels": ["x"]}
    task = {
        "data": {"image": "a.png"},
        "annotations": [{"result": [region("ellipselabels", value)]}],
    }
    task["annotations"][0]["result"][0].update(original_width=200, original_height=100)
    write(tmp_path / "set/x.json", [task])
    (found,) = masks(convert(tmp_path / "set", tmp_path / "out")).values()
    assert np.count_nonzero(found) == pytest.approx(np.pi * 40 * 10, rel=0.02)
    y, x = np.nonzero(found)
    assert (x.mean() + 0.5, y.mean() + 0.5) == pytest.approx((100, 50), abs=0.2)
    assert np.cov(x, y)[0, 1] > 0  # clockwise, as y grows downwards


def test_packed_run_lengths_by_hand():
    # Count 5, words of 8 bits, widths 3, 4, 8, 16; three equal numbers 7, then 1 and 2.
    bits = f"{5:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + f"100010{7:08b}"
    bits += f"000001{1:08b}{2:08b}"
    bits += "0" * (-len(bits) % 8)
    codes = int(bits, 2).to_bytes(len(bits) // 8, "big")
    assert unpack(codes).tolist() == [7, 7, 7, 1, 2]
    with pytest.raises(ValueError, match="ends early"):
        unpack(codes[:-2])


# ------------------------------------------------------------------------------ masks
TABLE = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nx:250,50,83::\ny:51,221,255::\n"
COLORS = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255]], np.uint8)


def pair(folder, name, rows, mask="masks", images="images", suffix=".png"):
    rows = np.array(rows, np.uint8)
    photo(folder / images / f"{name}.png", rows.shape[1::-1])
    put(folder / mask / f"{name}{suffix}", rows)


@pytest.mark.parametrize(
    "table",
    [
        TABLE,
        "0 0 0 background\n250 50 83\tx\n51 221 255 y\n",
        "name,r,g,b\nbackground,0,0,0\nx,250,50,83\ny,51,221,255\n",
        "Idx,Name,R,G,B\n1,background,0,0,0\n2,x;other,250,50,83\n3,y,51,221,255\n",
    ],
    ids=["labelmap", "label_colors", "class_dict", "classes"],
)
def test_colour_masks_with_a_table(table, tmp_path):
    pair(tmp_path / "set", "a", COLORS[[[0, 1, 1, 2]]])
    write(tmp_path / "set/labelmap.txt", table)
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names == ("background", "x", "y")
    assert imported.classes.colors.tolist() == COLORS.tolist()
    assert masks(imported)["a.png"].tolist() == [[0, 1, 1, 2]]
    ignoring = convert(tmp_path / "set", tmp_path / "o", unlabelled="ignore", ignore=["y"])
    assert ignoring.classes.names == ("x",)
    assert masks(ignoring)["a.png"].tolist() == [[255, 0, 0, 255]]


def test_equal_colours_matter_for_colour_masks_only(tmp_path):
    pair(tmp_path / "set", "a", COLORS[[[0, 1]]])
    pair(tmp_path / "set", "b", [[0, 2]])
    write(tmp_path / "set/labelmap.txt", TABLE.replace("51,221,255", "250,50,83"))
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert masks(imported)["b.png"].tolist() == [[0, 2]]
    assert "two of its classes have the colour (250, 50, 83)" in imported.problems[0]


def test_palettes_and_values_with_a_table(tmp_path):
    folder = tmp_path / "set"
    write(folder / "labelmap.txt", TABLE)
    photo(folder / "images/by_palette.png", (3, 1))
    palette = [51, 221, 255, 0, 0, 0, 250, 50, 83]  # in another order than the table
    put(folder / "masks/by_palette.png", np.array([[0, 1, 2]], np.uint8), palette)
    pair(folder, "by_value", [[0, 1, 2]])
    found = masks(convert(folder, tmp_path / "out"))
    assert found["by_palette.png"].tolist() == [[2, 0, 1]]
    assert found["by_value.png"].tolist() == [[0, 1, 2]]


def test_masks_of_roboflow(tmp_path):
    for split in ("train", "valid", "test"):
        folder = tmp_path / "set" / split
        photo(folder / f"{split}_jpg.rf.1f2e.jpg", (3, 1))
        put(folder / f"{split}_jpg.rf.1f2e_mask.png", np.array([[0, 2, 1]], np.uint8))
        write(folder / "_classes.csv", "Pixel Value, Class\n0, background\n1, x\n2, y\n")
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names == ("background", "x", "y")
    assert {kind: len(found) for kind, found in imported.records.items()} == {
        "training": 1, "validation": 1, "test": 1
    }  # fmt: skip
    assert all(mask.tolist() == [[0, 2, 1]] for mask in masks(imported).values())


def test_masks_that_labelme_exports(tmp_path):
    """labelme_export_json: img.png, label.png (a palette) and label_names.txt, in a folder each."""
    folder = tmp_path / "set/a_json"
    photo(folder / "img.png", (3, 1))
    put(folder / "label.png", np.array([[0, 1, 2]], np.uint8), voc_palette().ravel().tolist())
    put(folder / "label_viz.png", np.zeros((1, 3, 3), np.uint8))
    write(folder / "label_names.txt", "_background_\nx\ny\n")
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names == ("_background_", "x", "y")
    assert not imported.problems
    assert masks(imported)["img.png"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("folder", ["SegmentationClass", "SegmentationClassPNG"])
def test_data_sets_that_labelme2voc_writes(folder, tmp_path):
    """Its `__ignore__` is -1, which an image of 8 bits stores as 255."""
    pair(tmp_path / "set", "a", [[0, 1, 255]], folder, "JPEGImages")
    for other in ("SegmentationObject", "SegmentationObjectPNG", "SegmentationClassVisualization"):
        put(tmp_path / f"set/{other}/a.png", np.array([[0, 9, 9]], np.uint8))
    write(tmp_path / "set/class_names.txt", "_background_\nx\n")
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names == ("_background_", "x")
    assert masks(imported)["a.png"].tolist() == [[0, 1, 255]] and not imported.problems


def test_the_palette_is_that_of_voc():
    table = ClassTable.load(ROOT / "mit_semseg/dataset/tables/voc2012.csv")
    assert voc_palette()[:21].tolist() == table.colors.tolist()
    assert voc_palette()[255].tolist() == [224, 224, 192]


def test_masks_in_the_colours_of_voc_need_no_table(tmp_path):
    rows = voc_palette()[[[0, 15, 7, 255]]]
    pair(tmp_path / "set", "a", rows, "SegmentationClass", "JPEGImages")
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names[15] == "person" and len(imported.classes) == 21
    assert masks(imported)["a.png"].tolist() == [[0, 15, 7, 255]]


def test_black_and_white_masks_are_two_classes(tmp_path):
    pair(tmp_path / "set", "a", [[0, 255, 0]])
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names == ("background", "foreground")
    assert masks(imported)["a.png"].tolist() == [[0, 1, 0]]
    # Lossy ones, too, if it is said.
    pair(tmp_path / "jpeg", "b", np.repeat([[0, 255]], 8, 1).repeat(8, 0), suffix=".jpg")
    imported = convert(tmp_path / "jpeg", tmp_path / "o", choices=Choices(binary="crack"))
    assert imported.classes.names == ("background", "crack")
    assert (masks(imported)["b.png"] == np.repeat([0, 1], 8)).all()


def test_masks_without_a_table_have_numbers(tmp_path):
    pair(tmp_path / "set", "a", [[0, 3, 255]])
    imported = convert(tmp_path / "set", tmp_path / "out")
    assert imported.classes.names == ("class 0", "class 1", "class 2", "class 3")
    assert masks(imported)["a.png"].tolist() == [[0, 3, 255]]


def test_numbers_in_a_table_are_stored_values(tmp_path):
    """As in ADE20K, where 0 is no class: it has to be said what it is."""
    pair(tmp_path / "set", "a", [[0, 2, 5]])
    write(tmp_path / "set/classes.csv", "Idx,Name\n2,x\n5,y\n")
    with pytest.raises(ValueError, match=r"value 0 at column 0, row 0 .* --ignore void if 0 is"):
        convert(tmp_path / "set", tmp_path / "out")
    write(tmp_path / "set/classes.csv", "Idx,Name\n0,void\n2,x\n5,y\n")
    imported = convert(tmp_path / "set", tmp_path / "out", ignore=["void"])
    assert imported.classes.names == ("x", "y")
    assert masks(imported)["a.png"].tolist() == [[255, 0, 1]]


# ------------------------------------------------------------------------------ bad input
def only_problem(folder, out, *parts, **options):
    """Imports a folder with one good and one bad image; its problem must have these parts."""
    imported = convert(folder, out, **options)
    assert sum(map(len, imported.records.values())) == 1
    (problem,) = imported.problems
    assert "\n" not in problem
    for part in parts:
        assert part in problem
    return imported


def test_an_unknown_colour_is_named(tmp_path):
    pair(tmp_path / "set", "good", COLORS[[[0, 1]]])
    rows = COLORS[[[0, 0], [0, 1]]].copy()
    rows[1, 1] += 5
    pair(tmp_path / "set", "bad", rows)
    write(tmp_path / "set/labelmap.txt", TABLE)
    only_problem(
        *(tmp_path / "set", tmp_path / "out", "bad.png: colour (255, 55, 88) at column 1, row 1"),
        "the nearest is 'x' (250, 50, 83)",
        "save masks without anti-aliasing",
    )


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda f: pair(f, "bad", [[0, 9]]), ("value 9 at column 1, row 0 is not in",)),
        (lambda f: photo(f / "images/bad.png"), ("bad.png: has no mask; left out",)),
        (lambda f: put(f / "masks/bad.png", np.zeros((2, 2), np.uint8)), ("no image 'bad'",)),
        (
            lambda f: (pair(f, "bad", [[0, 1]]), photo(f / "images/bad.png", (5, 1))),
            ("masks/bad.png: 2x1 pixels, but its image", "has 5x1"),
        ),
        (
            lambda f: (pair(f, "bad", [[0, 1]]), write(f / "images/bad.png", "x")),
            ("images/bad.png: not a readable image",),
        ),
        (
            lambda f: (
                put(f / "masks/bad.jpg", np.tile(COLORS[1], (8, 8, 1)))
                or photo(f / "images/bad.png", (8, 8))
            ),
            ("bad.jpg: a JPEG mask has altered colours; export masks as PNG",),
        ),
        (
            lambda f: put(f / "masks/good_mask.png", np.ones((1, 2), np.uint8)),
            ("good_mask.png: ", "masks/good.png belongs to the same image; left out"),
        ),
    ],
    ids=["value", "no mask", "no image", "size", "image", "jpeg", "twice"],
)
def test_masks_that_cannot_be_used_are_named(spoil, parts, tmp_path):
    pair(tmp_path / "set", "good", [[0, 1]])
    write(tmp_path / "set/labelmap.txt", TABLE)
    spoil(tmp_path / "set")
    only_problem(tmp_path / "set", tmp_path / "out", *parts)


def labelme(folder, name, *shapes, size=(W, H), **more):
    write(
        folder / f"{name}.json",
        {
            "imagePath": f"{name}.png", "imageData": None, "imageWidth": size[0],
            "imageHeight": size[1], "shapes": list(shapes), **more,
        },
    )  # fmt: skip


def drawn(label, *points, kind="polygon"):
    return {"label": label, "points": [list(p) for p in points], "shape_type": kind}


GOOD = drawn("x", (1, 1), (3, 2), kind="rectangle")


@pytest.mark.parametrize(
    ("shapes", "more", "part"),
    [
        ([drawn("x", (1, "a"), (2, 2), (3, 3))], {}, "are not a list of [x, y]"),
        ([drawn("x", (1, 1), (2, 2), kind="star")], {}, "shape_type 'star'; known are polygon"),
        ([drawn("", (1, 1), (2, 2), (3, 1))], {}, "a shape without label"),
        ([GOOD], {"imagePath": "lost.png"}, "no image 'lost.png' below"),
        (
            [GOOD],
            {"imagePath": "lost.png", "imageData": "aGk="},
            "--images FOLDER, or write the one in the file with labelme_export_json",
        ),
        ([GOOD], {"imageWidth": 50}, "50x8 pixels, but its image"),
        ([GOOD], {"imagePath": "good.png"}, "is that of"),
    ],
)
def test_files_of_labelme_that_cannot_be_used_are_named(shapes, more, part, tmp_path):
    folder = tmp_path / "set"
    photo(folder / "good.png")
    labelme(folder, "good", GOOD)
    labelme(folder, "zbad", *shapes, **more)
    if "imagePath" not in more:
        photo(folder / "zbad.png")
    imported = only_problem(folder, tmp_path / "out", "zbad.json", part)
    # labelme fills the outline, too.
    assert masks(imported)["good.png"].tolist() == box(1, 1, 1, 4, 3).tolist()


def test_shapes_without_area_and_outside_the_image_are_reported(tmp_path):
    folder = tmp_path / "set"
    photo(folder / "a.png")
    shapes = [
        drawn("x", (1, 1), (4, 4)),
        drawn("x", (5, 5), kind="point"),
        drawn("x", (-50, -50), (-40, -50), (-40, -40)),
        drawn("y", (6, 4), (90, 4), (90, 90), (6, 90)),
    ]
    labelme(folder, "a", *shapes)
    imported = convert(folder, tmp_path / "out")
    assert masks(imported)["a.png"].tolist() == box(2, 6, 4, 12, 8).tolist()
    lines = "\n".join([*imported.problems, *imported.remarks])
    assert "'x' has 2 of the 3 corners of a polygon; left out" in lines
    assert "'x' is a point, which has no area; left out" in lines
    assert "1 shapes cover no pixel, the first is 'x'" in lines
    assert "1 shapes leave the image and are cut off, the first is 'y'" in lines


def test_classes_that_a_table_does_not_have_are_named(tmp_path):
    folder = tmp_path / "set"
    for name, label in (("good", "x"), ("zbad", "cat")):
        photo(folder / f"{name}.png")
        labelme(folder, name, drawn(label, (1, 1), (3, 2), kind="rectangle"))
    write(tmp_path / "names.txt", "y\nx\n")
    choices = Choices(table=ClassFile.load(tmp_path / "names.txt"))
    text = "class 'cat' is not in the class table (background, y, x)"
    imported = only_problem(folder, tmp_path / "out", "zbad.json", text, choices=choices)
    assert imported.classes.names == ("background", "y", "x")
    with pytest.raises(ValueError, match=r"--ignore 'dog': no such class \(classes: cat, x\)"):
        convert(folder, tmp_path / "o", ignore=["dog"])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("0 0.1 0.1 0.5 0.5", "a.txt:1: a bounding box, not a polygon"),
        ("7 0.1 0.1 0.5 0.5 0.1 0.5", "class 7 is not one of the 2 of 'names', 0..1"),
        ("0 0.1 0.1 0.5 0.5 0.1", "5 coordinates; x and y need an even number"),
        ("0 10 10 50 50 10 50", "50 is not a fraction of the image's size"),
        ("0 a 0.1 0.5 0.5 0.1 0.5", "is not a row of numbers"),
    ],
)
def test_lines_of_yolo_that_cannot_be_used_are_named(line, part, tmp_path):
    folder = tmp_path / "set"
    photo(folder / "images/a.png")
    photo(folder / "images/b.png")
    write(folder / "data.yaml", "train: images\nnames: {0: x, 1: y}")
    write(folder / "labels/a.txt", line)
    write(folder / "labels/b.txt", "1 0 0 1 0 1 1 0 1")
    only_problem(folder, tmp_path / "out", part)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (area(2, 99, [0, 0, 1, 0, 1, 1]), "category_id 99, not one of 'categories'"),
        ({**area(2, 10, []), "segmentation": []}, "has no segmentation, as bounding boxes have"),
        (area(2, 10, [0, 0, 1]), "has an x and a y for each corner, not 3 numbers"),
    ],
)
def test_images_of_coco_that_cannot_be_used_are_named(bad, part, tmp_path):
    folder = tmp_path / "set"
    photo(folder / "a.png")
    photo(folder / "b.png")
    good = area(1, 10, [0, 0, 4, 0, 4, 4])
    write(folder / "x.json", coco([image(1, "a.png"), image(2, "b.png")], [good, bad]))
    only_problem(folder, tmp_path / "out", "x.json: b.png: ", part)


def test_several_images_of_one_name_are_told_apart_or_named(tmp_path):
    folder = tmp_path / "set"
    for place in ("train", "val"):
        photo(folder / place / "a.png")
    photo(folder / "c.png")
    images = [image(1, "train/a.png"), image(2, "a.png"), image(3, "lost/c.png")]
    write(folder / "labels/x.json", coco(images, [area(1, 10, [0, 0, 4, 0, 4, 4])]))
    imported = convert(folder, tmp_path / "out")
    assert len(imported.problems) == 1
    assert "its image 'a.png' may be" in imported.problems[0]
    assert "give --images FOLDER" in imported.problems[0]
    assert set(masks(imported)) == {"a.png", "c.png"}


def test_masks_of_images_in_other_folders_stay_in_the_output(tmp_path):
    folder, data = tmp_path / "a/set", tmp_path / "data"
    lines = {"train": "0 0 0 1 0 1 1 0 1", "val": "1 0 0 1 0 1 1 0 1", "test": ""}
    for part, line in lines.items():
        photo(data / "images" / part / "0.png")
        write(data / "labels" / part / "0.txt", line)
    entries = "".join(f"{part}: images/{part}\n" for part in lines)
    write(folder / "data.yaml", f"path: ../../data\n{entries}names: [x, y]")
    imported = convert(folder, tmp_path / "out")
    assert not imported.problems
    for kind, number in (("training", 1), ("validation", 2), ("test", 0)):
        (record,) = imported.records[kind]
        mask = imported.root / record["fpath_segm"]
        assert ".." not in mask.parts
        assert tmp_path / "out/masks" in mask.parents
        assert (np.array(Image.open(mask)) == number).all()


def test_an_image_beside_the_folder_of_labelme_counts_as_annotated(tmp_path):
    folder = tmp_path / "set"
    photo(folder / "images/a.png")
    labelme(folder / "json", "a", GOOD, imagePath="..\\images\\a.png")
    assert not convert(folder, tmp_path / "out").problems
    labelme(folder / "json", "b", GOOD, imagePath="../images/a.png")
    (problem,) = convert(folder, tmp_path / "o").problems
    assert "is that of" in problem


def test_a_damaged_mask_is_left_out_whatever_its_path(tmp_path):
    pair(tmp_path / "colour", "good", [[0, 1]])
    pair(tmp_path / "colour", "bad", [[0, 1]])
    bad = tmp_path / "colour/masks/bad.png"
    bad.write_bytes(bad.read_bytes()[:-20])
    only_problem(tmp_path / "colour", tmp_path / "out", "bad.png")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_are_rotated_with_their_image(orientation, tmp_path):
    """Of the stored size: as EXIF says; of the upright size: as they are."""
    stored, upright = np.random.default_rng(0).integers(0, 2, (H, W), np.uint8), (H, W)
    folder = tmp_path / "set"
    exif = Image.Exif()
    exif[274] = orientation
    (folder / "images").mkdir(parents=True)
    for name in ("stored", "upright"):
        Image.new("RGB", (W, H)).save(folder / f"images/{name}.jpg", exif=exif)
    put(folder / "masks/stored.png", stored)
    turned = Image.fromarray(stored)
    turned.getexif()[274] = orientation
    turned = np.array(ImageOps.exif_transpose(turned))
    assert turned.shape == upright[::-1]
    put(folder / "masks/upright.png", turned)
    write(folder / "classes.txt", "x\ny\n")
    imported = convert(folder, tmp_path / "out")
    found = masks(imported)
    assert found["stored.jpg"].tolist() == turned.tolist() == found["upright.jpg"].tolist()
    (remark,) = imported.remarks
    assert f"rotated as stored.jpg by EXIF orientation {orientation}" in remark
    split = build_split(load_options(str(imported.recipe), ()).DATASET, "train")
    assert load_pair(split.records[0], "", split.label_map)[1].shape == upright[::-1]


def test_names_of_yolo_that_are_not_numbered_are_refused(tmp_path):
    photo(tmp_path / "x/images/a.png")
    write(tmp_path / "x/data.yaml", "train: images\nnames: {0: x, one: y}")
    with pytest.raises(ValueError, match="a list, or numbers from 0 and names"):
        convert(tmp_path / "x", tmp_path / "out")


def test_folders_that_are_not_annotations_are_refused(tmp_path):
    write(tmp_path / "x/notes.txt", "nothing")
    with pytest.raises(ValueError, match=r"no known annotations in its 1 file \(supervisely: meta"):
        convert(tmp_path / "x", tmp_path / "out")
    with pytest.raises(ValueError, match="--from is 'coko'; did you mean 'coco'"):
        convert(tmp_path / "x", tmp_path / "out", "coko")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert(tmp_path / "y", tmp_path / "out")
    labelme(tmp_path / "x", "a", GOOD)
    write(tmp_path / "x/all.json", coco([], []))
    with pytest.raises(ValueError, match=r"formats, coco and labelme; choose one with --from coco"):
        recognise(Tree(tmp_path / "x"))


# ------------------------------------------------------------------------------ results
def test_what_is_written_can_be_trained_with(tmp_path):
    folder = tmp_path / "set"
    for k in range(10):
        photo(folder / f"s{k}.png")
        labelme(folder, f"s{k}", GOOD)
    imported = convert(folder, folder / "out", split=0.7)
    assert {kind: len(x) for kind, x in imported.records.items()} == {
        "training": 7, "validation": 3
    }  # fmt: skip
    options = load_options(str(imported.recipe), ())
    for which, count in (("train", 7), ("val", 3)):
        split = build_split(options.DATASET, which)
        assert len(split.records) == count and split.classes.names == ("background", "x")
        _, labels = load_pair(split.records[0], "", split.label_map)
        assert labels.tolist() == box(1, 1, 1, 4, 3).tolist()
    with pytest.raises(ValueError, match=r"would be replaced: .* or --overwrite"):
        convert(folder, folder / "out")
    # A second import does not take the masks of the first one for annotations.
    again = convert(folder, folder / "out", split=0.7, overwrite=True, unlabelled="ignore")
    assert again.classes.names == ("x",)
    assert set(np.unique(masks(again)["s0.png"]).tolist()) == {0, 255}
    assert not again.problems


def test_many_classes_are_stored_in_16_bits(tmp_path):
    folder = tmp_path / "set"
    photo(folder / "images/a.png")
    names = [f"n{k}" for k in range(300)]
    write(folder / "data.yaml", f"train: images\nnames: {json.dumps(names)}")
    write(folder / "labels/a.txt", "299 0 0 0.5 0 0.5 1 0 1")
    imported = convert(folder, tmp_path / "out", unlabelled="ignore")
    (mask,) = masks(imported).values()
    assert mask.tolist() == box(299, 0, 0, 6, 8, np.full((H, W), 65535)).tolist()
