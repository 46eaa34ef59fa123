"""Which files are being read, as others see it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io

from mit_semseg.dataset.images import ImageFile, load_depth, load_image, load_mask
from mit_semseg.dataset.reading import READINGS, Readings


def test_one_file_is_read_while_another_is_open() -> None:
    readings = Readings()
    heard: list[str] = []
    readings.listener = heard.append
    with readings.of("image"):
        first = readings.oldest()
        with pytest.raises(OSError, match="broken"), readings.of(Path("mask")):
            assert readings.files() == ["mask"]
            raise OSError("broken")
        assert readings.files() == ["image"] and readings.oldest() == first
    assert not readings.files() and readings.oldest() is None
    with readings.of("image"):
        assert readings.oldest() != first
    assert heard == ["image", "mask", "image", ""] + ["image", ""]


def test_every_thread_reads_its_own_file() -> None:
    readings = Readings()
    inside, done = threading.Barrier(4), threading.Barrier(4)

    def read(name: str) -> None:
        with readings.of(name):
            inside.wait(10)
            done.wait(10)

    threads = [threading.Thread(target=read, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert sorted(readings.files()) == ["a", "b", "c"]
    oldest = readings.oldest()
    assert oldest is not None and oldest[0] == 0
    done.wait(10)
    for thread in threads:
        thread.join()
    assert not readings.files()


def depth(path: Path) -> np.ndarray:
    return load_depth(path, 1000)


@pytest.mark.parametrize(
    ("name", "load"),
    [("a.png", load_image), ("a.jpg", load_image), ("a.png", load_mask), ("a.png", depth)],
)
def test_every_kind_of_file_is_noted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    load: Callable[[Path], np.ndarray],
) -> None:
    file = tmp_path / name
    cv2.imwrite(str(file), np.zeros((4, 5), np.uint8))
    heard: list[str] = []
    monkeypatch.setattr(READINGS, "listener", heard.append)
    load(file)
    assert heard == [str(file), ""]
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="an empty file"):
        load(file)
    assert heard == [str(file), ""] * 2 and not READINGS.files()


def test_masks_of_matlab_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.mat"
    classes = np.zeros((4, 5), np.uint8)
    scipy.io.savemat(file, {"GTcls": {"Segmentation": classes}})
    heard: list[str] = []
    monkeypatch.setattr(READINGS, "listener", heard.append)
    load_mask(file)
    assert heard == [str(file), ""]


def test_an_image_is_being_read_as_long_as_it_is_open(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    cv2.imwrite(str(file), np.zeros((4, 5, 3), np.uint8))
    with ImageFile(file) as image:
        assert READINGS.files() == [str(file)]
        image.pixels()
    assert not READINGS.files()
