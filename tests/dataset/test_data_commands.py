"""`mit-semseg data make-odgt` and `check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mit_semseg.arguments import build_parser
from mit_semseg.dataset import TrainDataset, ValDataset, read_odgt
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.commands import run
from mit_semseg.dataset.listing import make_odgt

Writer = Callable[..., dict[str, Any]]


def call(*words: str) -> int:
    return run(build_parser().parse_args(["data", *words]))


def test_make_odgt_then_train(
    tmp_path: Path, write_pair: Writer, options: Callable[..., SimpleNamespace]
) -> None:
    sizes = {f"images/s{k}.png": (40 + k, 30) for k in range(10)}
    for k in range(10):
        write_pair(f"s{k}", (40 + k, 30))
    out = tmp_path / "lists"
    report = make_odgt(tmp_path / "images", tmp_path / "masks", out, split=0.7)
    assert (report["n_training"], report["n_validation"]) == (7, 3)
    assert report["root"] == str(tmp_path)
    training, validation = read_odgt(out / "training.odgt"), read_odgt(out / "validation.odgt")
    assert {r["fpath_img"]: (r["width"], r["height"]) for r in training + validation} == sizes
    data = TrainDataset(report["root"], report["training"], options(), 2)
    assert data[0]["img_data"].shape[0] == 2
    assert len(ValDataset(report["root"], report["validation"], options())) == 3

    again = make_odgt(tmp_path / "images", tmp_path / "masks", tmp_path / "b", split=0.7)
    assert read_odgt(again["training"]) == training
    other = make_odgt(tmp_path / "images", tmp_path / "masks", tmp_path / "c", split=0.7, seed=1)
    assert read_odgt(other["training"]) != training


def test_lists_outside_the_data_can_be_checked_as_they_are(
    tmp_path: Path, write_pair: Writer
) -> None:
    write_pair("a")
    data = tmp_path / "data"
    data.mkdir()
    for folder in ("images", "masks"):
        (tmp_path / folder).rename(data / folder)
    report = make_odgt(data / "images", data / "masks", tmp_path / "lists", split=1)
    assert read_odgt(report["training"])[0]["fpath_img"] == str(data / "images/a.png")
    assert check(report["training"], progress=False)["ok"]


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [(0.9, 2, (1, 1)), (0.01, 3, (1, 2)), (0.9, 1, (1, 0)), (1, 3, (3, 0))],
)
def test_no_list_is_empty_by_rounding(
    tmp_path: Path, write_pair: Writer, split: float, count: int, expected: tuple[int, int]
) -> None:
    for k in range(count):
        write_pair(f"s{k}")
    report = make_odgt(tmp_path / "images", tmp_path / "masks", tmp_path, split)
    assert (report["n_training"], report["n_validation"]) == expected
    assert (tmp_path / "validation.odgt").exists() == bool(expected[1])


def test_make_odgt_reports_what_it_leaves_out(
    tmp_path: Path, write_pair: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "lonely", "turned", "broken"):
        write_pair(name)
    (tmp_path / "masks/lonely.png").unlink()
    Image.new("L", (9, 9)).save(tmp_path / "masks/alone.png")
    Image.new("L", (30, 40)).save(tmp_path / "masks/turned.png")
    (tmp_path / "images/broken.png").write_text("x")
    out = str(tmp_path / "o")
    images, masks = str(tmp_path / "images"), str(tmp_path / "masks")
    assert call("make-odgt", "--images", images, "--labels", masks, "--out", out) == 0
    text = capsys.readouterr().out
    assert "1 training and 0 validation" in text
    assert "1 images without mask, left out:\n  lonely.png" in text
    assert "1 masks without image, left out:\n  alone.png" in text
    assert "turned.png: 30x40 pixels, its image" in text and "broken.png: not a readable" in text
    assert f"DATASET.root_dataset {tmp_path}\n" in text
    with pytest.raises(ValueError, match="no image in .* usable mask"):
        make_odgt(tmp_path / "images", tmp_path / "o", tmp_path / "p")
    with pytest.raises(ValueError, match="split is 1.5"):
        make_odgt(images, masks, out, split=1.5)


def test_lists_that_are_there_are_kept(tmp_path: Path, write_pair: Writer) -> None:
    write_pair("s")
    words = ["make-odgt", "--images", str(tmp_path / "images"), "--labels", str(tmp_path / "masks")]
    earlier = tmp_path / "validation.odgt"
    earlier.write_text("of something else")
    with pytest.raises(ValueError, match=r"validation\.odgt would be replaced: .*--overwrite"):
        call(*words, "--out", str(tmp_path))
    assert earlier.read_text() == "of something else"
    assert not (tmp_path / "training.odgt").exists()
    assert call(*words, "--out", str(tmp_path), "--overwrite", "--split", "1") == 0
    assert (tmp_path / "training.odgt").exists() and not earlier.exists()


def test_check_counts_by_hand(tmp_path: Path) -> None:
    for folder in ("i", "m"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (4, 1)).save(tmp_path / "i/a.jpg")
    Image.new("L", (2, 1)).save(tmp_path / "i/b.png")
    Image.fromarray(np.array([[0, 1, 1, 3]], np.uint8)).save(tmp_path / "m/a.png")
    Image.fromarray(np.array([[1, 0]], np.uint16)).save(tmp_path / "m/b.png")
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


def test_check_command_finds_the_images_and_the_faults(
    tmp_path: Path, write_pair: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [write_pair(name) for name in ("fine", "high", "cut", "color", "gone")]
    mask = np.full((30, 40), 255, np.uint8)
    Image.fromarray(mask).save(tmp_path / "masks/high.png")
    data = (tmp_path / "images/cut.png").read_bytes()
    (tmp_path / "images/cut.png").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (30, 40, 3), dtype=np.uint8)).save(
        tmp_path / "masks/color.png"
    )
    (tmp_path / "images/gone.png").unlink()
    (tmp_path / "lists").mkdir()
    listing = tmp_path / "lists" / "all.odgt"
    listing.write_text("\n".join(map(json.dumps, records)))
    out = tmp_path / "report.json"
    assert call("check", str(listing), "--json", str(out)) == 1  # root found beside the list
    report = json.loads(out.read_text())
    text = capsys.readouterr().out
    assert report["num_class"] == 3  # from the values, 255 taken for "no label"
    assert [Path(m.split(":")[0]).name for m in report["unreadable"]] == [
        "cut.png", "color.png", "gone.png",
    ]  # fmt: skip
    (message,) = report["out_of_range"]
    assert "high.png: label 255 is outside 0..3; set DATASET.ignore_label 255" in message
    assert message in text and "There are errors" in text
    assert call("check", str(listing), "--ignore-label", "255", "--num-class", "3") == 1
    listing.write_text("\n".join(map(json.dumps, records[:2])))
    assert call("check", str(listing), "--ignore-label", "255", "--num-class", "3") == 0
    assert "No errors." in capsys.readouterr().out


def write_binary(root: Path, count: int = 2) -> None:
    """Images, and masks that store 0 and 255."""
    for folder in ("i", "m"):
        (root / folder).mkdir()
    for k in range(count):
        Image.new("RGB", (4, 1)).save(root / f"i/{k}.png")
        Image.fromarray(np.array([[0, 255, 255, 255]], np.uint8)).save(root / f"m/{k}.png")


def test_label_maps_of_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_binary(tmp_path)
    where = f"{tmp_path}/i:{tmp_path}/m"
    for words in ([], ["--num-class", "2"], ["--num-class", "2", "--label-offset", "0"]):
        assert call("check", where, *words) == 1
        said = capsys.readouterr().out
        assert said.count('set DATASET.num_class 2 DATASET.label_map "[[0, 0], [255, 1]]"') >= 2
        assert "ignore_label 255" not in said
    pairs = ["--label-map", "[[0, 0], [255, 1]]"]
    assert call("check", where, *pairs) == 0
    said = capsys.readouterr().out
    assert "class 0" in said and "75.00%" in said and "warning" not in said
    with pytest.raises(ValueError, match="class 1, but DATASET.num_class is 1"):
        call("check", where, *pairs, "--num-class", "1")
    with pytest.raises(ValueError, match="camvid knows what its values mean"):
        call("check", "train", "--format", "camvid", *pairs)

    Image.fromarray(np.array([[0, 1, 1, 255]], np.uint8)).save(tmp_path / "m/1.png")
    lists = ["--images", f"{tmp_path}/i", "--labels", f"{tmp_path}/m", "--out", str(tmp_path)]
    assert call("make-odgt", *lists, *pairs) == 0
    said = capsys.readouterr().out
    assert 'DATASET.num_class 2\nDATASET.label_map "[[0, 0], [255, 1]]"\n' in said
    assert "1 training and 0 validation" in said and "m/1.png: label 1 is outside 0, 255" in said


def test_palettes_that_number_their_colours_anew(tmp_path: Path) -> None:
    write_binary(tmp_path)
    for k, color in enumerate(([255, 0, 0], [0, 255, 0])):
        mask = Image.fromarray(np.array([[0, 0, 1, 1]], np.uint8))
        mask.putpalette([0, 0, 0, *color])
        mask.save(tmp_path / f"m/{k}.png")
    options = {"num_class": 2, "label_offset": 0, "progress": False, "data_format": "folder"}
    (warning,) = check(f"{tmp_path}/i:{tmp_path}/m", **options)["warnings"]
    assert "stored value 1 has the colour (255, 0, 0) in" in warning and "m/1.png" in warning
    mask.save(tmp_path / "m/0.png")
    assert check(f"{tmp_path}/i:{tmp_path}/m", **options)["warnings"] == []


def test_check_says_where_it_looked(tmp_path: Path) -> None:
    listing = tmp_path / "x.odgt"
    listing.write_text('{"fpath_img": "nowhere/a.png", "fpath_segm": "nowhere/b.png"}\n')
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.png, the first image .* --root"):
        check(str(listing))
