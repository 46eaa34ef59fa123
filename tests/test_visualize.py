"""Colours, overlays and legends, checked by their pixels; charts, by what is drawn on them."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mit_semseg import visualize

COLORS = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 240]], dtype=np.uint8)
NAMES = ("sky", "road", "car")
LABEL = np.array([[-1, 0, 1], [2, 2, 0]])


def count(picture, color):
    return int((picture == np.asarray(color, np.uint8)).all(axis=-1).sum())


# ------------------------------------------------------------------------------ palette
def test_palette_is_distinct_and_a_prefix_of_larger_ones():
    colors = visualize.palette(181)
    assert colors.dtype == np.uint8
    assert colors.shape == (181, 3)
    assert len(np.unique(colors, axis=0)) == 181
    assert np.array_equal(visualize.palette(20), colors[:20])
    assert colors.sum(1).min() > 60  # black stands for unlabelled
    for a, b in itertools.combinations(colors[:20].astype(int), 2):
        assert np.abs(a - b).sum() > 40
    visualize.palette(5)[:] = 0
    assert visualize.palette(5).any(), "a copy"
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match=f"num_class is {wrong}"):
            visualize.palette(wrong)


# ------------------------------------------------------------------------------ label maps
def test_color_encode_by_hand():
    black, red, green, blue = [0, 0, 0], [255, 0, 0], [0, 200, 0], [10, 20, 240]
    wanted = [[black, red, green], [blue, blue, red]]
    assert visualize.color_encode(LABEL, COLORS).tolist() == wanted
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
def test_color_encode_names_what_is_wrong(label, message):
    with pytest.raises(ValueError, match=message):
        visualize.color_encode(label, COLORS)


def test_overlay_by_hand():
    img = np.full((2, 3, 3), 100, np.uint8)
    mixed = visualize.overlay(img, LABEL, COLORS, 0.25)
    assert mixed[0, 0].tolist() == [100, 100, 100]  # unlabelled: the picture itself
    assert mixed[0, 1].tolist() == [139, 75, 75]  # 0.75 * 100 + 0.25 * (255, 0, 0)
    assert img.min() == img.max() == 100
    assert np.array_equal(visualize.overlay(img, np.abs(LABEL), COLORS, 1), COLORS[np.abs(LABEL)])
    assert np.array_equal(visualize.overlay(img, LABEL, COLORS, 0), img)


def test_overlay_outlines_where_classes_meet():
    img, label = np.full((4, 6, 3), 90, np.uint8), np.zeros((4, 6), int)
    label[:, 3:] = 1
    plain = visualize.overlay(img, label, COLORS)
    outlined = visualize.overlay(img, label, COLORS, outline=True)
    changed = (plain != outlined).any(axis=(0, 2))
    assert changed.tolist() == [False, False, False, True, False, False]


def test_overlay_refuses_other_sizes():
    img = np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(ValueError, match=r"img is \(2, 3\) but label \(3, 2\)"):
        visualize.overlay(img, LABEL.T, COLORS)
    with pytest.raises(ValueError, match="alpha is 50"):
        visualize.overlay(img, LABEL, COLORS, 50)
    with pytest.raises(ValueError, match="img is float64"):
        visualize.overlay(img / 255, LABEL, COLORS)


def test_side_by_side():
    a, b = np.full((2, 3, 3), 1, np.uint8), np.full((2, 1, 3), 2, np.uint8)
    assert visualize.side_by_side(a, b)[0, :, 0].tolist() == [1, 1, 1, 2]
    assert visualize.side_by_side(b, a, b, gap=1)[1, :, 0].tolist() == [2, 255, 1, 1, 1, 255, 2]
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        visualize.side_by_side(a, np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="one or more"):
        visualize.side_by_side()


# ------------------------------------------------------------------------------ legends
def test_legend_shows_every_colour_in_order(tmp_path):
    path = tmp_path / "new" / "legend.png"
    picture = visualize.legend(NAMES, COLORS, [0.5, 0.3, 0.0002], path=path)
    tops = [np.nonzero((picture == c).all(-1).any(1))[0][0] for c in COLORS]
    assert tops == sorted(tops)
    assert min(count(picture, c) for c in COLORS) > 100  # 16 x 16 less rim and corners
    assert np.array_equal(np.array(Image.open(path)), picture)
    assert visualize.legend(NAMES, COLORS).shape[1] < picture.shape[1]  # no areas: narrower
    colors = visualize.palette(150)
    picture = visualize.legend([f"class {k}" for k in range(150)], colors)
    assert picture.shape[0] < 30 * 24 + 40, "a long one has columns"
    assert all(count(picture, c) > 100 for c in colors)


def test_an_empty_legend_is_an_image_and_lengths_must_agree():
    assert visualize.legend([], COLORS[:0], []).std() > 0
    assert visualize.legend(["a name that goes on " * 9], COLORS[:1]).shape[1] < 320, "it is cut"
    with pytest.raises(ValueError, match="2 names, 3 colours and no areas"):
        visualize.legend(NAMES[:2], COLORS)
    with pytest.raises(ValueError, match="1 areas"):
        visualize.legend(NAMES, COLORS, [1.0])


# ------------------------------------------------------------------------------ charts
def history(epochs, steps=20):
    records = []
    for epoch, step in itertools.product(range(1, epochs + 1), range(1, steps + 1)):
        at = (epoch - 1) * steps + step
        records.append(
            {"kind": "train", "epoch": epoch, "step": at, "loss": 2 / at, "lr_encoder": 0.1}
        )
        if step == steps:
            records.append({"kind": "val", "epoch": epoch, "mean_iou": epoch / epochs})
    return records


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def texts(figure):
    """What stands on a figure beside titles: headings, and all texts in its axes."""
    found = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    return [text.get_text() for text in found]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_figures_are_saved_by_suffix(tmp_path, suffix):
    path = tmp_path / "new" / f"curves{suffix}"
    figure = visualize.curves(history(2), path)
    assert isinstance(figure, Figure)
    begin = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(begin)
    with pytest.raises(ValueError, match=r"curves\.bmp2: cannot save .* use \.png, \.svg or \.pdf"):
        visualize.curves(history(2), tmp_path / "curves.bmp2")


def test_curves_draw_the_available_values():
    figure = visualize.curves(history(5), title="A run")
    assert titles(figure) == ["Loss", "Accuracy and mean IoU", "Learning rate"]
    assert texts(figure) == ["A run", "best mean IoU 100.0%"]
    loss, scores, _ = figure.axes
    pale, smooth = loss.lines  # every figure, and their running mean
    assert pale.get_xydata()[-1].tolist() == pytest.approx([5, 2 / 100])
    assert len(smooth.get_xydata()) == 100
    # A straight rise over the epochs; a record without a step stands at the end of its epoch.
    assert np.allclose(scores.lines[0].get_xydata(), [[e, e / 5] for e in range(1, 6)])
    assert scores.get_ylim() == (0, 1)
    fewer = [{k: v for k, v in r.items() if k != "lr_encoder"} for r in history(5)]
    assert titles(visualize.curves(fewer)) == ["Loss", "Accuracy and mean IoU"]
    for nothing in ([], [{"loss": 1.0}], [{"epoch": 1, "loss": None}]):
        assert "no records yet" in texts(visualize.curves(nothing))
    broken = [{"epoch": 1, "step": s, "loss": v} for s, v in enumerate([1, math.nan, math.inf], 1)]
    (line,) = visualize.curves(broken).axes[0].lines
    assert line.get_ydata().tolist() == [1] and line.get_marker() == "o", "one point is visible"


def test_loss_curves_draw_every_run(tmp_path):
    runs = {"bf16": [3.0, 2.0, 1.0], "fp32": [3.1, 2.1, 1.1]}
    (axes,) = visualize.loss_curves(runs, tmp_path / "loss.png").axes
    assert [line.get_label() for line in axes.lines] == list(runs)
    assert [line.get_ydata().tolist() for line in axes.lines] == list(runs.values())
    for wrong in ({}, {"a": []}, {str(k): [1.0] for k in range(5)}):
        with pytest.raises(ValueError, match="runs"):
            visualize.loss_curves(wrong)


def test_class_bars_are_as_long_as_their_values(tmp_path):
    figure = visualize.class_bars(NAMES, [0.5, 1.0, math.nan], COLORS, tmp_path / "bars.png")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [1.0, 0.5, 0.0], "the best first"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["road", "sky", "car"]
    assert np.allclose(axes.patches[0].get_facecolor(), [0, 200 / 255, 0, 1])
    assert texts(figure)[1:] == ["mean 75.0% over 2 classes, 1 absent", "100.0%", "50.0%", "n/a"]
    unknown = visualize.class_bars(NAMES, [None] * 3)
    assert len({bar.get_facecolor() for bar in unknown.axes[0].patches}) == 1
    assert texts(unknown)[1:] == ["no class occurs", "n/a", "n/a", "n/a"]
    with pytest.raises(ValueError, match="3 names, 2 values and 3 colours"):
        visualize.class_bars(NAMES, [0.5, 0.5], COLORS)
    with pytest.raises(ValueError, match="0 names"):
        visualize.class_bars([], [], COLORS[:0])


def test_bars_of_many_classes_have_columns_and_odd_names_are_text():
    names = [
        f"class $k_{k}$ of a set whose names go on and on, far too long" * 2 for k in range(64)
    ]
    figure = visualize.class_bars(names, np.linspace(0, 1, 64), visualize.palette(64))
    assert [len(axes.patches) for axes in figure.axes] == [32, 32]
    label = figure.axes[1].get_yticklabels()[-1]
    assert label.get_text().startswith("class $k_0$") and label.get_text().endswith("...")
    assert not label.get_parse_math()


def test_ratio_bars_start_at_one_and_stand_in_groups(tmp_path):
    rows = [("one", "double", 2.0), ("two", "slower", 0.5), ("one", "tenfold", 10.0)]
    figure = visualize.ratio_bars(rows, tmp_path / "bars.png", title="Faster")
    (axes,) = figure.axes
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert ends == [(1, 2), (1, 10), (1, 0.5)] and axes.get_xscale() == "log"
    assert texts(figure) == ["Faster", "", "2.00 x", "10.00 x", "0.50 x", "one", "two"]
    for wrong in ([], [("a", "b", 0.0)], [("a", "b", float("nan"))]):
        with pytest.raises(ValueError, match="above 0"):
            visualize.ratio_bars(wrong)


def test_models_are_points_by_accuracy_and_speed(tmp_path):
    models, file = ("slow", "fast $x$", "broken"), tmp_path / "speed.png"
    figure = visualize.accuracy_by_speed(models, [0.7, 0.6, None], [1.5, 30.0, 4.0], file)
    axes, listed = figure.axes
    (points,) = axes.collections
    assert points.get_offsets()[:2].tolist() == [[1.5, 0.7], [30.0, 0.6]]
    assert axes.get_xscale() == "log" and [x.get_text() for x in axes.texts[:2]] == ["1", "2"]
    rows = ["1  slow, 70.0%", "2  fast $x$, 60.0%", "3  broken, n/a"]
    assert [x.get_text() for x in listed.texts] == rows
    for wrong in (([], [], []), (models, [0.5], [1.0]), (models[:1], [0.5], [0.0])):
        with pytest.raises(ValueError, match="speed"):
            visualize.accuracy_by_speed(*wrong)


def test_confusion_matrix_shows_fractions_of_labelled_pixels(tmp_path):
    counts = np.array([[6, 0, 2], [0, 0, 0], [1, 0, 0]])
    axes = visualize.confusion_matrix(counts, NAMES, tmp_path / "matrix.png").axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [1, 0]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["sky", "car"]
    assert sorted(text.get_text() for text in axes.texts) == ["100", "25", "75"]
    with pytest.raises(ValueError, match="empty"):
        visualize.confusion_matrix(counts * 0, NAMES)
    with pytest.raises(ValueError, match=r"shape \(3, 3\), but there are 2 names"):
        visualize.confusion_matrix(counts, NAMES[:2])


# ------------------------------------------------------------------------------ sheets
def test_prediction_sheet(tmp_path):
    img = np.full((30, 40, 3), 120, np.uint8)
    pred = np.zeros((30, 40), int)
    pred[:, 20:] = 1
    truth = pred.copy()
    truth[:15, 20:], truth[15:, :20] = 0, -1
    without = visualize.prediction_sheet(img, pred, NAMES, COLORS, path=tmp_path / "a.png")
    assert titles(without) == ["image", "prediction", "prediction over image"]
    sheet = visualize.prediction_sheet(img, pred, NAMES, COLORS, truth, title="a.png")
    captions = ["image", "prediction", "truth", "errors, accuracy 66.7 %"]
    assert titles(sheet) == captions
    _, prediction, labelled, errors = (axes.images[0].get_array() for axes in sheet.axes)
    assert count(prediction, COLORS[1]) == 600 and count(labelled, COLORS[1]) == 300
    assert count(errors, (226, 45, 72)) == 300
    key = [text.get_text() for text in sheet.legends[0].get_texts()]
    assert key == ["sky  50.0 %", "road  50.0 %"], "what does not occur is left out"
    with pytest.raises(ValueError, match=r"truth is \(2, 2\)"):
        visualize.prediction_sheet(img, pred, NAMES, COLORS, truth[:2, :2])


def test_prediction_sheet_of_many_classes_holds_them_all():
    pred = np.arange(150).repeat(8).reshape(30, 40)
    img = np.zeros((30, 40, 3), np.uint8)
    names = [f"a class with a rather long name, number {k}" for k in range(150)]
    sheet = visualize.prediction_sheet(img, pred, names, visualize.palette(150))
    assert len(sheet.legends[0].get_texts()) == 150
    sheet.draw_without_rendering()
    key = sheet.legends[0].get_window_extent()
    assert key.y0 >= max(axes.get_window_extent().y1 for axes in sheet.axes), "above the images"
    assert key.x1 <= sheet.bbox.x1
