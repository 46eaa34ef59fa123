"""`mit-semseg data make-odgt` and `check`."""

import json
from pathlib import Path

import numpy as np
import pytest
from dataset_files import put, put_image, row
from PIL import Image

from mit_semseg.arguments import build_parser
from mit_semseg.dataset import read_odgt
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.commands import run
from mit_semseg.dataset.listing import make_odgt


def call(*words):
    return run(build_parser().parse_args(["data", *map(str, words)]))


# ------------------------------------------------------------------------------ make-odgt
def test_make_odgt_then_train(samples):
    root, out = samples.root, samples.root / "lists"
    sizes = {f"images/s{k}.png": (40 + k, 30) for k in range(10)}
    for k in range(10):
        samples.write(f"s{k}", (40 + k, 30))
    report = make_odgt(root / "images", root / "masks", out, split=0.7)
    assert (report["n_training"], report["n_validation"]) == (7, 3)
    assert report["root"] == str(root)
    training, validation = read_odgt(out / "training.odgt"), read_odgt(out / "validation.odgt")
    assert {r["fpath_img"]: (r["width"], r["height"]) for r in training + validation} == sizes
    assert samples.train(training, 2)[0]["img_data"].shape[0] == 2

    again = make_odgt(root / "images", root / "masks", root / "b", split=0.7)
    assert read_odgt(again["training"]) == training
    other = make_odgt(root / "images", root / "masks", root / "c", split=0.7, seed=1)
    assert read_odgt(other["training"]) != training


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [(0.9, 2, (1, 1)), (0.01, 3, (1, 2)), (0.9, 1, (1, 0)), (1, 3, (3, 0))],
)
def test_no_list_is_empty_by_rounding(samples, split, count, expected):
    for k in range(count):
        samples.write(f"s{k}")
    root = samples.root
    report = make_odgt(root / "images", root / "masks", root / "lists", split)
    assert (report["n_training"], report["n_validation"]) == expected
    assert (root / "lists/validation.odgt").exists() == bool(expected[1])
    # A list outside the data has paths that can be checked as they are.
    away = root.with_name(f"{root.name}-lists")
    report = make_odgt(root / "images", root / "masks", away, 1)
    assert read_odgt(report["training"])[0]["fpath_img"] == str(root / "images/s0.png")
    assert check(report["training"], progress=False)["ok"]


def test_make_odgt_reports_what_it_leaves_out(samples, capsys):
    root = samples.root
    for name in ("good", "lonely", "turned", "broken"):
        samples.write(name)
    (root / "masks/lonely.png").unlink()
    put(root / "masks/alone.png", np.zeros((9, 9), np.uint8))
    put(root / "masks/turned.png", np.zeros((40, 30), np.uint8))
    (root / "images/broken.png").write_text("x")
    words = ["make-odgt", "--images", root / "images", "--labels", root / "masks", "--out", root]
    earlier = root / "validation.odgt"
    earlier.write_text("of something else")
    with pytest.raises(ValueError, match=r"validation\.odgt would be replaced: .*--overwrite"):
        call(*words)
    assert earlier.read_text() == "of something else"
    assert not (root / "training.odgt").exists()
    assert call(*words, "--overwrite", "--split", "1") == 0
    assert (root / "training.odgt").exists() and not earlier.exists()
    text = capsys.readouterr().out
    assert "1 training and 0 validation" in text
    assert "1 image without mask, left out:\n  lonely.png" in text
    assert "1 mask without image, left out:\n  alone.png" in text
    assert "turned.png: 30x40 pixels, its image" in text and "broken.png: not a readable" in text
    assert f"DATASET.root_dataset {root}\n" in text
    (root / "none").mkdir()
    with pytest.raises(ValueError, match="no image in .* usable mask"):
        make_odgt(root / "images", root / "none", root / "p")
    with pytest.raises(ValueError, match="split is 1.5"):
        make_odgt(root / "images", root / "masks", root / "q", split=1.5)


def test_make_odgt_leaves_out_masks_that_cannot_store_labels(samples):
    for name in ("good", "grey", "colour", "lossy"):
        samples.write(name)
    masks = samples.root / "masks"
    Image.open(masks / "grey.png").convert("RGB").save(masks / "grey.png")
    colour = np.array(Image.open(masks / "good.png").convert("RGB")) + np.uint8([0, 1, 2])
    put(masks / "colour.png", colour)
    Image.open(masks / "lossy.png").save(masks / "lossy.jpg")
    (masks / "lossy.png").unlink()
    report = make_odgt(samples.root / "images", masks, samples.root / "lists", split=1)
    listed = [Path(x["fpath_img"]).stem for x in read_odgt(report["training"])]
    assert listed == ["good", "grey"]
    colour_error, lossy_error = report["unusable"]
    assert "colour.png: a mask of mode RGB does not have one class" in colour_error
    assert "lossy.jpg: a JPEG mask has altered label values; save masks as PNG" in lossy_error


# ------------------------------------------------------------------------------ check
def test_check_counts_by_hand(tmp_path):
    put_image(tmp_path / "i/a.jpg", 4)
    put(tmp_path / "i/b.png", row(0, 0))
    put(tmp_path / "m/a.png", row(0, 1, 1, 3))
    put(tmp_path / "m/b.png", row(1, 0).astype(np.uint16))
    report = check(f"{tmp_path}/i:{tmp_path}/m", data_format="folder", num_class=3, progress=False)
    assert report["ok"] and report["records"] == 2
    assert report["sizes"] == {"4x1": 1, "2x1": 1}
    assert report["image_modes"] == {"RGB": 1, "L": 1}
    assert report["mask_modes"] == {"L": 1, "I;16": 1}
    rows = [(r["pixels"], r["images"], r["share"]) for r in report["classes"]]
    assert rows == [(3, 2, 0.75), (0, 0, 0.0), (1, 1, 0.25)]
    assert report["absent"] == ["class 1"]
    assert report["ignored_share"] == pytest.approx(2 / 6)
    assert report["stored_values"]["1"] == {"pixels": 3, "images": 2}


def test_check_finds_the_images_and_the_faults(samples, capsys):
    root = samples.root
    records = [samples.write(name) for name in ("fine", "high", "cut", "color", "gone")]
    put(root / "masks/high.png", np.full((30, 40), 255, np.uint8))
    samples.cut(records[2])
    put(root / "masks/color.png", np.array(samples.read(records[0])))
    (root / "images/gone.png").unlink()
    (root / "lists").mkdir()
    listing, out = root / "lists/all.odgt", root / "report.json"
    listing.write_text("\n".join(map(json.dumps, records)))
    assert call("check", listing, "--json", out) == 1  # root found beside the list
    report = json.loads(out.read_text())
    text = capsys.readouterr().out
    assert report["num_class"] == 3  # from the values, 255 taken for "no label"
    unreadable = [Path(message.split(":")[0]).name for message in report["unreadable"]]
    assert unreadable == ["cut.png", "color.png", "gone.png"]
    (message,) = report["out_of_range"]
    assert "high.png: label 255 is outside 0..3; set DATASET.ignore_label 255" in message
    assert message in text and "There are errors" in text
    assert call("check", listing, "--ignore-label", "255", "--num-class", "3") == 1
    listing.write_text("\n".join(map(json.dumps, records[:2])))
    assert call("check", listing, "--ignore-label", "255", "--num-class", "3") == 0
    assert "No errors." in capsys.readouterr().out
    listing.write_text('{"fpath_img": "nowhere/a.png", "fpath_segm": "nowhere/b.png"}\n')
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.png, the first image .* --root"):
        check(str(listing))


def write_binary(root):
    """Images, and masks that store 0 and 255."""
    for k in range(2):
        put_image(root / f"i/{k}.png", 4)
        put(root / f"m/{k}.png", row(0, 255, 255, 255))
    return f"{root}/i:{root}/m"


def test_label_maps_of_the_commands(tmp_path, capsys):
    where = write_binary(tmp_path)
    for words in ([], ["--num-class", "2"], ["--num-class", "2", "--label-offset", "0"]):
        assert call("check", where, *words) == 1
        output = capsys.readouterr().out
        assert output.count('set DATASET.num_class 2 DATASET.label_map "[[0, 0], [255, 1]]"') >= 2
        assert "ignore_label 255" not in output
    pairs = ["--label-map", "[[0, 0], [255, 1]]"]
    assert call("check", where, *pairs) == 0
    output = capsys.readouterr().out
    assert "class 0" in output and "75.00%" in output and "warning" not in output
    with pytest.raises(ValueError, match="class 1, but DATASET.num_class is 1"):
        call("check", where, *pairs, "--num-class", "1")
    with pytest.raises(ValueError, match="camvid defines its own"):
        call("check", "train", "--format", "camvid", *pairs)

    put(tmp_path / "m/1.png", row(0, 1, 1, 255))
    lists = ["--images", tmp_path / "i", "--labels", tmp_path / "m", "--out", tmp_path]
    assert call("make-odgt", *lists, *pairs) == 0
    output = capsys.readouterr().out
    assert 'DATASET.num_class 2\nDATASET.label_map "[[0, 0], [255, 1]]"\n' in output
    assert (
        "1 training and 0 validation" in output and "m/1.png: label 1 is outside 0, 255" in output
    )


def test_palettes_that_differ_between_files_are_warned_of(tmp_path):
    where = write_binary(tmp_path)
    options = {"num_class": 2, "label_offset": 0, "progress": False, "data_format": "folder"}
    for k, color in enumerate(([255, 0, 0], [0, 255, 0])):
        put(tmp_path / f"m/{k}.png", row(0, 0, 1, 1), palette=[0, 0, 0, *color])
    (warning,) = check(where, **options)["warnings"]
    assert "stored value 1 has the colour (255, 0, 0) in" in warning and "m/1.png" in warning
    put(tmp_path / "m/0.png", row(0, 0, 1, 1), palette=[0, 0, 0, 0, 255, 0])
    assert check(where, **options)["warnings"] == []
