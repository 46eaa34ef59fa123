"""Every image and mask of the corpus, by the functions that read them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus import COLOR, Case
from PIL import Image

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.images import ImageFile, image_size, load_image
from mit_semseg.dataset.records import list_images

Untouched = Callable[..., AbstractContextManager[None]]


def clear(caught: pytest.ExceptionInfo[Exception], file: object, message: str) -> None:
    """One line that names the file and says what is wrong."""
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    assert text.startswith(f"{file}: "), text
    assert re.search(message, text), text


@pytest.mark.parametrize("case", corpus.READABLE, ids=str)
def test_peculiar_images_are_read_right(tmp_path: Path, case: Case, untouched: Untouched) -> None:
    path = tmp_path / case.name
    case.write(path)
    height, width = case.good.shape[:2]
    with untouched():
        pixels = load_image(path)
        assert image_size(path) == (width, height)
        with ImageFile(path) as file:
            small = file.pixels((3, 2))
    assert pixels.dtype == np.uint8 and pixels.shape == (height, width, 3)
    assert np.abs(pixels.astype(int) - case.good).mean() <= case.tolerance
    assert small.shape == (2, 3, 3)


@pytest.mark.parametrize("case", corpus.UNREADABLE, ids=str)
def test_bad_images_are_refused_in_one_line(
    tmp_path: Path, case: Case, untouched: Untouched
) -> None:
    path = tmp_path / case.name
    case.write(path)
    with untouched():
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_image(path)
        clear(caught, path, case.message)
        with (
            pytest.raises((ValueError, FileNotFoundError)) as caught,
            ImageFile(path) as file,
        ):
            file.pixels((3, 2))
        clear(caught, path, case.message)


@pytest.mark.parametrize("peculiar", corpus.NAMES)
def test_peculiar_names(tmp_path: Path, peculiar: str) -> None:
    name = corpus.NAMES[peculiar]
    Image.fromarray(COLOR).save(tmp_path / name, "PNG")
    assert np.array_equal(load_image(tmp_path / name), COLOR)
    assert list_images(tmp_path) == [name]


def test_folders_with_loops_pipes_and_folders_named_like_images(tmp_path: Path) -> None:
    (tmp_path / "sub.png").mkdir()
    for place in (tmp_path, tmp_path / "sub.png"):
        Image.fromarray(COLOR).save(place / "a.png")
        (place / "loop").symlink_to(tmp_path)
        (place / "itself.png").symlink_to("itself.png")
        os.mkfifo(place / "pipe.png")
    assert list_images(tmp_path) == ["a.png", "sub.png/a.png"]


@pytest.mark.parametrize("case", corpus.MASKS, ids=str)
@pytest.mark.parametrize("kind", [TrainDataset, ValDataset])
def test_masks(tmp_path: Path, case: Case, kind: Any, untouched: Untouched) -> None:
    path = tmp_path / "masks" / case.name
    path.parent.mkdir()
    case.write(path)
    Image.fromarray(COLOR).save(tmp_path / "image.png")
    record = {"fpath_img": "image.png", "fpath_segm": f"masks/{case.name}"}
    options = {
        "num_class": 3,
        "imgSizes": [corpus.HEIGHT],
        "segm_downsampling_rate": 1,
        "random_flip": False,
    }
    with untouched():
        data = kind(tmp_path, [record], options)
        if case.good is not None:
            labels = data[0]["seg_label"][0].numpy()
            assert np.array_equal(labels, case.good.astype(int) - 1)
        else:
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                data[0]
            clear(caught, path, case.message)
