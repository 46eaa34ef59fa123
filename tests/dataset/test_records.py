"""Lists and folders become records; lists that are wrong are in `bad_input`."""

import json

import numpy as np
import pytest
from dataset_files import put, put_image
from PIL import Image

from mit_semseg.dataset.records import (
    list_images,
    match_by_stem,
    pair_folders,
    read_records,
    with_sizes,
)

LINE = '{"fpath_img": "a.jpg", "fpath_segm": "a.png", "width": 4, "height": 3}\n'


def test_list_is_looked_up_in_root_when_the_working_folder_lacks_it(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/x.odgt").write_text(LINE)
    (tmp_path / "y.odgt").write_text(LINE * 2)
    monkeypatch.chdir(tmp_path)
    assert len(read_records("x.odgt", "root")) == 1
    (tmp_path / "x.odgt").write_text(LINE * 3)
    for source, count in (("x.odgt", 3), (["x.odgt", "y.odgt"], 5), ([json.loads(LINE)], 1)):
        assert len(read_records(source, "root")) == count
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere\.odgt or .*nowhere\.odgt"):
        read_records("nowhere.odgt", tmp_path)


def test_sizes_come_from_headers_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 5)).save(tmp_path / "turned.jpg", exif=exif)
    put_image(tmp_path / "plain.jpg", 8, 5)
    names = [{"fpath_img": "turned.jpg"}, {"fpath_img": "plain.jpg"}]
    records = with_sizes([*names, {"fpath_img": "x", "width": 1}], tmp_path)
    assert [(r["width"], r.get("height")) for r in records] == [(5, 8), (8, 5), (1, None)]


def test_headers_that_cannot_be_read_stop_or_are_left_out(tmp_path, caplog):
    put_image(tmp_path / "good.png", 5, 3)
    (tmp_path / "bad.jpg").write_text("no image")
    records = [{"fpath_img": name} for name in ("bad.jpg", "good.png", "gone.png")]
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        with_sizes(records, tmp_path)
    kept = with_sizes(records, tmp_path, "skip")
    assert kept == [{"fpath_img": "good.png", "width": 5, "height": 3}]
    (message,) = caplog.messages
    assert message.startswith("2 of 3 images") and "bad.jpg" in message and "gone.png" in message
    with pytest.raises(ValueError, match=r"none of the 1 images can be read: .*bad\.jpg"):
        with_sizes(records[:1], tmp_path, "skip")


def test_images_of_every_extension_in_any_case(tmp_path):
    expected = ["a.JPG", "b.png", "c.TIFF", "d.webp", "e.bmp", "sub/f.Jpeg"]
    for name in (*expected, ".hidden.png"):
        put_image(tmp_path / name, 3, 3)
    (tmp_path / "notes.txt").write_text("no picture")
    assert list_images(tmp_path) == expected


def test_folders_are_matched_by_stem(tmp_path):
    images, masks = ["u/a.jpg", "u/b.jpg", "v/a.jpg"], ["u/a_m.png", "v/a_m.png", "w_m.png"]
    pairs, lonely_images, lonely_masks = match_by_stem(images, masks, "", "_m")
    assert pairs == [("u/a.jpg", "u/a_m.png"), ("v/a.jpg", "v/a_m.png")]
    assert (lonely_images, lonely_masks) == (["u/b.jpg"], ["w_m.png"])
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png differ only in extension"):
        match_by_stem(["a.jpg", "a.png"], [])
    for name in ("i/a.png", "i/b.png", "m/a.png"):
        put(tmp_path / name, np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"1 of 2 images .* the first is b\.png"):
        pair_folders(tmp_path, "i", "m")
    (tmp_path / "i/b.png").unlink()
    assert pair_folders(tmp_path, "i", "m") == [{"fpath_img": "i/a.png", "fpath_segm": "m/a.png"}]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pair_folders(tmp_path, "i", "nowhere")
