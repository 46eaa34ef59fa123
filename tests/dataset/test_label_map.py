"""Stored values become classes; class tables come from and go to csv."""

import numpy as np
import pytest

from mit_semseg.config import DataOptions
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.label_map import LabelMap

PAIRS = ((7, 0), (8, 1), (26, 2), (0, -1))


@pytest.mark.parametrize(
    ("label_map", "stored", "ids", "known"),
    [
        (LabelMap.shifted(150), [0, 1, 150], [-1, 0, 149], "0..150"),  # as published
        (LabelMap.shifted(3, label_offset=0), [0, 1, 2], [0, 1, 2], "0..2"),
        # Ignored values win over classes, and reach 16 bits.
        (LabelMap.shifted(3, 0, [255, 60000, 1]), [0, 1, 2, 255, 60000], [0, -1, 2, -1, -1],
         "0..2, 255, 60000"),
        (LabelMap({0: 0, 2: 1, 9: -1}, 2), [9, 0, 2], [-1, 0, 1], "0, 2, 9"),
        (LabelMap.of_options(DataOptions(num_class=3, label_map=PAIRS)),
         [0, 7, 26, 8], [-1, 0, 2, 1], "0, 7..8, 26"),
    ],
)  # fmt: skip
def test_stored_values_become_classes(label_map, stored, ids, known):
    found = label_map(np.array([stored], np.uint16))
    assert found.dtype == np.int64 and found.tolist() == [ids]
    assert label_map.describe() == known
    with pytest.raises(ValueError, match=f"^x.png: label 1, 999 is outside {known}; |label 999 is"):
        label_map(np.array([1, 999, stored[0]]), "x.png")


@pytest.mark.parametrize("value", [-7, 4, 255, 256, 70000, 2**31 - 1])
def test_an_unknown_value_is_named_with_file_and_fix(value):
    expected = f"x.png: label {value} is outside 0..3; set DATASET.ignore_label {value} or a label"
    with pytest.raises(ValueError) as caught:
        LabelMap.shifted(4, 0)(np.array([[0, 3], [1, value]], np.int32), "x.png")
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("white", [255, 65535])
def test_a_mask_of_black_and_white_keeps_both_classes(offset, white):
    for stored in ([0, white, white], [white]):
        with pytest.raises(ValueError) as caught:
            LabelMap.shifted(2, offset)(np.array(stored, np.uint16), "x.png")
        message = str(caught.value)
        assert f'set DATASET.num_class 2 DATASET.label_map "[[0, 0], [{white}, 1]]"' in message
        assert "ignore_label" not in message  # which would lose one of them
    options = DataOptions.read({"num_class": 2, "label_map": [[0, 0], [white, 1]]})
    assert LabelMap.of_options(options)(np.array([0, white])).tolist() == [0, 1]


def test_white_in_masks_of_many_classes_may_be_void():
    nine = LabelMap.shifted(9, 0)
    output = nine.complaint([0, 255], "x.png")
    assert '[255, 1]]", else DATASET.ignore_label 255' in output
    for stored, others in (([0, 1, 255], []), ([0, 255], [0, 3, 255])):
        output = nine.complaint(stored, "x.png", others)
        assert (
            "set DATASET.ignore_label 255 or a label map" in output and "two classes" not in output
        )


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("values", [{0: 0, 1: 1}, {0: 0, 3: 1, 255: -1}, {7: 0, 8: 1, 300: -1}])
def test_check_agrees_with_the_label_map(kind, values):
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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label_offset": -1}, "label_offset is -1"),
        ({"label_offset": 0, "ignore_label": [-1]}, r"ignore_label is \[-1\]"),
        ({"label_map": [7, 8]}, r"label_map is \[7, 8\]; give pairs \[mask value, class\]"),
        ({"label_map": [[7, 0, 1]]}, "label_map .*give pairs"),
        ({"label_map": [[0, 0.5]]}, "label_map .*give pairs"),
        ({"label_map": [["7", 0]]}, "label_map .*give pairs"),
        ({"label_map": [[True, 0]]}, "label_map .*give pairs"),
        ({"label_map": [[-1, 0]]}, "label_map .*give pairs"),
        ({"label_map": [{0: 0}]}, "label_map .*give pairs"),
        ({"label_map": [[7, 3]]}, r"class 3, but DATASET.num_class is 3: classes are 0\.\.2"),
        ({"label_map": [[7, -2]]}, "label_map .*class -2"),
        ({"label_map": [[7, 0], [7, 1]]}, "label_map .*has the mask value 7 twice"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=f"DATASET.*{says}"):
        LabelMap.of_options(DataOptions.read({"num_class": 3, **settings}))
    with pytest.raises(ValueError, match=r"maps to -1\.\.1"):
        LabelMap({0: 2}, 2)


# ------------------------------------------------------------------------------ class tables
def test_class_table_round_trip(tmp_path):
    table = ClassTable(("sky", "tree, big"), np.array([[1, 2, 3], [255, 0, 9]], np.uint8))
    file = tmp_path / "c.csv"
    table.save(file)
    assert file.read_text() == 'Idx,Name,R,G,B\n1,sky,1,2,3\n2,"tree, big",255,0,9\n'
    again = ClassTable.load(file)
    assert again.names == table.names
    assert np.array_equal(again.colors, table.colors) and again.colors.dtype == np.uint8
    # Without colours, as the published table; the first name counts.
    file.write_text("Idx,Ratio,Name\n1,0.5,wall\n2,0.1,building;edifice\n")
    bare = ClassTable.load(file)
    assert bare.names == ("wall", "building")
    for colors in (bare.colors, *(ClassTable.numbered(n).colors for n in (1, 21, 182))):
        assert len(np.unique(colors, axis=0)) == len(colors)


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
def test_bad_class_tables(tmp_path, text, says):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        ClassTable.load(tmp_path / "c.csv")
