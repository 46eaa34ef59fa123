"""`mit-semseg data download`, from archives made here and served by file urls."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mit_semseg.dataset import camvid, cityscapes, read_odgt, voc_aug
from mit_semseg.dataset.base import FORMATS, Archive, Source
from mit_semseg.dataset.downloads import download, sources, unpack


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes], link: str = "") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo("top/link")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            archive.addfile(entry)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


FILES = {"top/a.txt": b"a", "top/sub/b.txt": b"bb", "other/c.txt": b"c", "topmost/d": b"d"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unpack_one_folder(tmp_path: Path, kind: str) -> None:
    make = make_zip if kind == "zip" else make_tar
    archive = make(tmp_path / "x.bin", FILES)
    assert unpack(archive, tmp_path / "out", "top", progress=False) == 2
    assert tree(tmp_path / "out") == {"a.txt": b"a", "sub/b.txt": b"bb"}
    assert unpack(archive, tmp_path / "all", progress=False) == 4
    assert tree(tmp_path / "all") == FILES
    # What is complete stays; what has another size is written again.
    (tmp_path / "out/a.txt").write_bytes(b"A")
    (tmp_path / "out/sub/b.txt").write_bytes(b"half of it")
    assert unpack(archive, tmp_path / "out", "top", progress=False) == 2
    assert tree(tmp_path / "out") == {"a.txt": b"A", "sub/b.txt": b"bb"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a\\..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_lead_outside_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    make = make_zip if kind == "zip" else make_tar
    archive = make(tmp_path / "x.bin", {name: b"!"})
    (tmp_path / "deep" / "out").mkdir(parents=True)
    with pytest.raises(ValueError, match="refuses to unpack the path"):
        unpack(archive, tmp_path / "deep" / "out", progress=False)
    assert tree(tmp_path / "deep") == {}


def test_links_are_left_out(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "x.tar", {"top/a": b"a"}, link="/etc/passwd")
    assert unpack(archive, tmp_path / "out", progress=False) == 1
    assert tree(tmp_path / "out") == {"top/a": b"a"}


def test_no_archive_and_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "page.zip").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.zip: neither a zip nor a tar"):
        unpack(tmp_path / "page.zip", tmp_path, progress=False)
    archive = make_zip(tmp_path / "x.zip", {"a": b"a"})
    with pytest.raises(ValueError, match="holds no files in top"):
        unpack(archive, tmp_path / "out", "top", progress=False)


def test_download_prints_the_licence_and_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server").mkdir()
    archive = make_zip(tmp_path / "server" / "m.zip", {"s/CamVid/train.txt": b"", "s/README": b"x"})
    source = Source(
        title="CamVid",
        licence="for research",
        home="http://home",
        layout="train.txt",
        folder="CamVid",
        archives=(Archive((archive.as_uri(),), member="s/CamVid", into="inner"),),
    )
    monkeypatch.setattr(camvid.CamVid, "source", source)
    monkeypatch.delenv("MIT_SEMSEG_OFFLINE", raising=False)
    assert download("camvid", tmp_path / "data", progress=False)
    assert tree(tmp_path / "data" / "inner") == {"train.txt": b""}
    text = capsys.readouterr().out
    assert "licence: for research" in text and "DATASET.format camvid DATASET.root_dataset" in text


def test_offline_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    assert not download("ade20k", tmp_path / "ade", progress=False)
    text = capsys.readouterr().out
    url = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
    assert f"fetch {url}" in text
    assert f"put it at {tmp_path / 'ade' / 'ADEChallengeData2016.zip'}" in text
    assert "annotations/validation" in text
    # The archive put there by hand is taken.
    picture = io.BytesIO()
    Image.new("L", (7, 5)).save(picture, format="png")
    (tmp_path / "ade").mkdir(exist_ok=True)
    make_zip(
        tmp_path / "ade" / "ADEChallengeData2016.zip",
        {
            f"ADEChallengeData2016/{kind}/{split}/{name}.png": picture.getvalue()
            for kind in ("images", "annotations")
            for split, name in (("training", "a"), ("validation", "b"))
        },
    )
    assert download("ade20k", tmp_path / "ade", progress=False)
    # The lists of the published recipes, to be read from the folder above.
    for name, image in (("training", "a"), ("validation", "b")):
        (record,) = read_odgt(tmp_path / f"{name}.odgt")
        assert record["fpath_img"] == f"ade/images/{name}/{image}.png"
        assert (record["width"], record["height"]) == (7, 5)
        assert (tmp_path / record["fpath_segm"]).is_file()
    (tmp_path / "training.odgt").write_text("mine")
    assert download("ade20k", tmp_path / "ade", progress=False)
    assert (tmp_path / "training.odgt").read_text() == "mine"


def test_registration_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not download("cityscapes", tmp_path, progress=False)
    text = capsys.readouterr().out
    assert "see https://www.cityscapes-dataset.com/downloads/, which asks for a regis" in text
    assert f"put it at {tmp_path / 'gtFine_trainvaltest.zip'}" in text
    with pytest.raises(ValueError, match="no data set 'odgt' to download; known: ade20k"):
        download("odgt", tmp_path)


def test_what_nothing_is_known_of_is_not_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source(title="t", licence="l", home="http://h", layout="a/", folder="f")
    monkeypatch.setattr(camvid.CamVid, "source", source)
    assert not download("camvid", tmp_path / "none", progress=False)
    text = capsys.readouterr().out
    assert "see http://h" in text and "holds: a/" in text and "ready" not in text
    with pytest.raises(ValueError, match="needs a url, or a name"):
        Archive(())


@pytest.mark.parametrize("nested", ["", "TrainVal_parsing_annotations/"])
def test_archives_fetched_by_hand_are_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nested: str
) -> None:
    for folder in ("c", "l"):
        (tmp_path / folder).mkdir()
    for kind, end in (("leftImg8bit", "leftImg8bit.png"), ("gtFine", "gtFine_labelIds.png")):
        files = {f"{kind}/train/ulm/ulm_000000_000019_{end}": kind.encode(), "README": b""}
        make_zip(tmp_path / "c" / f"{kind}_trainvaltest.zip", files)
        if kind == "leftImg8bit":
            assert not download("cityscapes", tmp_path / "c", progress=False)
            text = capsys.readouterr().out
            assert "fetch gtFine" in text and "fetch leftImg8bit" not in text
    assert download("cityscapes", tmp_path / "c", progress=False)
    (record,) = cityscapes.Cityscapes().records(tmp_path / "c", "train")
    assert (tmp_path / "c" / record["fpath_segm"]).read_bytes() == b"gtFine"

    make_zip(tmp_path / "l" / "TrainVal_images.zip", {"train_images/1.jpg": b"x"})
    masks = make_zip(tmp_path / "l" / "TrainVal_parsing_annotations.zip", {"other/1.png": b"y"})
    assert not download("lip", tmp_path / "l", progress=False)
    assert "no LIP here" in capsys.readouterr().out
    make_zip(masks, {f"{nested}train_segmentations/1.png": b"y"})
    assert download("lip", tmp_path / "l", progress=False)
    assert "ready: DATASET.format lip" in capsys.readouterr().out


def test_every_source_is_complete() -> None:
    expected = ["ade20k", "camvid", "cityscapes", "coco", "coco_panoptic", "cocostuff", "lip"]
    assert sorted(sources()) == [*expected, "sbu", "sunrgbd", "voc2012", "vocaug"]
    for source in sources().values():
        names = [archive.file_name for archive in source.archives]
        assert len(names) == len(set(names))  # they lie in one folder
        assert all(name.endswith((".zip", ".tar", ".tgz", ".tar.gz")) for name in names)


def black() -> bytes:
    """A PNG of segments: of none."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 3)).save(stream, "PNG")
    return stream.getvalue()


COCO = {"train2017.zip": {"train2017/1.jpg": b"x"}, "val2017.zip": {"val2017/2.jpg": b"x"}}
PERSON = [{"id": 1, "name": "person"}]
RUNS = {"size": [3, 4], "counts": [12]}
OBJECTS = json.dumps(
    {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 4, "height": 3}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": RUNS}],
        "categories": PERSON,
    }
).encode()
SEGMENTS = json.dumps(
    {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 4, "height": 3}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": []}],
        "categories": PERSON,
    }
).encode()
# What the published archives hold, as far as the readers look; and the first image and its mask.
PUBLISHED: dict[str, tuple[dict[str, dict[str, bytes]], str, str]] = {
    "sunrgbd": (
        {
            "SUNRGBD.zip": {"SUNRGBD/kv1/f/image/1.jpg": b"x"},
            "sunrgbd_train_test_labels.tar.gz": {"img-005051.png": b"y"},
            "master.zip": {
                "sunrgbd-meta-data-master/sunrgbd_training_images.txt": b"SUNRGBD/kv1/f/image/1.jpg"
            },
        },
        "SUNRGBD/kv1/f/image/1.jpg",
        "sunrgbd_train_test_labels/img-005051.png",
    ),
    "sbu": (
        {
            "SBU-shadow.zip": {
                "SBU-shadow/SBUTrain4KRecoveredSmall/ShadowImages/1.jpg": b"x",
                "SBU-shadow/SBUTrain4KRecoveredSmall/ShadowMasks/1.png": b"y",
            }
        },
        "SBUTrain4KRecoveredSmall/ShadowImages/1.jpg",
        "SBUTrain4KRecoveredSmall/ShadowMasks/1.png",
    ),
    "coco": (
        {
            **COCO,
            "annotations_trainval2017.zip": {"annotations/instances_train2017.json": OBJECTS},
        },
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
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_archives_arrive_where_they_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files, image, mask = PUBLISHED[name]
    format_class = FORMATS.get(name)
    source = format_class.source
    assert source is not None
    assert [archive.file_name for archive in source.archives] == list(files)
    (tmp_path / "far").mkdir()
    archives = []
    for archive in source.archives:
        make = make_zip if archive.file_name.endswith(".zip") else make_tar
        content = dict(files[archive.file_name])
        if name == "coco_panoptic" and "annotations/panoptic_train2017.zip" in content:
            inner = make_zip(tmp_path / "inner.zip", {"panoptic_train2017/1.png": black()})
            content["annotations/panoptic_train2017.zip"] = inner.read_bytes()
        url = make(tmp_path / "far" / archive.file_name, content).as_uri()
        archives.append(replace(archive, urls=(url,), sha256=None))
    monkeypatch.setattr(format_class, "source", replace(source, archives=tuple(archives)))
    monkeypatch.delenv("MIT_SEMSEG_OFFLINE", raising=False)
    root = tmp_path / "data"
    assert download(name, root, progress=False)
    (record,) = format_class().records(root, "train")
    assert (record["fpath_img"], record["fpath_segm"]) == (image, mask)
    assert (root / image).is_file() and (root / mask).is_file()


def test_vocaug_arrives_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voc = {f"VOCdevkit/VOC2012/ImageSets/Segmentation/{k}.txt": b"" for k in ("train", "val")}
    sbd = {
        f"benchmark_RELEASE/dataset/{k}": b"" for k in ("train.txt", "val.txt", "img/x", "cls/x")
    }
    urls = [
        make_tar(tmp_path / f"{name}.tgz", files).as_uri()
        for name, files in (("voc", voc), ("benchmark", sbd))
    ]
    source = voc_aug.VocAug.source
    archives = [
        replace(archive, urls=(url,), sha256=None) for archive, url in zip(source.archives, urls)
    ]
    monkeypatch.setattr(voc_aug.VocAug, "source", replace(source, archives=tuple(archives)))
    monkeypatch.delenv("MIT_SEMSEG_OFFLINE", raising=False)
    assert download("vocaug", tmp_path / "data", progress=False)
    assert voc_aug.VocAug().records(tmp_path / "data", "train") == []
