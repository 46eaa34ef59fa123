"""COCO panoptic: segments of coloured PNGs, drawn once."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dataset_files import config, named, put, put_image

from mit_semseg.dataset import build_split, class_table
from mit_semseg.dataset.coco_panoptic import CLASSES


def panoptic_tree(root, zipped=False):
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
def test_coco_panoptic(tmp_path, zipped):
    panoptic_tree(tmp_path, zipped)
    split = build_split(config("coco_panoptic", tmp_path, 133), "val")
    assert named(split) == ["rug-merged", "rug-merged", "person", "-"]
    assert len(CLASSES) == 133 and list(CLASSES) == sorted(CLASSES)


def test_coco_panoptic_says_what_is_wrong(tmp_path):
    cfg = config("coco_panoptic", tmp_path, 133)
    with pytest.raises(FileNotFoundError, match="expected the folder images/val2017"):
        build_split(cfg, "val")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected annotations/panoptic_val2017\.json"):
        build_split(cfg, "val")
    panoptic_tree(tmp_path)
    picture = tmp_path / "annotations/panoptic_val2017/000009.png"
    put(picture, np.array([[[3, 2, 1], [6, 0, 0]]], np.uint8))
    with pytest.raises(ValueError, match=r"000009\.png: segment 6 has no entry in the JSON file"):
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
        ({"categories": [{"id": 1, "name": "pole"}]}, "its category 1 is 'pole', in COCO 'pe"),
        ({"categories": [{"id": 12, "name": "street sign"}]}, "its category 12 .* 'unused'"),
        ({"image_id": None}, "000009.png: 'image_id' is None"),
        ({"file_name": None}, "annotation 0: 'file_name' is None"),
        ({"segments_info": None}, "000009.png: 'segments_info' is None"),
        ({"segments_info": [{"id": 5}]}, "000009.png: a segment without id or category_id"),
        ({"segments_info": [None]}, "000009.png: a segment without id or category_id"),
    ],
)
def test_damaged_coco_panoptic_is_told_in_one_line(tmp_path, change, says):
    panoptic_tree(tmp_path)
    file = tmp_path / "annotations/panoptic_val2017.json"
    content = json.loads(file.read_text())
    owner = content if "categories" in change else content["annotations"][0]
    owner.update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"panoptic_val2017\.json: {says}"):
        build_split(config("coco_panoptic", tmp_path, 133), "val")


def test_an_unwritable_folder_for_masks_is_named(tmp_path, monkeypatch):
    panoptic_tree(tmp_path)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="semantic_masks, but the folder is not writable"):
        build_split(config("coco_panoptic", tmp_path, 133), "val")
