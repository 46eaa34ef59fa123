"""Stored values become classes; class tables come from and go to csv."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mit_semseg.config import DataOptions
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.label_map import LabelMap


def test_published_shift() -> None:
    ids = LabelMap.shifted(150)(np.array([[0, 1, 150]], np.uint8))
    assert ids.dtype == np.int64
    assert ids.tolist() == [[-1, 0, 149]]


def test_offset_zero_keeps_values() -> None:
    assert LabelMap.shifted(3, label_offset=0)(np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_ignored_values_win_over_classes_and_reach_16_bits() -> None:
    label_map = LabelMap.shifted(3, 0, [255, 60000, 1])
    assert label_map(np.array([0, 1, 2, 255, 60000])).tolist() == [0, -1, 2, -1, -1]
    assert label_map.describe() == "0..2, 255, 60000"


@pytest.mark.parametrize("value", [4, 255, 256, 70000, 2**31 - 1])
def test_an_unknown_value_is_named_with_file_and_fix(value: int) -> None:
    with pytest.raises(ValueError) as caught:
        LabelMap.shifted(4, 0)(np.array([[0, 3], [1, value]], np.int32), "x.png")
    assert str(caught.value).startswith(
        f"x.png: label {value} is outside 0..3; set DATASET.ignore_label {value} or a label map"
    )


def test_negative_values_are_unknown() -> None:
    with pytest.raises(ValueError, match="label -7 is outside"):
        LabelMap.shifted(4, 0)(np.array([0, -7], np.int32))


def test_an_unknown_value_in_a_gap() -> None:
    label_map = LabelMap({0: 0, 2: 1, 9: -1}, 2)
    assert label_map(np.array([9, 0, 2])).tolist() == [-1, 0, 1]
    with pytest.raises(ValueError, match=r"label 1, 5 is outside 0, 2, 9"):
        label_map(np.array([1, 5, 0]))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("white", [255, 65535])
def test_a_mask_of_black_and_white_keeps_both_classes(offset: int, white: int) -> None:
    for stored in ([0, white, white], [white]):
        with pytest.raises(ValueError) as caught:
            LabelMap.shifted(2, offset)(np.array(stored, np.uint16), "x.png")
        message = str(caught.value)
        assert f'set DATASET.num_class 2 DATASET.label_map "[[0, 0], [{white}, 1]]"' in message
        assert "ignore_label" not in message  # which would lose one of them
    told = DataOptions.read({"num_class": 2, "label_map": [[0, 0], [white, 1]]})
    assert LabelMap.of_options(told)(np.array([0, white])).tolist() == [0, 1]


def test_void_in_a_mask_of_many_classes_may_be_meant() -> None:
    with pytest.raises(ValueError, match=r"\[255, 1\]\]\", else DATASET.ignore_label 255"):
        LabelMap.shifted(9, 0)(np.array([0, 255], np.uint8))
    with pytest.raises(ValueError, match="set DATASET.ignore_label 255 or a label map"):
        LabelMap.shifted(9, 0)(np.array([0, 1, 255], np.uint8))
    said = LabelMap.shifted(9, 0).complaint([0, 255], "x.png", others=[0, 3, 255])
    assert "set DATASET.ignore_label 255" in said and "two classes" not in said


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="label_offset is -1"):
        LabelMap.shifted(3, -1)
    with pytest.raises(ValueError, match=r"ignore_label is \[-1\]"):
        LabelMap.shifted(3, 0, [-1])
    with pytest.raises(ValueError, match="maps to -1..1"):
        LabelMap({0: 2}, 2)


def test_class_table_round_trip(tmp_path: Path) -> None:
    table = ClassTable(("sky", "tree, big"), np.array([[1, 2, 3], [255, 0, 9]], np.uint8))
    table.save(tmp_path / "c.csv")
    assert (
        tmp_path / "c.csv"
    ).read_text() == 'Idx,Name,R,G,B\n1,sky,1,2,3\n2,"tree, big",255,0,9\n'
    again = ClassTable.load(tmp_path / "c.csv")
    assert again.names == table.names
    assert np.array_equal(again.colors, table.colors) and again.colors.dtype == np.uint8


def test_class_table_without_colors_takes_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("Idx,Ratio,Name\n1,0.5,wall\n2,0.1,building;edifice\n")
    table = ClassTable.load(tmp_path / "c.csv")
    assert table.names == ("wall", "building")
    assert len({tuple(c) for c in table.colors.tolist()}) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Idx,R\n1,2\n", "needs the columns Idx,Name"),
        ("Idx,Name\n", "needs the columns"),
        ("Idx,Name\n1,a\n3,b\n", "Idx is '3' in row 2"),
        ("Idx,Name,R,G,B\n1,a,0,0,256\n", "row 1 has colour"),
        ("Idx,Name,R,G,B\n1,a,0,0\n", "row 1 has colour"),
    ],
)
def test_bad_class_tables(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        ClassTable.load(tmp_path / "c.csv")


def test_generated_colors_differ() -> None:
    for count in (1, 2, 21, 182):
        assert len({tuple(c) for c in ClassTable.numbered(count).colors.tolist()}) == count


def test_pairs_from_the_configuration() -> None:
    options = DataOptions(num_class=3, label_map=((7, 0), (8, 1), (26, 2), (0, -1)))
    labels = LabelMap.of_options(options)(np.array([[0, 7, 26, 8]]), "x.png")
    assert labels.tolist() == [[-1, 0, 2, 1]]
    with pytest.raises(ValueError, match=r"x\.png: label 9 is outside 0, 7\.\.8, 26"):
        LabelMap.of_options(options)(np.array([[9]]), "x.png")


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([7, 8], r"label_map is \[7, 8\]; give pairs \[stored value, class\]"),
        ([[7, 0, 1]], "give pairs"),
        ([[0, 0.5]], "give pairs"),
        ([["7", 0]], "give pairs"),
        ([[True, 0]], "give pairs"),
        ([[-1, 0]], "give pairs"),
        ([{0: 0}], "give pairs"),
        ([[7, 3]], r"class 3, but DATASET.num_class is 3: classes are 0\.\.2"),
        ([[7, -2]], "class -2"),
        ([[7, 0], [7, 1]], "has the stored value 7 twice"),
    ],
)
def test_pairs_of_another_shape_are_refused(pairs: list[object], says: str) -> None:
    with pytest.raises(ValueError, match=f"^DATASET.label_map .*{says}|^DATASET.{says}"):
        DataOptions.read(SimpleNamespace(num_class=3, label_map=pairs))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("values", [{0: 0, 1: 1}, {0: 0, 3: 1, 255: -1}, {7: 0, 8: 1, 300: -1}])
def test_the_check_alone_agrees_with_the_list_of_values(
    kind: type[np.generic], values: dict[int, int]
) -> None:
    label_map = LabelMap(values, 2)
    known = np.array([v for v in values if v <= np.iinfo(kind).max], dtype=kind)
    label_map.check(known)
    label_map.check(known[:0])
    for stored in range(256):
        raw = np.append(known, kind(stored))
        if stored in values:
            label_map.check(raw)
        else:
            with pytest.raises(ValueError, match=f"mask: label {stored} is outside"):
                label_map.check(raw)
