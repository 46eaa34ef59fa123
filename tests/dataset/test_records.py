"""Lists and folders become records, or say where they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mit_semseg.dataset.records import (
    Record,
    list_images,
    match_by_stem,
    pair_folders,
    read_odgt,
    read_records,
    with_sizes,
)

LINE = '{"fpath_img": "a.jpg", "fpath_segm": "a.png", "width": 4, "height": 3}\n'


def test_blank_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "x.odgt"
    path.write_text("\ufeff" + LINE + "\n   \n" + LINE, encoding="utf-8")
    record = {"fpath_img": "a.jpg", "fpath_segm": "a.png", "width": 4, "height": 3}
    assert read_odgt(path) == [record, record]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'fpath_img': 1}", "x.odgt:3: not JSON"),
        ('{"img": "a"}', "x.odgt:3: a record needs the key 'fpath_img'"),
        ('{"fpath_img": "a", "fpath_segm": 3}', "x.odgt:3: 'fpath_segm' is 3"),
        ('{"fpath_img": "a", "width": 0, "height": 3}', "x.odgt:3: 'width' is 0"),
        ('{"fpath_img": "a", "width": 7}', "x.odgt:3: 'height' is None"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "x.odgt"
    path.write_text(LINE + "\n" + line + "\n")
    with pytest.raises(ValueError) as caught:
        read_odgt(path)
    assert says in str(caught.value)


def test_a_picture_is_no_list(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"photo\.png: no list but a binary file"):
        read_odgt(tmp_path / "photo.png")


def test_empty_and_missing_lists(tmp_path: Path) -> None:
    (tmp_path / "x.odgt").write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        read_odgt(tmp_path / "x.odgt")
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere\.odgt or .*nowhere\.odgt"):
        read_records("nowhere.odgt", tmp_path)


def test_list_is_looked_up_in_root_when_the_working_folder_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x.odgt").write_text(LINE)
    (tmp_path / "y.odgt").write_text(LINE + LINE)
    monkeypatch.chdir(tmp_path)
    assert len(read_records("x.odgt", "root")) == 1
    (tmp_path / "x.odgt").write_text(LINE + LINE + LINE)
    assert len(read_records("x.odgt", "root")) == 3
    assert len(read_records(["x.odgt", "y.odgt"], "root")) == 5
    assert len(read_records([json.loads(LINE)], "root")) == 1


def test_sizes_come_from_headers_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 5)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (8, 5)).save(tmp_path / "plain.jpg")
    records = with_sizes(
        [{"fpath_img": "turned.jpg"}, {"fpath_img": "plain.jpg"}, {"fpath_img": "x", "width": 1}],  # type: ignore[list-item]
        tmp_path,
    )
    assert [(r["width"], r.get("height")) for r in records] == [(5, 8), (8, 5), (1, None)]


def test_images_of_every_extension_in_any_case(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((3, 3, 3), np.uint8))
    for name in ("a.JPG", "b.png", "c.TIFF", "d.webp", "e.bmp", "sub/f.Jpeg", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    expected = ["a.JPG", "b.png", "c.TIFF", "d.webp", "e.bmp", "sub/f.Jpeg"]
    assert list_images(tmp_path) == expected


def test_match_by_stem_reports_the_lonely() -> None:
    pairs, images, masks = match_by_stem(
        ["u/a.jpg", "u/b.jpg", "v/a.jpg"],
        ["u/a_mask.png", "v/a_mask.png", "w_mask.png"],
        "",
        "_mask",
    )
    assert pairs == [("u/a.jpg", "u/a_mask.png"), ("v/a.jpg", "v/a_mask.png")]
    assert images == ["u/b.jpg"]
    assert masks == ["w_mask.png"]
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png differ only in extension"):
        match_by_stem(["a.jpg", "a.png"], [])


def test_pair_folders_names_an_image_without_mask(tmp_path: Path) -> None:
    for name in ("i/a.png", "i/b.png", "m/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"1 of 2 images .* the first is b\.png"):
        pair_folders(tmp_path, "i", "m")
    (tmp_path / "i" / "b.png").unlink()
    assert pair_folders(tmp_path, "i", "m") == [{"fpath_img": "i/a.png", "fpath_segm": "m/a.png"}]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pair_folders(tmp_path, "i", "nowhere")


def test_headers_that_cannot_be_read_stop_or_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (5, 3)).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("no image")
    records: list[Record] = [
        {"fpath_img": "bad.jpg"},
        {"fpath_img": "good.png"},
        {"fpath_img": "gone.png"},
    ]
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        with_sizes(records, tmp_path)
    kept = with_sizes(records, tmp_path, "skip")
    assert kept == [{"fpath_img": "good.png", "width": 5, "height": 3}]
    (message,) = caplog.messages
    assert message.startswith("2 of 3 images") and "bad.jpg" in message and "gone.png" in message
    with pytest.raises(ValueError, match=r"none of the 1 images can be read: .*bad\.jpg"):
        with_sizes(records[:1], tmp_path, "skip")
