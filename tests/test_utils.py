"""The published helper names."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mit_semseg import utils

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------ devices
@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("0", ["gpu0"]),
        ("0-3", ["gpu0", "gpu1", "gpu2", "gpu3"]),
        ("0,2", ["gpu0", "gpu2"]),
        ("gpu0-gpu2", ["gpu0", "gpu1", "gpu2"]),
        ("gpu1-2", ["gpu1", "gpu2"]),
        ("0-1,5", ["gpu0", "gpu1", "gpu5"]),
        ("2-0", ["gpu0", "gpu1", "gpu2"]),  # as published
        (" 3 , GPU1, 3,1-3 ", ["gpu3", "gpu1", "gpu2"]),
        ("cpu", ["cpu"]),
        ("CPU", ["cpu"]),
    ],
)
def test_parse_devices(text, devices):
    assert utils.parse_devices(text) == devices


@pytest.mark.parametrize("text", ["", "x", "0-", "-1", "0,,1", "0;1", "cuda:0", "gpu"])
def test_parse_devices_refuses_with_an_example(text):
    assert issubclass(utils.NotSupportedCliException, ValueError)  # one line on the command line
    with pytest.raises(utils.NotSupportedCliException, match="give 0-3, 0,2, .* cpu or mps"):
        utils.parse_devices(text)


def test_kinds_of_devices_can_be_added(monkeypatch):
    more = (re.compile(r"^npu(\d+)$"), lambda groups: [f"npu{groups[0]}"])
    monkeypatch.setattr(utils, "REGEX", [*utils.REGEX, more])
    assert utils.parse_devices("npu1,0") == ["npu1", "gpu0"]


# ------------------------------------------------------------------------------ figures
def test_accuracy_ignores_negative_labels():
    preds = np.array([[0, 1, 2], [2, 2, 0]])
    label = np.array([[0, 1, 1], [-1, 2, -1]])
    value, valid = utils.accuracy(preds, label)
    assert valid == 4
    assert value == pytest.approx(3 / 4)
    assert utils.accuracy(preds, np.full((2, 3), -1)) == (0.0, 0)


def test_intersection_and_union_by_hand():
    pred = np.array([[0, 0, 1], [1, 2, 2]])
    label = np.array([[0, 1, 1], [-1, 2, 0]])
    intersection, union = utils.intersectionAndUnion(pred, label, 4)
    # The prediction 1 at the ignored pixel counts nowhere.
    assert intersection.tolist() == [1, 1, 1, 0]
    assert union.tolist() == [3, 2, 2, 0]
    assert (pred[1, 0], label[1, 0]) == (1, -1)  # arguments are left alone
    # Labels out of range count on neither side.
    pred, label = np.array([0, 1, 1, 0]), np.array([0, 1, 7, 255], dtype=np.uint8)
    intersection, union = utils.intersectionAndUnion(pred, label, 2)
    assert intersection.tolist() == union.tolist() == [1, 1]


def test_average_meter():
    meter = utils.AverageMeter()
    assert meter.average() is None
    meter.update(1.0)
    meter.update(4.0, weight=2)
    assert meter.initialized
    assert meter.value() == meter.val == 4.0
    assert meter.average() == meter.avg == pytest.approx(3.0)
    assert meter.sum == pytest.approx(9.0)
    assert meter.count == 3
    meter.initialize(2.0, 3)
    meter.add(4.0, 1)
    assert meter.average() == pytest.approx(2.5)
    meter.initialize(1.0, 2)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (1.0, 1.0, 2.0, 2)
    meter, values = utils.AverageMeter(), np.array([1.0, 2.0])
    meter.update(values)
    meter.update(np.array([3.0, 6.0]))
    assert meter.average().tolist() == [2, 4] and values.tolist() == [1, 2]


def test_unique_flattens():
    found = utils.unique(np.array([[3, 1], [3, 2]]), True, True, True)
    assert [x.tolist() for x in found] == [[1, 2, 3], [1, 3, 0], [2, 0, 2, 1], [1, 1, 2]]
    assert utils.unique(np.array([[3, 1], [3, 2]])).tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------ colours
def test_color_encode_leaves_unlabelled_black():
    colors = np.array([[255, 0, 1], [0, 128, 2]], dtype=np.uint8)
    labels = np.array([[-1, 0], [1, 1]])
    rgb = utils.colorEncode(labels, colors)
    assert rgb.dtype == np.uint8
    assert rgb.tolist() == [[[0, 0, 0], [255, 0, 1]], [[0, 128, 2], [0, 128, 2]]]
    assert np.array_equal(utils.colorEncode(labels.astype(float), colors), rgb)
    assert utils.colorEncode(labels, colors, mode="BGR")[0, 1].tolist() == [1, 0, 255]
    with pytest.raises(ValueError, match="'RGB' or 'BGR'"):
        utils.colorEncode(labels, colors, mode="HSV")


# ------------------------------------------------------------------------------ files
def test_find_recursive(tmp_path):
    for name in ("b.JPG", "a/c.jpg", "a/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = utils.find_recursive(str(tmp_path))
    assert found == [str(tmp_path / "a/c.jpg"), str(tmp_path / "b.JPG")]
    assert len(utils.find_recursive(str(tmp_path), ext=(".jpg", ".PNG"))) == 3
    with pytest.raises(FileNotFoundError, match="nowhere"):
        utils.find_recursive(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------ logging
@pytest.fixture
def logger():
    logger = logging.getLogger("mit_semseg")
    before = logger.level, logger.handlers[:]
    yield logger
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(before[0])
    for handler in before[1]:
        logger.addHandler(handler)


def test_a_line_is_written_once(logger, tmp_path, capsys):
    file = tmp_path / "run" / "lines.txt"
    for _ in range(3):
        assert utils.setup_logger(filename="lines.txt", folder=str(file.parent)) is logger
    assert not file.exists()
    logging.getLogger("mit_semseg.engine").info("hello")
    out = capsys.readouterr().out
    assert out.count("hello") == 1
    assert file.read_text(encoding="utf-8") == out


@pytest.mark.parametrize("given", [{}, {"distributed_rank": 0, "filename": "log.txt"}])
def test_no_file_is_written_unasked(logger, tmp_path, monkeypatch, given):
    """As published, whatever `filename` is."""
    monkeypatch.chdir(tmp_path)
    utils.setup_logger(**given).info("hello")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("named", "who"), [(True, " rank 1"), (False, "")])
def test_other_ranks_only_warn_and_may_be_named(logger, tmp_path, capsys, named, who):
    utils.setup_logger(distributed_rank=1, folder=str(tmp_path), named=named)
    logger.info("quiet")
    logger.warning("loud")
    line = capsys.readouterr().out
    assert re.fullmatch(rf"\[\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d{who} WARNING\] loud\n", line), line
    assert not list(tmp_path.iterdir())


def test_importing_is_light():
    code = "import sys, mit_semseg.utils; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
