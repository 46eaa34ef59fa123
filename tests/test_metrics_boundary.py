"""Boundary F-score against hand numbers and a naive search over all pairs of pixels."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mit_semseg.metrics import BoundaryScore, boundary_f

STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def outline(ids, k):
    """Pixels of class k beside a pixel of the image that is none."""
    H, W = ids.shape
    return [
        (y, x)
        for y, x in np.ndindex(H, W)
        if ids[y, x] == k
        and any(
            0 <= y + dy < H and 0 <= x + dx < W and ids[y + dy, x + dx] != k for dy, dx in STEPS
        )
    ]


def naive(pred, label, classes, tolerance):
    pred = np.where(label < 0, -1, pred)
    reach = tolerance * math.hypot(*label.shape)

    def near(points, others):
        hits = sum(any(math.dist(a, b) <= reach for b in others) for a in points)
        return hits / len(points)

    scores = []
    for k in range(classes):
        in_pred, in_label = bool((pred == k).any()), bool((label == k).any())
        ours, theirs = outline(pred, k), outline(label, k)
        if not in_pred and not in_label:
            scores.append(math.nan)
        elif not ours and not theirs:
            scores.append(float(in_pred and in_label))
        elif not ours or not theirs:
            scores.append(0.0)
        else:
            p, r = near(ours, theirs), near(theirs, ours)
            scores.append(2 * p * r / (p + r) if p + r else 0.0)
    return scores


def test_by_hand():
    # A vertical border that is predicted two pixels too far to the right; the diagonal is 50.
    label, pred = np.zeros((30, 40), dtype=int), np.zeros((30, 40), dtype=int)
    label[:, 20:] = pred[:, 22:] = 1
    assert boundary_f(pred, label, 3, tolerance=0.039).tolist() == pytest.approx(
        [0, 0, math.nan], nan_ok=True
    )
    assert boundary_f(pred, label, 3, tolerance=0.04).tolist() == pytest.approx(
        [1, 1, math.nan], nan_ok=True
    )
    # A predicted square that is not there: of class 0's 30 + 36 boundary pixels 30 are right.
    pred[:, 20:], pred[:, :20] = 1, 0
    pred[5:13, 3:11] = 2
    ring = 4 * 8  # of class 0 around the square
    p = 30 / (30 + ring)
    expected = [2 * p / (p + 1), 1.0, 0.0]
    assert boundary_f(pred, label, 3, tolerance=0).tolist() == pytest.approx(expected)


def test_a_class_that_fills_the_image():
    full, none = np.zeros((8, 8), dtype=int), np.ones((8, 8), dtype=int)
    assert boundary_f(full, full, 2).tolist() == pytest.approx([1, math.nan], nan_ok=True)
    assert boundary_f(full, none, 2).tolist() == [0, 0]
    ignored = np.full((8, 8), -1)
    assert np.isnan(boundary_f(full, ignored, 2)).all()


@given(
    st.integers(0, 10_000), st.integers(1, 4), st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from([0.0, 0.0075, 0.07, 0.1, 0.2, 2.0]),
)  # fmt: skip
def test_naive_search_agrees(seed, classes, size, tolerance):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(-1, classes, (2, 4, 4))
    label, pred = (b.repeat(3, 0).repeat(3, 1)[: size[0], : size[1]] for b in blocks)
    pred = np.where(rng.random(size) < 0.9, pred, rng.integers(0, classes, size)).clip(min=0)
    found = boundary_f(pred, label, classes, tolerance)
    assert found.tolist() == pytest.approx(
        naive(pred, label, classes, tolerance), nan_ok=True, abs=1e-12
    )


def test_the_published_tolerance():
    # 0.75 % of a diagonal of 500 is 3.75 pixels: 3 are near enough, 4 are not.
    label = np.zeros((300, 400), dtype=int)
    label[:, 200:] = 1
    for shift, score in ((3, 1.0), (4, 0.0)):
        assert boundary_f(np.roll(label, shift, 1)[:, shift:], label[:, shift:], 2)[1] == score


def images(count):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 3, (count, 2, 4, 4)).repeat(6, 2).repeat(6, 3)
    return [(pred, np.where(rng.random((24, 24)) < 0.1, -1, label)) for pred, label in blocks]


def test_sums_are_the_means_over_images_and_merge_exactly():
    pairs = images(7)
    whole, parts = BoundaryScore(4), [BoundaryScore(4) for _ in range(3)]
    for i, (pred, label) in enumerate(pairs):
        whole.update(torch.from_numpy(pred), torch.from_numpy(label))
        parts[i % 3].update(pred, label)
    scores = np.array([naive(pred, label, 4, 0.0075) for pred, label in pairs])
    figures = whole.compute()
    expected = [np.nanmean(scores[:, k]) for k in range(3)]
    assert figures["boundary_f"].tolist() == pytest.approx([*expected, math.nan], nan_ok=True)
    assert figures["mean_boundary_f"] == pytest.approx(np.mean(expected))
    for order in ((0, 1, 2), (2, 0, 1)):
        a, b, c = (pickle.loads(pickle.dumps(parts[k])) for k in order)
        total = a + b + c
        assert torch.equal(total.sums, whole.sums) and torch.equal(total.images, whole.images)
    assert math.isnan(BoundaryScore(2).compute()["mean_boundary_f"])


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"pred has shape \(2, 3\) but label"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), "pred is float64"),
        (np.array([[0, 2]]), np.array([[0, 1]]), r"pred has id 2, outside 0\.\.1"),
        (np.array([[0, -1]]), np.array([[0, 1]]), r"pred has id -1, outside 0\.\.1"),
        (np.array([[0, 1]]), np.array([[0, 2]]), r"label has id 2, outside 0\.\.1"),
        (np.zeros((1, 2, 3), int), np.zeros((1, 2, 3), int), r"shape \(1, 2, 3\); give .* one"),
    ],
)
def test_mistakes_are_named(pred, label, message):
    with pytest.raises(ValueError, match=message):
        BoundaryScore(2).update(pred, label)
    with pytest.raises(ValueError, match="tolerance is -1"):
        boundary_f([[0]], [[0]], 1, tolerance=-1)
    with pytest.raises(ValueError, match="2 and 3 classes"):
        BoundaryScore(2) + BoundaryScore(3)
    with pytest.raises(ValueError, match="num_class is 0"):
        BoundaryScore(0)
