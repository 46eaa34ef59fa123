"""The published helper names."""

from __future__ import annotations

import doctest
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
def test_parse_devices(text: str, devices: list[str]) -> None:
    assert utils.parse_devices(text) == devices


@pytest.mark.parametrize("text", ["", "x", "0-", "-1", "0,,1", "0;1", "cuda:0", "gpu"])
def test_parse_devices_refuses_with_an_example(text: str) -> None:
    with pytest.raises(utils.NotSupportedCliException, match="write 0-3, 0,2, gpu0-gpu2 or cpu"):
        utils.parse_devices(text)
    assert issubclass(utils.NotSupportedCliException, ValueError)  # one line on the command line


def test_what_names_a_device_can_be_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    more = (re.compile(r"^npu(\d+)$"), lambda groups: [f"npu{groups[0]}"])
    monkeypatch.setattr(utils, "REGEX", [*utils.REGEX, more])
    assert utils.parse_devices("npu1,0") == ["npu1", "gpu0"]


# ------------------------------------------------------------------------------ figures
def test_accuracy_ignores_negative_labels() -> None:
    preds = np.array([[0, 1, 2], [2, 2, 0]])
    label = np.array([[0, 1, 1], [-1, 2, -1]])
    value, valid = utils.accuracy(preds, label)
    assert valid == 4
    assert value == pytest.approx(3 / 4)
    assert utils.accuracy(preds, np.full((2, 3), -1)) == (0.0, 0)


def test_intersection_and_union_by_hand() -> None:
    pred = np.array([[0, 0, 1], [1, 2, 2]])
    label = np.array([[0, 1, 1], [-1, 2, 0]])
    intersection, union = utils.intersectionAndUnion(pred, label, 4)
    # The prediction 1 at the ignored pixel counts nowhere.
    assert intersection.tolist() == [1, 1, 1, 0]
    assert union.tolist() == [3, 2, 2, 0]


def test_labels_out_of_range_leave_both_sides() -> None:
    pred, label = np.array([0, 1, 1, 0]), np.array([0, 1, 7, 255], dtype=np.uint8)
    intersection, union = utils.intersectionAndUnion(pred, label, 2)
    assert intersection.tolist() == [1, 1]
    assert union.tolist() == [1, 1]


def test_intersection_and_union_leave_their_arguments_alone() -> None:
    pred, label = np.array([0, 1]), np.array([0, -1])
    utils.intersectionAndUnion(pred, label, 2)
    assert pred.tolist() == [0, 1]
    assert label.tolist() == [0, -1]


def test_average_meter_weighs() -> None:
    meter = utils.AverageMeter()
    assert meter.average() is None
    meter.update(1.0)
    meter.update(4.0, weight=2)
    assert meter.initialized
    assert meter.value() == meter.val == 4.0
    assert meter.average() == meter.avg == pytest.approx(3.0)
    assert meter.sum == pytest.approx(9.0)
    assert meter.count == 3


def test_average_meter_starts_anew() -> None:
    meter = utils.AverageMeter()
    meter.initialize(2.0, 3)
    meter.add(4.0, 1)
    assert meter.average() == pytest.approx(2.5)
    meter.initialize(1.0, 2)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (1.0, 1.0, 2.0, 2)


def test_average_meter_of_arrays_keeps_its_own_sum() -> None:
    meter, values = utils.AverageMeter(), np.array([1.0, 2.0])
    meter.update(values)
    meter.update(np.array([3.0, 6.0]))
    np.testing.assert_array_equal(meter.average(), [2.0, 4.0])
    np.testing.assert_array_equal(values, [1.0, 2.0])


def test_unique_flattens() -> None:
    array = np.array([[3, 1], [3, 2]])
    values, index, inverse, counts = utils.unique(array, True, True, True)
    assert values.tolist() == [1, 2, 3]
    assert index.tolist() == [1, 3, 0]
    assert inverse.tolist() == [2, 0, 2, 1]
    assert counts.tolist() == [1, 1, 2]
    assert utils.unique(array).tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------ colours
def test_color_encode_leaves_unlabelled_black() -> None:
    colors = np.array([[255, 0, 1], [0, 128, 2]], dtype=np.uint8)
    labels = np.array([[-1, 0], [1, 1]])
    rgb = utils.colorEncode(labels, colors)
    assert rgb.dtype == np.uint8
    assert rgb.tolist() == [[[0, 0, 0], [255, 0, 1]], [[0, 128, 2], [0, 128, 2]]]
    assert utils.colorEncode(labels, colors, mode="BGR")[0, 1].tolist() == [1, 0, 255]
    with pytest.raises(ValueError, match="'RGB' or 'BGR'"):
        utils.colorEncode(labels, colors, mode="HSV")


def test_color_encode_takes_class_ids_of_any_number_type() -> None:
    colors = np.array([[10, 0, 0], [0, 20, 0]], dtype=np.uint8)
    label = np.array([[-1.0, 1.0]])
    assert utils.colorEncode(label, colors).tolist() == [[[0, 0, 0], [0, 20, 0]]]


# ------------------------------------------------------------------------------ files
def test_find_recursive(tmp_path: Path) -> None:
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
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("mit_semseg")
    before = logger.level, logger.handlers[:]
    yield logger
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(before[0])
    for handler in before[1]:
        logger.addHandler(handler)


def test_a_line_is_written_once(
    logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "lines.txt"
    for _ in range(3):
        assert utils.setup_logger(filename="lines.txt", folder=str(file.parent)) is logger
    assert not file.exists()
    logging.getLogger("mit_semseg.engine").info("hello")
    out = capsys.readouterr().out
    assert out.count("hello") == 1
    assert file.read_text(encoding="utf-8") == out


@pytest.mark.parametrize("given", [{}, {"distributed_rank": 0, "filename": "log.txt"}])
def test_no_file_is_written_unasked(
    logger: logging.Logger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
) -> None:
    """As published, whatever `filename` is."""
    monkeypatch.chdir(tmp_path)
    utils.setup_logger(**given).info("hello")
    assert not list(tmp_path.iterdir())


def test_other_ranks_only_warn(
    logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    utils.setup_logger(distributed_rank=1, folder=str(tmp_path))
    logger.info("quiet")
    logger.warning("loud")
    out = capsys.readouterr().out
    assert "quiet" not in out
    assert "loud" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("named", "who"), [(True, " rank 1"), (False, "")])
def test_lines_name_their_rank_where_there_are_several(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], named: bool, who: str
) -> None:
    utils.setup_logger(distributed_rank=1, named=named)
    logger.warning("loud")
    line = capsys.readouterr().out
    assert re.fullmatch(rf"\[\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d{who} WARNING\] loud\n", line), line


def test_importing_is_light() -> None:
    code = "import sys, mit_semseg.utils; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_examples_run() -> None:
    result = doctest.testmod(utils)
    assert result.attempted > 0
    assert result.failed == 0
