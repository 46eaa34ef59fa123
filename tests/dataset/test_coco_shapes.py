"""Shapes of COCO, by hand and, where it is installed, against COCO's own API."""

import tracemalloc

import numpy as np
import pytest

from mit_semseg.dataset.coco_shapes import decode


def pixels(mask):
    return ["".join("#" if value else "." for value in row) for row in mask]


def test_polygons_by_hand():
    box = [0, 0, 4, 0, 4, 4, 0, 4]
    assert pixels(decode([box], 6, 5)) == ["####."] * 4 + ["....."] * 2
    stairs = [1, 1, 5, 1, 5, 4]
    assert pixels(decode([stairs], 5, 6)) == ["......", "..###.", "...##.", "....#.", "......"]
    inner = [1, 1, 3, 1, 3, 3, 1, 3]
    assert np.array_equal(decode([box, inner], 6, 5), decode([box], 6, 5))  # joined, not cut out
    beyond = [-9, -9, 99, -9, 99, 99, -9, 99]
    assert decode([beyond], 3, 4).all()
    for nothing in ([], [[]], [[1, 1, 3, 3]], [[1, 1, 1, 1, 1, 1]]):
        mask = decode(nothing, 4, 4)
        assert mask.shape == (4, 4) and mask.dtype == bool and not mask.any()


def test_polygons_of_many_sides_have_the_area_of_a_circle():
    turn = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([50 + 30 * np.cos(turn), 45 + 30 * np.sin(turn)], axis=1)
    mask = decode([circle.ravel().tolist()], 90, 100)
    assert mask.sum() == pytest.approx(np.pi * 30**2, rel=0.01)
    y, x = np.mgrid[:90, :100] + 0.5
    distance = np.hypot(x - 50, y - 45)
    assert mask[distance < 29].all() and not mask[distance > 31].any()


def test_run_lengths_by_hand():
    expected = ["........", "..###...", "..###...", "..###...", "........", ".......#"]
    plain = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 19, 1]}
    assert pixels(decode(plain, 6, 8)) == expected
    for text in ("=33000`0N", b"=33000`0N"):
        assert pixels(decode({"size": [6, 8], "counts": text}, 6, 8)) == expected
    text = "c<P180]f0ROaZO000000000000000000000000000X6"  # with numbers of several characters
    mask = decode({"size": [40, 50], "counts": text}, 40, 50)
    assert mask[3:35, 10:12].all() and mask[:2, 30:45].all() and mask.sum() == 64 + 30


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "is polygons or run lengths, not None"),
        ({"counts": "0"}, "is polygons or run lengths"),
        ({"size": [4, 3], "counts": [12]}, r"of size \[4, 3\] for an image of \[3, 4\]"),
        ({"size": [3, 4], "counts": [11]}, "of 11 pixels for an image of 12"),
        ({"size": [3, 4], "counts": [14, -2]}, "run lengths"),
        ([1, 1, 2, 2, 3, 3], "a polygon is a list .* not 1"),
        ([[[1, 1], [2, 2]]], r"a corner of a polygon is at \[1, 1\]"),
        ([[1, 1, 2, 2, 3, 10**400]], "a corner of a polygon is at 1000"),
        ({"size": [3, 4], "counts": [12.0]}, "are whole numbers"),
        ({"size": [3, 4], "counts": "o" * 10**6}, "larger than any image"),
        ([[1, 1, 2, 2, 3]], "an x and a y for each corner, not 5 numbers"),
    ],
)
def test_invalid_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode(segmentation, 3, 4)


def test_distant_corners_take_no_memory():
    """A triangle whose tip is 1e9 pixels to the right is, in the image, a band."""
    tracemalloc.start()
    mask = decode([[0, 10, 1e9, 10, 1e9, 20, 0, 20]], 40, 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert mask[10:20].all() and mask.sum() == 10 * 50
    assert not decode([[1e300, 0, 1e300, 9, 2e300, 9]], 40, 50).any()


def test_equal_to_cocos_own():
    """Polygons that cross themselves and leave the image, whole and broken numbers, runs."""
    reference = pytest.importorskip("pycocotools.mask", reason="pip install pycocotools")
    rng = np.random.default_rng(0)
    for k in range(300):
        height, width = rng.integers(1, 50, 2).tolist()
        corners = rng.uniform(-0.3, 1.3, (2, rng.integers(3, 12), 2)) * [width, height]
        corners = np.round(corners, k % 3)
        polygons = corners.reshape(2, -1).tolist()
        runs = reference.merge(reference.frPyObjects(polygons, height, width))
        expected = reference.decode(runs).astype(bool)
        assert np.array_equal(decode(polygons, height, width), expected)
        assert np.array_equal(decode(runs, height, width), expected)
        noise = rng.random((height, width)) < 0.3
        assert np.array_equal(
            decode(reference.encode(np.asfortranarray(noise)), height, width), noise
        )
