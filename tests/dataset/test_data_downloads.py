"""`mit-semseg data download`, from archives made here and served by file urls."""

import io
import json
import re
import tarfile
import zipfile
from dataclasses import replace

import pytest
from PIL import Image

from mit_semseg.dataset import camvid, cityscapes, read_odgt
from mit_semseg.dataset.base import FORMATS, Archive, Source
from mit_semseg.dataset.downloads import download, sources, unpack


def archive(path, **files):
    """A zip, or else a compressed tar, of these files."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as made:
            for name, content in files.items():
                made.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as made:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return path


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.delenv("MIT_SEMSEG_OFFLINE", raising=False)


FILES = {"top/a.txt": b"a", "top/sub/b.txt": b"bb", "other/c.txt": b"c", "topmost/d": b"d"}


@pytest.mark.parametrize("name", ["x.zip", "x.bin"])
def test_unpack_one_folder(tmp_path, name):
    packed, out = archive(tmp_path / name, **FILES), tmp_path / "out"
    assert unpack(packed, out, "top", progress=False) == 2
    assert tree(out) == {"a.txt": b"a", "sub/b.txt": b"bb"}
    assert unpack(packed, tmp_path / "all", progress=False) == 4
    assert tree(tmp_path / "all") == FILES
    # What is complete stays; what has another size is written again.
    (out / "a.txt").write_bytes(b"A")
    (out / "sub/b.txt").write_bytes(b"half of it")
    assert unpack(packed, out, "top", progress=False) == 2
    assert tree(out) == {"a.txt": b"A", "sub/b.txt": b"bb"}
    with pytest.raises(ValueError, match="contains no files in nowhere"):
        unpack(packed, out, "nowhere", progress=False)
    (tmp_path / "page.zip").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.zip: neither a zip nor a tar"):
        unpack(tmp_path / "page.zip", tmp_path, progress=False)


def test_download_prints_the_licence_and_unpacks(tmp_path, monkeypatch, capsys):
    files = {"s/CamVid/train.txt": b"", "s/README": b"x"}
    url = archive(tmp_path / "server/m.zip", **files).as_uri()
    source = Source("CamVid", "for research", "http://home", "a/", "CamVid")
    with_url = replace(source, archives=(Archive((url,), member="s/CamVid", into="inner"),))
    monkeypatch.setattr(camvid.CamVid, "source", with_url)
    assert download("camvid", tmp_path / "data", progress=False)
    assert tree(tmp_path / "data/inner") == {"train.txt": b""}
    text = capsys.readouterr().out
    assert "licence: for research" in text and "DATASET.format camvid DATASET.root_dataset" in text
    # What nothing is known of is not said to be there.
    monkeypatch.setattr(camvid.CamVid, "source", source)
    assert not download("camvid", tmp_path / "none", progress=False)
    text = capsys.readouterr().out
    assert "see http://home" in text and "holds: a/" in text and "ready" not in text
    with pytest.raises(ValueError, match="needs a URL or a name"):
        Archive(())


def test_offline_the_message_names_the_url_and_the_target(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    ade, name = tmp_path / "ade", "ADEChallengeData2016"
    assert not download("ade20k", ade, progress=False)
    text = capsys.readouterr().out
    assert f"download http://data.csail.mit.edu/places/ADEchallenge/{name}.zip" in text
    assert f"put it at {ade / name}.zip" in text and "annotations/validation" in text
    # The archive put there by hand is taken.
    files = {
        f"{name}/{kind}/{split}/{image}.png": picture("L", (7, 5))
        for kind in ("images", "annotations")
        for split, image in (("training", "a"), ("validation", "b"))
    }
    archive(ade / f"{name}.zip", **files)
    assert download("ade20k", ade, progress=False)
    # The lists of the published recipes, to be read from the folder above.
    for split, image in (("training", "a"), ("validation", "b")):
        (record,) = read_odgt(tmp_path / f"{split}.odgt")
        assert record["fpath_img"] == f"ade/images/{split}/{image}.png"
        assert (record["width"], record["height"]) == (7, 5)
        assert (tmp_path / record["fpath_segm"]).is_file()
    (tmp_path / "training.odgt").write_text("mine")
    assert download("ade20k", ade, progress=False)
    assert (tmp_path / "training.odgt").read_text() == "mine"


def test_archives_fetched_by_hand_are_unpacked(tmp_path, capsys):
    assert not download("cityscapes", tmp_path, progress=False)
    text = capsys.readouterr().out
    assert "see https://www.cityscapes-dataset.com/downloads/, which requires a regis" in text
    assert f"put it at {tmp_path / 'gtFine_trainvaltest.zip'}" in text
    for kind, end in (("leftImg8bit", "leftImg8bit.png"), ("gtFine", "gtFine_labelIds.png")):
        files = {f"{kind}/train/ulm/ulm_000000_000019_{end}": kind.encode(), "README": b""}
        archive(tmp_path / f"{kind}_trainvaltest.zip", **files)
        if kind == "leftImg8bit":
            assert not download("cityscapes", tmp_path, progress=False)
            text = capsys.readouterr().out
            assert "download gtFine" in text and "download leftImg8bit" not in text
    assert download("cityscapes", tmp_path, progress=False)
    (record,) = cityscapes.Cityscapes().records(tmp_path, "train")
    assert (tmp_path / record["fpath_segm"]).read_bytes() == b"gtFine"
    with pytest.raises(ValueError, match="no data set 'odgt' to download; known: ade20k"):
        download("odgt", tmp_path)


@pytest.mark.parametrize("nested", ["", "TrainVal_parsing_annotations/"])
def test_a_layout_that_is_not_the_published_one_is_told(tmp_path, capsys, nested):
    archive(tmp_path / "TrainVal_images.zip", **{"train_images/1.jpg": b"x"})
    masks = tmp_path / "TrainVal_parsing_annotations.zip"
    archive(masks, **{"other/1.png": b"y"})
    assert not download("lip", tmp_path, progress=False)
    assert "no LIP here" in capsys.readouterr().out
    archive(masks, **{f"{nested}train_segmentations/1.png": b"y"})
    assert download("lip", tmp_path, progress=False)
    assert "ready: DATASET.format lip" in capsys.readouterr().out


# ------------------------------------------------------------------------------ published archives
def picture(mode, size):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


def annotations(**annotation):
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 4, "height": 3}],
        "annotations": [{"image_id": 1, **annotation}],
        "categories": [{"id": 1, "name": "person"}],
    }
    return json.dumps(content).encode()


OBJECTS = annotations(category_id=1, segmentation={"size": [3, 4], "counts": [12]})
SEGMENTS = annotations(file_name="1.png", segments_info=[])
FRAME = "SUNRGBD/kv1/f/image/1.jpg"
SHADOWS = "SBUTrain4KRecoveredSmall/Shadow{}"
COCO = {"train2017.zip": {"train2017/1.jpg": b"x"}, "val2017.zip": {"val2017/2.jpg": b"x"}}
SPLITS = "VOCdevkit/VOC2012/ImageSets/Segmentation/{}.txt"
SBD = ("train.txt", "val.txt", "img/x", "cls/x")
# What the published archives hold, as far as the readers look; and the first image and its mask.
PUBLISHED = {
    "sunrgbd": (
        {
            "SUNRGBD.zip": {FRAME: b"x"},
            "sunrgbd_train_test_labels.tar.gz": {"img-005051.png": b"y"},
            "master.zip": {"sunrgbd-meta-data-master/sunrgbd_training_images.txt": FRAME.encode()},
        },
        FRAME,
        "sunrgbd_train_test_labels/img-005051.png",
    ),
    "sbu": (
        {
            "SBU-shadow.zip": {
                f"SBU-shadow/{SHADOWS}/1.jpg".format("Images"): b"x",
                f"SBU-shadow/{SHADOWS}/1.png".format("Masks"): b"y",
            }
        },
        f"{SHADOWS}/1.jpg".format("Images"),
        f"{SHADOWS}/1.png".format("Masks"),
    ),
    "coco": (
        {**COCO, "annotations_trainval2017.zip": {"annotations/instances_train2017.json": OBJECTS}},
        "images/train2017/1.jpg",
        "semantic_masks/coco81/train2017/1.png",
    ),
    "coco_panoptic": (
        {
            **COCO,
            "panoptic_annotations_trainval2017.zip": {
                "annotations/panoptic_train2017.json": SEGMENTS,
                "annotations/panoptic_train2017.zip": b"",
            },
        },
        "images/train2017/1.jpg",
        "semantic_masks/coco_panoptic/train2017/1.png",
    ),
    "cocostuff": (
        {**COCO, "stuffthingmaps_trainval2017.zip": {"train2017/1.png": b"y"}},
        "images/train2017/1.jpg",
        "annotations/train2017/1.png",
    ),
    "vocaug": (
        {
            "VOCtrainval_11-May-2012.tar": {SPLITS.format(k): b"" for k in ("train", "val")},
            "benchmark.tgz": {f"benchmark_RELEASE/dataset/{k}": b"" for k in SBD},
        },
        "",
        "",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_archives_arrive_where_they_are_looked_for(tmp_path, monkeypatch, name):
    files, image, mask = PUBLISHED[name]
    format_class = FORMATS.get(name)
    source = format_class.source
    assert source is not None
    assert [one.file_name for one in source.archives] == list(files)
    archives = []
    for one in source.archives:
        content = dict(files[one.file_name])
        if "annotations/panoptic_train2017.zip" in content:
            black = {"panoptic_train2017/1.png": picture("RGB", (4, 3))}
            inner = archive(tmp_path / "inner.zip", **black)
            content["annotations/panoptic_train2017.zip"] = inner.read_bytes()
        url = archive(tmp_path / "far" / one.file_name, **content).as_uri()
        archives.append(replace(one, urls=(url,), sha256=None))
    monkeypatch.setattr(format_class, "source", replace(source, archives=tuple(archives)))
    root = tmp_path / "data"
    assert download(name, root, progress=False)
    records = format_class().records(root, "train")
    assert [(r["fpath_img"], r["fpath_segm"]) for r in records] == [(image, mask)][: len(image)]
    assert not image or ((root / image).is_file() and (root / mask).is_file())


def test_every_source_is_complete():
    expected = ["ade20k", "camvid", "cityscapes", "coco", "coco_panoptic", "cocostuff", "lip"]
    assert sorted(sources()) == [*expected, "sbu", "sunrgbd", "voc2012", "vocaug"]
    for source in sources().values():
        names = [archive.file_name for archive in source.archives]
        assert len(names) == len(set(names))  # they lie in one folder
        assert all(re.search(r"\.(zip|tar|tgz|tar\.gz)$", name) for name in names)
