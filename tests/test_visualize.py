"""Colours, overlays, legends and charts; pictures are checked by their pixels."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mit_semseg import visualize
from mit_semseg.visualize.canvas import fit_text, text_width
from mit_semseg.visualize.charts import ticks

COLORS = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 240]], dtype=np.uint8)
NAMES = ("sky", "road", "car")
LABEL = np.array([[-1, 0, 1], [2, 2, 0]])


def count(picture: np.ndarray, color: np.ndarray | tuple[int, ...]) -> int:
    return int((picture == np.asarray(color, np.uint8)).all(axis=-1).sum())


# ------------------------------------------------------------------------------ palette
def test_palette_is_distinct_and_starts_alike() -> None:
    colors = visualize.palette(181)
    assert colors.dtype == np.uint8
    assert colors.shape == (181, 3)
    assert len(np.unique(colors, axis=0)) == 181
    assert np.array_equal(visualize.palette(20), colors[:20])
    assert colors.sum(1).min() > 60  # black stands for unlabelled
    for a, b in itertools.combinations(colors[:20].astype(int), 2):
        assert np.abs(a - b).sum() > 40


def test_palette_is_a_copy_and_is_refused_when_senseless() -> None:
    visualize.palette(5)[:] = 0
    assert visualize.palette(5).any()
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match=f"num_class is {wrong}"):
            visualize.palette(wrong)


# ------------------------------------------------------------------------------ label maps
def test_color_encode_by_hand() -> None:
    black, red, green, blue = [0, 0, 0], [255, 0, 0], [0, 200, 0], [10, 20, 240]
    assert visualize.color_encode(LABEL, COLORS).tolist() == [
        [black, red, green],
        [blue, blue, red],
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.int64])
def test_color_encode_takes_any_integers(dtype: type) -> None:
    label = np.maximum(LABEL, 0).astype(dtype)
    assert np.array_equal(visualize.color_encode(label, COLORS), COLORS[np.maximum(LABEL, 0)])


def test_any_negative_label_is_unlabelled() -> None:
    assert not visualize.color_encode(np.array([[-1, -2, -100]]), COLORS).any()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.array([[3]]), "label 3 has no colour: there are 3 colours"),
        (np.array([[255]], dtype=np.uint8), "label 255 has no colour"),
        (np.array([[0.0]]), "float64"),
        (np.array([0, 1]), r"shape \(2,\)"),
    ],
)
def test_color_encode_names_what_is_wrong(label: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize.color_encode(label, COLORS)


def test_overlay_by_hand() -> None:
    img = np.full((2, 3, 3), 100, np.uint8)
    mixed = visualize.overlay(img, LABEL, COLORS, 0.25)
    assert mixed[0, 0].tolist() == [100, 100, 100]  # unlabelled: the picture itself
    assert mixed[0, 1].tolist() == [139, 75, 75]  # 0.75 * 100 + 0.25 * (255, 0, 0)
    assert img.min() == img.max() == 100
    assert np.array_equal(visualize.overlay(img, np.abs(LABEL), COLORS, 1), COLORS[np.abs(LABEL)])
    assert np.array_equal(visualize.overlay(img, LABEL, COLORS, 0), img)


def test_overlay_outlines_where_classes_meet() -> None:
    img, label = np.full((4, 6, 3), 90, np.uint8), np.zeros((4, 6), int)
    label[:, 3:] = 1
    plain = visualize.overlay(img, label, COLORS)
    outlined = visualize.overlay(img, label, COLORS, outline=True)
    changed = (plain != outlined).any(axis=(0, 2))
    assert changed.tolist() == [False, False, False, True, False, False]


def test_overlay_refuses_other_sizes() -> None:
    img = np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(ValueError, match=r"img is \(2, 3\) but label \(3, 2\)"):
        visualize.overlay(img, LABEL.T, COLORS)
    with pytest.raises(ValueError, match="alpha is 50"):
        visualize.overlay(img, LABEL, COLORS, 50)
    with pytest.raises(ValueError, match="img is float64"):
        visualize.overlay(img / 255, LABEL, COLORS)


def test_side_by_side() -> None:
    a, b = np.full((2, 3, 3), 1, np.uint8), np.full((2, 1, 3), 2, np.uint8)
    assert visualize.side_by_side(a, b)[0, :, 0].tolist() == [1, 1, 1, 2]
    assert visualize.side_by_side(b, a, b, gap=1)[1, :, 0].tolist() == [2, 255, 1, 1, 1, 255, 2]
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        visualize.side_by_side(a, np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="one or more"):
        visualize.side_by_side()


# ------------------------------------------------------------------------------ legends
def test_legend_shows_every_colour_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "legend.png"
    picture = visualize.legend(NAMES, COLORS, [0.5, 0.3, 0.0002], path=path)
    tops = [np.nonzero((picture == c).all(-1).any(1))[0][0] for c in COLORS]
    assert tops == sorted(tops)
    assert min(count(picture, c) for c in COLORS) > 100  # 16 x 16 less rim and corners
    assert np.array_equal(np.array(Image.open(path)), picture)
    assert visualize.legend(NAMES, COLORS).shape[1] < picture.shape[1]  # no areas: narrower


def test_a_long_legend_has_columns() -> None:
    colors = visualize.palette(150)
    picture = visualize.legend([f"class {k}" for k in range(150)], colors)
    assert picture.shape[0] < 30 * 24 + 40
    assert all(count(picture, c) > 100 for c in colors)


def test_an_empty_legend_is_a_picture_and_lengths_must_agree() -> None:
    assert visualize.legend([], COLORS[:0], []).std() > 0
    with pytest.raises(ValueError, match="2 names, 3 colours and no areas"):
        visualize.legend(NAMES[:2], COLORS)
    with pytest.raises(ValueError, match="1 areas"):
        visualize.legend(NAMES, COLORS, [1.0])


def test_prediction_sheet() -> None:
    img = np.full((315, 420, 3), 120, np.uint8)
    pred = np.zeros((315, 420), int)
    pred[:, 210:] = 1
    truth = pred.copy()
    truth[:158, 210:], truth[158:, :210] = 0, -1
    without = visualize.prediction_sheet(img, pred, NAMES, COLORS)
    sheet = visualize.prediction_sheet(img, pred, NAMES, COLORS, truth, title="a.png")
    assert sheet.shape[0] > without.shape[0]  # two rows of panels
    panel = 420 * 315
    # Half the prediction is each class; in the truth road keeps half of its own half.
    assert count(without, COLORS[1]) == pytest.approx(panel / 2, rel=0.01)
    assert count(sheet, COLORS[1]) == pytest.approx(panel * 0.75, rel=0.01)
    # A quarter is wrong: (120 / 2 + 120) * 0.35 + 0.65 * (225, 30, 40).
    assert count(sheet, (209, 82, 89)) == pytest.approx(panel / 4, rel=0.01)
    assert count(sheet, COLORS[2]) == 0  # does not occur
    with pytest.raises(ValueError, match=r"truth is \(2, 2\)"):
        visualize.prediction_sheet(img, pred, NAMES, COLORS, truth[:2, :2])


def test_prediction_sheet_of_many_classes_keeps_its_height() -> None:
    pred = np.arange(150).repeat(8).reshape(30, 40)
    img = np.zeros((30, 40, 3), np.uint8)
    names = [f"a class with a rather long name, number {k}" for k in range(150)]
    sheet = visualize.prediction_sheet(img, pred, names, visualize.palette(150))
    assert sheet.shape[0] < 400


# ------------------------------------------------------------------------------ charts
def history(epochs: int, steps: int = 20) -> list[dict[str, float | str]]:
    records: list[dict[str, float | str]] = []
    for epoch, step in itertools.product(range(1, epochs + 1), range(1, steps + 1)):
        at = (epoch - 1) * steps + step
        records.append(
            {"kind": "train", "epoch": epoch, "step": at, "loss": 2 / at, "lr_encoder": 0.1}
        )
        if step == steps:
            records.append({"kind": "val", "epoch": epoch, "mean_iou": epoch / epochs})
    return records


BLUE, GREEN = (37, 99, 190), (30, 140, 90)


def test_curves_draw_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    picture = visualize.curves(history(5), path)
    assert np.array_equal(np.array(Image.open(path)), picture)
    assert picture.shape[1] == 3 * 470  # loss, accuracy, learning rate
    assert count(picture, GREEN) > 100  # mean IoU
    assert count(picture[:, : 2 * 470], BLUE) > 100  # loss
    fewer = [{k: v for k, v in r.items() if k != "lr_encoder"} for r in history(5)]
    assert visualize.curves(fewer).shape[1] == 2 * 470


def test_curves_place_points_by_value_and_epoch() -> None:
    # A straight rise of the mean IoU, 0.25 .. 1 over four epochs, must be drawn straight.
    records = [{"epoch": e, "mean_iou": e / 4} for e in (1, 2, 3, 4)]
    rows, columns = np.nonzero((visualize.curves(records) == GREEN).all(-1))
    line = rows > 100  # below the key
    slope, start = np.polyfit(columns[line], rows[line], 1)
    assert slope < 0
    assert np.abs(slope * columns[line] + start - rows[line]).max() < 6
    # Epoch 4 at 100 % is the upper right corner of the plot; the axes begin at 62 pixels.
    assert columns[line].max() == pytest.approx(450, abs=5)
    assert columns[line].min() == pytest.approx(62 + (450 - 62) / 4, abs=5)


def test_curves_survive_sparse_and_broken_figures() -> None:
    assert visualize.curves([]).std() > 0
    assert visualize.curves([{"loss": 1.0}]).shape == visualize.curves([]).shape
    broken = [{"epoch": 1, "step": s, "loss": v} for s, v in enumerate([1, math.nan, math.inf], 1)]
    assert np.array_equal(visualize.curves(broken), visualize.curves(broken))
    assert count(visualize.curves(broken), BLUE) > 0
    assert visualize.curves([{"epoch": 1, "loss": None}]).shape == visualize.curves([]).shape
    assert count(visualize.curves([{"epoch": 3, "step": 9, "loss": 0.0}]), BLUE) > 0


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 8))
def test_ticks_enclose_and_are_few(low: float, span: float, wanted: int) -> None:
    found = ticks(low, low + span, wanted)
    slack = 1e-6 * max(1.0, abs(low), span)
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= wanted + 3  # one interval more at either end
    assert all(a < b for a, b in itertools.pairwise(found))


def test_ticks_by_hand() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 2.4) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert ticks(0, 100, 6) == [0, 20, 40, 60, 80, 100]


def test_class_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    path = tmp_path / "bars.png"
    picture = visualize.class_bars(NAMES, [0.5, 1.0, math.nan], COLORS, path)
    assert np.array_equal(np.array(Image.open(path)), picture)
    lengths = [(picture == c).all(-1).sum(1).max() for c in COLORS]
    # 260 pixels are 100 %; the rim and the dashed line of the mean take some.
    assert lengths[0] == pytest.approx(130, abs=6)
    assert lengths[1] == pytest.approx(260, abs=6)
    assert lengths[2] == 0  # absent: n/a, no bar
    tops = [np.nonzero((picture == c).all(-1).any(1))[0][0] for c in COLORS[:2]]
    assert tops[1] < tops[0]  # the best first


def test_class_bars_of_nothing_known_and_of_none() -> None:
    assert np.array_equal(
        visualize.class_bars(NAMES, [None] * 3, COLORS),
        visualize.class_bars(NAMES, [math.nan] * 3, COLORS),
    )
    with pytest.raises(ValueError, match="3 names, 2 values and 3 colours"):
        visualize.class_bars(NAMES, [0.5, 0.5], COLORS)
    with pytest.raises(ValueError, match="0 names"):
        visualize.class_bars([], [], COLORS[:0])


def test_long_names_are_cut_to_fit() -> None:
    name = "a class with a name that goes on and on"
    assert fit_text(name, 13, 1000) == name
    cut = fit_text(name, 13, 100)
    assert cut.endswith("...")
    assert name.startswith(cut[:-3])
    assert text_width(cut, 13) <= 100


def test_ratio_bars_grow_with_the_ratio(tmp_path: Path) -> None:
    rows = [("one", "double", 2.0), ("one", "tenfold", 10.0), ("two", "slower", 0.5)]
    picture = visualize.ratio_bars(rows, tmp_path / "bars.png", title="Faster")
    assert (tmp_path / "bars.png").exists()
    blue = (picture == (37, 99, 190)).all(-1)
    lengths = sorted({int(n) for n in blue.sum(1) if n})
    # Logarithmic: ten is 3.3 times as far from 1 as two.
    assert lengths[-1] / lengths[0] == pytest.approx(np.log(10) / np.log(2), rel=0.1)
    for wrong in ([], [("a", "b", 0.0)], [("a", "b", float("nan"))]):
        with pytest.raises(ValueError, match="above 0"):
            visualize.ratio_bars(wrong)


def test_loss_curves_draw_every_run(tmp_path: Path) -> None:
    runs = {"bf16": [3.0, 2.0, 1.0], "fp32": [3.1, 2.1, 1.1]}
    picture = visualize.loss_curves(runs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()
    for color in ((224, 112, 32), (37, 99, 190)):
        assert (picture == color).all(-1).sum() > 100
    for wrong in ({}, {"a": []}, {str(k): [1.0] for k in range(5)}):
        with pytest.raises(ValueError, match="runs"):
            visualize.loss_curves(wrong)
