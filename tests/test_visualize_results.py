"""Pictures of predictions and their files: exact pixels, whatever they are encoded with."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mit_semseg.dataset import ClassTable
from mit_semseg.visualize import color_encode, overlay
from mit_semseg.visualize import results as drawing
from mit_semseg.visualize.results import areas, index_image, render, save_result

NAMES = ("wall", "floor", "lamp", "plant")


@pytest.mark.parametrize("kind", ["color", "overlay", "side"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_pictures_in_bands_are_the_same(kind, dtype, monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 20, 3)).astype(np.uint8)
    labels = rng.integers(0, 4, (37, 20)).astype(dtype)
    table = ClassTable.of(NAMES)
    whole = render(kind, image, labels, table)
    shares = areas(labels, NAMES)
    monkeypatch.setattr(drawing, "_BAND", 100)
    np.testing.assert_array_equal(np.asarray(render(kind, image, labels, table)), np.asarray(whole))
    assert (
        areas(labels, NAMES)
        == shares
        == {NAMES[k]: pytest.approx((labels == k).mean()) for k in range(4)}
    )


def test_areas_by_hand():
    labels = np.array([[0, 0, 2, 2], [2, 2, 2, 2], [1, 3, -1, 2]])
    found = areas(labels, ["wall", "lamp", "floor", "lamp"])
    with pytest.raises(ValueError, match="unknown kind of image 'outline'"):
        render("outline", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), ClassTable.of("ab"))
    assert list(found.items()) == [
        *(("floor", pytest.approx(7 / 12)), ("wall", pytest.approx(2 / 12))),
        ("lamp", pytest.approx(2 / 12)),
    ]


@pytest.mark.parametrize(("count", "offset"), [(3, 0), (3, 1), (255, 1), (300, 0), (256, 1)])
def test_index_files_hold_class_ids(tmp_path, count, offset):
    labels = np.arange(count).reshape(1, -1)
    colors = np.random.default_rng(0).integers(0, 256, (count, 3)).astype(np.uint8)
    index_image(labels, colors, offset).save(tmp_path / "i.png")
    image = Image.open(tmp_path / "i.png")
    np.testing.assert_array_equal(np.asarray(image).astype(int), labels + offset)
    if count + offset <= 256:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[0], colors)


@pytest.mark.parametrize("kind", ["color", "overlay", "side", "legend", "index"])
@pytest.mark.parametrize("count", [4, 300])
def test_files_hold_the_pixels_that_are_drawn(tmp_path, kind, count):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 20, 3)).astype(np.uint8)
    labels = rng.integers(0, count, (37, 20))
    table = ClassTable.of([f"class {k}" for k in range(count)])
    drawn = render(kind, image, labels, table, 1)
    save_result(tmp_path / "x.png", kind, image, labels, table, 1)
    stored = Image.open(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(drawn))
    assert stored.mode == ("RGB" if kind != "index" else "P" if count == 4 else "I;16")
    assert stored.getpalette() == drawn.getpalette()


def test_a_file_that_cannot_be_written_whole_is_named_and_removed(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    file = tmp_path / "x.png"
    file.symlink_to("/dev/full")
    labels = np.zeros((200, 200), np.uint8)
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    for kind in ("overlay", "index"):
        file.unlink(missing_ok=True)
        file.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: .*x\.png"):
            save_result(file, kind, image, labels, ClassTable.of(NAMES))
        assert not file.is_symlink()
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(OSError, match=r"folder\.png"):
        save_result(folder, "color", image, labels, ClassTable.of(NAMES))
    assert folder.is_dir(), "what was there before stays"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize("count", [4, 255, 256])
def test_colours_are_looked_up_exactly(dtype, count):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (count, 3)).astype(np.uint8)
    image = rng.integers(0, 256, (16, 48, 3)).astype(np.uint8)
    labels = (np.arange(16 * 48).reshape(16, 48) % count).astype(dtype)
    if dtype is not np.uint8:
        labels[3, 5:9] = -1
    known = (labels >= 0)[..., None]
    expected = np.where(known, colors[labels.astype(int)], 0)
    np.testing.assert_array_equal(color_encode(labels, colors), expected)
    np.testing.assert_array_equal(color_encode(labels.T, colors), expected.transpose(1, 0, 2))
    # Halves go to the even neighbour.
    half = np.where(known, np.rint((image.astype(float) + expected) / 2), image)
    np.testing.assert_array_equal(overlay(image, labels, colors), half)
