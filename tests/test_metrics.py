"""Metrics against hand-computed numbers and torchmetrics."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.classification import MulticlassConfusionMatrix as TheirMatrix
from torchmetrics.classification import MulticlassJaccardIndex as Jaccard

from mit_semseg import metrics
from mit_semseg.metrics import ConfusionMatrix

# Classes: 0 twice hit, once taken for 1; 1 hit once; 2 never labelled but predicted once; 3 absent.
PRED = [0, 0, 1, 1, 2, 0]
LABEL = [0, 0, 0, 1, 1, -1]
MATRIX = [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def random_pair(seed, classes, occurring):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randint(0, occurring, (2, 37, 41), generator=generator)
    label = torch.randint(-1, occurring, (2, 37, 41), generator=generator)
    label = torch.where(torch.rand(label.shape, generator=generator) < 0.5, pred, label)
    return pred, label


def test_by_hand():
    counts = ConfusionMatrix(4)
    counts.update(torch.tensor(PRED), torch.tensor(LABEL))
    assert counts.matrix.tolist() == MATRIX
    assert counts.matrix.dtype == torch.int64
    assert pickle.loads(pickle.dumps(counts)).matrix.tolist() == MATRIX
    figures = counts.compute()
    iou = [2 / 3, 1 / 3, 0.0, math.nan]
    assert figures["iou"].dtype == torch.float64
    assert figures["iou"].tolist() == pytest.approx(iou, nan_ok=True)
    assert figures["dice"].tolist() == pytest.approx([4 / 5, 1 / 2, 0, math.nan], nan_ok=True)
    assert figures["recall"].tolist() == pytest.approx(
        [2 / 3, 1 / 2, math.nan, math.nan], nan_ok=True
    )
    assert figures["mean_iou"] == pytest.approx(1 / 3)
    assert figures["mean_iou_all_classes"] == pytest.approx(1 / 4)
    assert figures["pixel_accuracy"] == pytest.approx(3 / 5)
    assert figures["class_accuracy"] == pytest.approx(7 / 12)
    assert figures["fw_iou"] == pytest.approx(3 / 5 * 2 / 3 + 2 / 5 * 1 / 3)
    assert figures["mean_dice"] == pytest.approx(13 / 30)


@pytest.mark.parametrize(("classes", "occurring"), [(2, 2), (5, 5), (11, 7), (150, 40)])
def test_torchmetrics_agrees(classes, occurring):
    pred, label = random_pair(classes, classes, occurring)
    matrix = metrics.confusion_matrix(pred, label, classes)

    def theirs(kind, **options):
        return kind(num_classes=classes, ignore_index=-1, **options)(pred, label)

    assert torch.equal(matrix, theirs(TheirMatrix).long())
    iou = theirs(Jaccard, average="none")
    for got, wanted in (
        (metrics.mean_iou(matrix), theirs(Jaccard, average="macro")),
        (metrics.class_iou(matrix).nan_to_num(0.0), iou),
        (metrics.mean_iou_all_classes(matrix), iou.mean()),
        (metrics.fw_iou(matrix), theirs(Jaccard, average="weighted")),
        (metrics.pixel_accuracy(matrix), theirs(MulticlassAccuracy, average="micro")),
        (metrics.class_accuracy(matrix), theirs(MulticlassAccuracy, average="macro")),
        (metrics.class_dice(matrix).nan_to_num(0.0), theirs(MulticlassF1Score, average="none")),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_counts_and_merging(data):
    classes = data.draw(st.integers(1, 6))
    pairs = st.tuples(st.integers(0, classes - 1), st.integers(-1, classes - 1))
    pixels = data.draw(st.lists(pairs, max_size=30))
    cut = data.draw(st.integers(0, len(pixels)))
    expected = np.zeros((classes, classes), dtype=int)
    for pred, label in pixels:
        if label >= 0:
            expected[label, pred] += 1
    parts = []
    for part in (pixels[:cut], pixels[cut:]):
        counts = ConfusionMatrix(classes)
        array = np.array(part, dtype=np.int64).reshape(-1, 2)
        counts.update(array[:, 0], array[:, 1])
        parts.append(counts)
    assert (parts[0] + parts[1]).matrix.tolist() == expected.tolist()
    assert sum(parts).matrix.tolist() == expected.tolist()
    # Addition leaves the parts alone.
    assert sum(int(p.matrix.sum()) for p in parts) == expected.sum()


def test_metrics_of_nothing_are_nan():
    counts = ConfusionMatrix(3)
    counts.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    counts.update(torch.tensor([1, 2]), torch.tensor([-1, -1]))
    figures = counts.compute()
    assert figures.pop("mean_iou_all_classes") == 0
    assert all(np.isnan(np.asarray(value)).all() for value in figures.values())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_any_integer_type_layout_and_kind(dtype):
    pred, label = random_pair(0, 5, 5)
    label = label.clamp(min=0)
    reference = metrics.confusion_matrix(pred, label, 5)
    arrays = [x.numpy().astype(dtype) for x in (pred, label)]
    assert torch.equal(metrics.confusion_matrix(arrays[0], label, 5), reference)
    flipped = [a[:, ::-1, ::2] for a in arrays]
    expected = metrics.confusion_matrix(flipped[0].copy(), flipped[1].copy(), 5)
    assert torch.equal(metrics.confusion_matrix(*flipped, 5), expected)


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        ([0, 1], [0, 1, 1], r"pred has shape \(2,\) but label \(3,\)"),
        ([[0], [1]], [[0, 1]], r"\(2, 1\) but label \(1, 2\)"),
        ([0, 3], [0, 1], "predicted class 3 is outside 0..2"),
        ([-1, 0], [0, 1], "predicted class -1 is outside 0..2"),
        ([0, 3], [0, -1], "predicted class 3 is outside 0..2"),
        ([0, 1], [0, 255], "label 255 is outside -1..2"),
        ([0, 1], [-2, 1], "label -2 is outside -1..2"),
        ([0.0, 1.0], [0, 1], "pred is float"),
        ([0, 1], [0.0, 1.0], "label is float"),
    ],
)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_wrong_arguments_are_named(pred, label, message, kind):
    message = message.replace("is float", r"is (torch\.)?float")
    counts = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        counts.update(kind(pred), kind(label))
    assert int(counts.matrix.sum()) == 0


def test_wrong_matrices_are_refused():
    with pytest.raises(ValueError, match="num_class is 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="3 and 4 classes"):
        ConfusionMatrix(3) + ConfusionMatrix(4)
    with pytest.raises(TypeError):
        ConfusionMatrix(3) + 1
    for name in metrics.__all__:
        if name.islower() and name not in ("boundary_f", "confusion_matrix"):
            function = getattr(metrics, name)
            with pytest.raises(ValueError, match=r"\(2, 3\)"):
                function(torch.zeros(2, 3, dtype=torch.int64))
            with pytest.raises(ValueError, match="negative count, -5"):
                function(torch.tensor([[1, -5], [0, 1]]))


def test_counts_without_checks_are_the_same():
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(7, (3, 40, 50), generator=generator, dtype=torch.uint8)
    label = torch.randint(-1, 7, (3, 40, 50), generator=generator)
    checked, unchecked = ConfusionMatrix(7), ConfusionMatrix(7, "cpu")
    for _ in range(2):
        checked.update(pred, label)
        unchecked.update(pred, label, check=False)
    assert torch.equal(checked.matrix, unchecked.matrix)
    copy = unchecked.cpu()
    unchecked.update(pred, label, check=False)
    assert torch.equal(copy.matrix, checked.matrix), "a copy, not a view"


@pytest.mark.gpu
def test_cuda_predictions_and_cpu_labels():
    counts = ConfusionMatrix(4)
    counts.update(torch.tensor(PRED).cuda(), torch.tensor(LABEL))
    assert counts.matrix.tolist() == MATRIX
