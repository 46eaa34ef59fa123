"""Every image, mask, list and configuration of the corpus: read right, or refused in one line."""

import json
import os
import re
from pathlib import Path

import corpus
import numpy as np
import pytest
from corpus import COLOR
from PIL import Image

from mit_semseg.config import load_config
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.images import ImageFile, image_size, load_image
from mit_semseg.dataset.records import list_images, read_odgt


def refused(read, file, message):
    """One line that names the file and says what is wrong."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    assert text.startswith(str(file)), text
    assert re.search(message, text), text


def at_size(path):
    with ImageFile(path) as file:
        return file.pixels((3, 2))


@pytest.mark.parametrize("case", corpus.IMAGES, ids=str)
def test_images(tmp_path, case, untouched):
    path = tmp_path / case.name
    case.write(path)
    with untouched():
        if case.good is None:
            refused(lambda: load_image(path), f"{path}: ", case.message)
            refused(lambda: at_size(path), f"{path}: ", case.message)
            return
        pixels = load_image(path)
        assert image_size(path) == case.good.shape[1::-1]
        assert at_size(path).shape == (2, 3, 3)
    assert pixels.dtype == np.uint8 and pixels.shape == case.good.shape
    assert np.abs(pixels.astype(int) - case.good).mean() <= case.tolerance


@pytest.mark.parametrize("peculiar", corpus.NAMES)
def test_peculiar_names(tmp_path, peculiar):
    name = corpus.NAMES[peculiar]
    Image.fromarray(COLOR).save(tmp_path / name, "PNG")
    assert np.array_equal(load_image(tmp_path / name), COLOR)
    assert list_images(tmp_path) == [name]


def test_folders_with_loops_pipes_and_folders_named_like_images(tmp_path):
    (tmp_path / "sub.png").mkdir()
    for place in (tmp_path, tmp_path / "sub.png"):
        Image.fromarray(COLOR).save(place / "a.png")
        (place / "loop").symlink_to(tmp_path)
        (place / "itself.png").symlink_to("itself.png")
        os.mkfifo(place / "pipe.png")
    assert list_images(tmp_path) == ["a.png", "sub.png/a.png"]


@pytest.mark.parametrize("case", corpus.MASKS, ids=str)
def test_masks(tmp_path, case, untouched):
    path = tmp_path / "masks" / case.name
    path.parent.mkdir()
    case.write(path)
    Image.fromarray(COLOR).save(tmp_path / "image.png")
    record = {"fpath_img": "image.png", "fpath_segm": f"masks/{case.name}"}
    options = {
        "num_class": 3, "imgSizes": [corpus.HEIGHT], "segm_downsampling_rate": 1,
        "random_flip": False,
    }  # fmt: skip
    for kind in (TrainDataset, ValDataset):
        with untouched():
            data = kind(tmp_path, [record], options)
            if case.good is None:
                refused(lambda data=data: data[0], f"{path}: ", case.message)
            else:
                labels = data[0]["seg_label"][0].numpy()
                assert np.array_equal(labels, case.good.astype(int) - 1)


# ------------------------------------------------------------------------------ lists
@pytest.mark.parametrize("case", corpus.LISTS, ids=str)
def test_lists(tmp_path, command, case):
    path = tmp_path / case.name
    case.write(path)
    if case.good is None:
        refused(lambda: read_odgt(path), path, case.message)
        error = command("data", "check", path).error
        assert str(path) in error and re.search(case.message, error)
        return
    records = read_odgt(path)
    assert len(records) == case.good
    expected = json.loads(corpus.RECORD)
    for record in records:
        for key, value in record.items():
            assert str(Path(str(value))).replace("masks/../", "") == str(expected[key])


@pytest.mark.parametrize("case", corpus.SAMPLES, ids=str)
def test_samples_that_cannot_be_used(tmp_path, case):
    for folder, pixels in (("images", COLOR), ("masks", corpus.LABELS)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    path = tmp_path / case.name
    case.write(path)
    options = {"num_class": 3, "imgSizes": [24]}
    refused(lambda: TrainDataset(tmp_path, str(path), options)[0], "", case.message)
    if "list says" not in case.message:  # sizes are for batches alone
        refused(lambda: ValDataset(tmp_path, str(path), options)[0], "", case.message)


# ------------------------------------------------------------------------------ configurations
@pytest.mark.parametrize("case", corpus.CONFIGS, ids=str)
def test_configurations(tmp_path, command, untouched, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / case.name
    case.write(path)
    if case.good is not None:
        assert load_config(path).TRAIN.seed == case.good
        return
    with untouched():  # none runs code, which would make a folder
        error = command("train", "--cfg", path).error
    assert str(path) in error and re.search(case.message, error)


@pytest.mark.parametrize("words", [["eval"], ["predict", "--imgs", "x.jpg"]])
def test_every_command_refuses_a_bad_configuration(tmp_path, command, words):
    path = tmp_path / "unknown.yaml"
    path.write_text("TRAIN:\n  sead: 3\n")
    error = command(words[0], "--cfg", path, *words[1:]).error
    assert re.search(rf"{path}.*TRAIN\.sead.*TRAIN\.seed", error)
