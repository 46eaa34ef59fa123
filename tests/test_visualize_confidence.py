"""Charts of calibration and confidence, by what is drawn on them."""

import math

import numpy as np
import pytest

from mit_semseg.visualize.confidence import reliability_diagram, threshold_curves


def test_a_reliability_diagram_shows_accuracy_and_gaps(tmp_path):
    confidence, accuracy, share = [math.nan, 0.6, 0.9], [math.nan, 0.5, 0.95], [0.0, 0.25, 0.75]
    file = tmp_path / "x.svg"
    figure = reliability_diagram(confidence, accuracy, share, file, note="error 0.1")
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [0, 0.5, 0.95]
    assert [bar.get_height() for bar in right.patches] == share
    gaps = [line.tolist() for line in left.collections[0].get_segments()]
    assert gaps == [[[0.6, 0.5], [0.6, 0.6]], [[0.9, 0.95], [0.9, 0.9]]]
    assert file.is_file() and "error 0.1" in [text.get_text() for text in figure.texts]
    reliability_diagram([math.nan] * 2, [math.nan] * 2, [math.nan] * 2, file)  # nothing labelled
    with pytest.raises(ValueError, match="2 confidences, 1 accuracies and 1 shares"):
        reliability_diagram([0.1, 0.2], [0.1], [0.1])


def test_threshold_curves_have_a_panel_per_class(tmp_path):
    names = ["sky", "$road$", "car"]
    precision, recall = np.linspace(0, 1, 12).reshape(3, 4), np.linspace(1, 0, 12).reshape(3, 4)
    figure = threshold_curves(names, precision, recall, tmp_path / "x.png", columns=2)
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title(loc="left") for axes in panels] == names
    for k, axes in enumerate(panels):
        at, *_ = axes.lines[0].get_data()
        assert at.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert axes.lines[0].get_ydata().tolist() == precision[k].tolist()
        assert axes.lines[1].get_ydata().tolist() == recall[k].tolist()
    with pytest.raises(ValueError, match="2 names, precision of shape"):
        threshold_curves(names[:2], precision, recall)
