"""A file that cannot be read, as on a dead network disk: each command ends, and names it."""

import multiprocessing
import os
import threading

import pytest
import torch

from mit_semseg.dataset import images, read_odgt
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.predict import predict
from mit_semseg.engine.train import train
from mit_semseg.engine.watchdog import Watchdog

CPU = torch.device("cpu")


@pytest.fixture
def hang(monkeypatch):
    """`hang(file, after=0)`: opening this file of a list takes, but for the first `after` times,
    until a watchdog ends the process. What is returned gets the exit status."""
    ended = threading.Event()
    statuses = []
    open_file = images._open

    def end(status):
        statuses.append(status)
        ended.set()

    def hang(file, after=0):
        opened, here = 0, os.getpid()  # loading processes have a time limit of their own

        def slow(path, content=None):
            nonlocal opened
            if os.fspath(path).endswith(file) and os.getpid() == here:
                opened += 1
                if opened > after:
                    assert ended.wait(20), f"nobody ended the reading of {path}"
            return open_file(path, content)

        monkeypatch.setattr(images, "_open", slow)
        return statuses

    begin = Watchdog.__init__
    assert begin.__defaults__ is not None and begin.__defaults__[-1] is os._exit
    monkeypatch.setattr(begin, "__defaults__", (*begin.__defaults__[:-1], end))
    return hang


def stalled(capfd):
    output = capfd.readouterr().err
    return next(line for line in output.splitlines() if "error: no progress" in line)


# How often the mask is opened before: the samples of both lists are looked at.
@pytest.mark.parametrize(
    ("when", "after", "awaited"),
    [
        ("the first look at the data", 0, "waiting for a file to be read"),
        ("the count of the classes", 2, "waiting for a file to be read"),
        ("validation", 3, "waiting for an image to be validated"),
    ],
)
def test_training(settings, hang, capfd, when, after, awaited):
    cfg = settings(
        TRAIN__num_epoch=1,
        TRAIN__epoch_iters=1,
        TRAIN__eval_epochs=1,
        TRAIN__class_weights="median",
        TRAIN__workers=1,  # the training images are opened in another process
        TRAIN__stall_seconds=1,
    )
    mask = read_odgt(cfg.DATASET.list_val)[2]["fpath_segm"]
    statuses = hang(mask, after)
    train(cfg, [CPU], progress=False)
    assert statuses == [3], when
    line = stalled(capfd)
    assert awaited in line and f"{mask};" in line.partition("being read: ")[2]
    assert "TRAIN.stall_seconds" in line
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_other_commands(tmp_path, make_model, make_images, hang, capfd, command):
    data = tmp_path / "data"
    make_images(data, [(32, 48)] * 3)
    lists = {"DATASET__root_dataset": str(data), "DATASET__list_val": str(data / "val.odgt")}
    limits = {"VAL__timeout": 1, "TEST__timeout": 1, "TEST__result": str(tmp_path / "out")}
    cfg = make_model(tmp_path / "model", ("road", "sky", "car", "tree"), **lists, **limits)
    image = read_odgt(cfg.DATASET.list_val)[1]["fpath_img"]
    statuses = hang(image)
    if command == "evaluate":
        evaluate(cfg, [CPU], progress=False)
    else:
        predict(cfg, (data / image).parent, CPU, progress=False)
    assert statuses == [3]
    line, key = stalled(capfd), "VAL" if command == "evaluate" else "TEST"
    assert "waiting for a file to be read; being read: " in line
    assert f"{image};" in line and f"raise {key}.timeout" in line
