"""Calibration: against torchmetrics, and by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from mit_semseg.metrics import Calibration


def filled(*samples, num_class):
    found = Calibration(num_class)
    for sample in samples:
        found.update(*sample)
    return found


def random_sample(seed, num_class=4, shape=(40, 50)):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_class, *shape, generator=generator).mul(2).softmax(0)
    confidence, pred = scores.max(0)
    label = torch.randint(-1, num_class, shape, generator=generator)
    return scores, (confidence, pred, label)


def test_the_error_is_that_of_torchmetrics():
    drawn = [random_sample(seed) for seed in range(3)]
    found = filled(*(sample for _, sample in drawn), num_class=4).compute()
    theirs = MulticlassCalibrationError(4, n_bins=15, norm="l1", ignore_index=-1)
    for scores, (_, _, label) in drawn:
        theirs.update(scores[None], label[None])
    # Confidences are summed in units of 2^-24, and by torchmetrics in float32.
    assert found["ece"] == pytest.approx(theirs.compute().item(), abs=1e-5)
    assert found["share"].sum().item() == pytest.approx(1)


def test_bins_and_thresholds_by_hand():
    confidence = np.array([0.5, 0.95, 0.99, 0.7, 0.9])
    pred, label = np.array([0, 1, 1, 1, 0]), np.array([0, 1, 0, 1, -1])
    found = filled((confidence, pred, label), num_class=3).compute()
    # 0.95 and 0.99, half of which are right, are in the last of 15 bins.
    assert found["share"][14].item() == 0.5 and found["accuracy"][14].item() == 0.5
    assert found["confidence"][14].item() == pytest.approx(0.97)
    assert found["ece"] == pytest.approx((0.5 + 0.3 + 2 * abs(0.97 - 0.5)) / 4)
    precision, recall = found["precision"], found["recall"]
    assert precision[1][0].item() == pytest.approx(2 / 3) and recall[1][0].item() == 1
    assert precision[1][45].item() == 0.5 and recall[1][45].item() == 0.5  # above 0.75
    assert recall[0].tolist()[:30] == [0.5] * 30 and recall[0][31].item() == 0
    assert torch.isnan(precision[2]).all() and torch.isnan(recall[2]).all()
    assert torch.isnan(precision[0][60]), "no prediction has a confidence above 1"


def test_sums_do_not_depend_on_their_order():
    samples = [sample for _, sample in map(random_sample, range(4))]
    whole = filled(*samples, num_class=4)
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        parts = [filled(samples[k], num_class=4) for k in order]
        total = parts[0] + parts[1] + parts[2] + parts[3]
        assert torch.equal(total.counts, whole.counts)
        assert torch.equal(total.labelled, whole.labelled)


def test_an_empty_one_and_wrong_shapes():
    assert np.isnan(Calibration(2).compute()["ece"])
    with pytest.raises(ValueError, match=r"have the shapes \[\(2,\), \(3,\), \(3,\)\]"):
        Calibration(2).update([0.5, 0.5], [0, 1, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="num_class is 0"):
        Calibration(0)
