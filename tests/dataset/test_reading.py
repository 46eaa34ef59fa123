"""Which files are being read, as others see it."""

import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from dataset_files import put

from mit_semseg.dataset.images import ImageFile, load_depth, load_image, load_mask
from mit_semseg.dataset.reading import READINGS, Readings


@pytest.fixture
def heard(monkeypatch):
    """What this process says it reads."""
    files = []
    monkeypatch.setattr(READINGS, "listener", files.append)
    return files


def test_nested_readings():
    readings = Readings()
    heard = []
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


def test_every_thread_reads_its_own_file():
    readings = Readings()
    inside, done = threading.Barrier(4), threading.Barrier(4)

    def read(name):
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


def depth(path):
    return load_depth(path, 1000)


@pytest.mark.parametrize(
    ("name", "load"),
    [("a.png", load_image), ("a.jpg", load_image), ("a.png", load_mask), ("a.png", depth),
     ("a.mat", load_mask)],
)  # fmt: skip
def test_every_kind_of_file_is_noted(tmp_path, heard, name, load):
    file = tmp_path / name
    grey = np.zeros((4, 5), np.uint8)
    if name == "a.mat":
        scipy.io.savemat(file, {"GTcls": {"Segmentation": grey}})
    else:
        put(file, grey)
    load(file)
    assert heard == [str(file), ""]
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"an empty file|a\.mat: has no mask"):
        load(file)
    assert heard == [str(file), ""] * 2 and not READINGS.files()


def test_an_image_is_being_read_as_long_as_it_is_open(samples):
    file = samples.root / samples.write("a")["fpath_img"]
    with ImageFile(file) as image:
        assert READINGS.files() == [str(file)]
        image.pixels()
    assert not READINGS.files()


def test_every_file_of_a_batch_is_named_before_it_is_read(samples, heard):
    data = samples.train(samples.mixed(), 2)
    batch = data[0]
    expected = []
    for image in batch["info"]:
        mask = image.replace("images", "masks")
        # The mask is read between the image's header and its pixels.
        expected += [str(samples.root / name) for name in (image, mask, image)] + [""]
    assert heard == expected
    (samples.root / batch["info"][0]).unlink()
    heard.clear()
    with pytest.raises(FileNotFoundError):
        data[0]
    assert heard == [expected[0], ""]


def write_down(worker):
    info = torch.utils.data.get_worker_info()
    assert info is not None
    folder = Path(info.dataset.root_dataset)

    def reading(file):
        with open(folder / f"worker{worker}", "a") as log:
            log.write(f"{file}\n")

    READINGS.listener = reading


def test_a_worker_listens_to_its_own_reading(samples):
    loader = torch.utils.data.DataLoader(
        samples.train(samples.mixed()), batch_size=None, sampler=range(4), num_workers=2,
        worker_init_fn=write_down,
    )  # fmt: skip
    assert len(list(loader)) == 4 and READINGS.listener is None
    for worker in (0, 1):
        lines = (samples.root / f"worker{worker}").read_text().splitlines()
        assert len(lines) == 8 and lines[3] == lines[7] == ""
