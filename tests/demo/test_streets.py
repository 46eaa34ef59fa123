"""The street renderer: deterministic, exactly labelled, and a data set as users keep one."""

import csv
import json

import cv2
import numpy as np
import pytest

from mit_semseg.config import load_config
from mit_semseg.dataset import build_split
from mit_semseg.demo import classes, streets
from mit_semseg.demo.canvas import SAMPLES, Canvas


@pytest.fixture(scope="module")
def labels():
    return [streets.render(seed, (120, 160))[1] for seed in range(24)]


def test_a_seed_determines_the_scene_without_global_random_state():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    image, label = streets.render((3, 1), (96, 128))
    assert np.random.rand() == expected
    again, other = streets.render((3, 1), (96, 128)), streets.render((3, 2), (96, 128))
    assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
    assert not np.array_equal(label, other[1])


@pytest.mark.parametrize("size", [(96, 128), (128, 96), (64, 200)])
def test_sizes_and_types(size):
    image, label = streets.render(1, size)
    assert image.shape == (*size, 3) and label.shape == size
    assert image.dtype == label.dtype == np.uint8
    assert label.max() <= len(classes.CLASSES)


def test_invalid_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="40x320"):
        streets.render(1, (40, 320))
    with pytest.raises(ValueError, match="n_val=0"):
        streets.write(tmp_path, n_train=1, n_val=0)


def test_every_class_occurs_and_sky_lies_over_road(labels):
    counts = np.stack([np.bincount(label.ravel(), minlength=11) for label in labels])
    assert (counts.sum(0) / counts.sum() > 0.002).all(), "all classes, and the ignored value"
    for cls in (classes.SKY, classes.ROAD, classes.PAVEMENT):
        assert (counts[:, cls + 1] > 0).all()
    for label in labels:
        sky_rows, road_rows = (np.nonzero(label == c + 1)[0] for c in (classes.SKY, classes.ROAD))
        assert sky_rows.mean() < road_rows.mean()


def test_labels_are_exact_and_the_picture_is_antialiased():
    """One polygon with corners in pixels: its labels are the pixels whose centre it holds."""
    canvas = Canvas(20, 20)
    corners = np.array([(3.0, 2.0), (17.0, 6.0), (8.0, 18.0)])
    canvas.fill(corners, (250.0, 0.0, 0.0), classes.CAR)
    image = cv2.resize(canvas.image, (20, 20), interpolation=cv2.INTER_AREA)
    assert len(np.unique(image)) > 2
    assert set(np.unique(canvas.label)) == {0, classes.CAR + 1}
    label = canvas.label[SAMPLES // 2 :: SAMPLES, SAMPLES // 2 :: SAMPLES]
    y, x = np.mgrid[:20, :20] + 0.5
    distance = np.full((20, 20), np.inf)  # to the nearest edge in pixels, positive inside
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0)):
        side = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        distance = np.minimum(distance, side / np.hypot(bx - ax, by - ay))
    # OpenCV also fills samples that the outline touches: half a sample of doubt.
    assert (label[distance > 0.2] == classes.CAR + 1).all()
    assert (label[distance < -0.4] == 0).all()


def test_write_makes_a_data_set(tmp_path):
    root, sizes = streets.write(tmp_path, n_train=4, n_val=2, seed=9, size=(64, 96)), set()
    for name, count in (("training", 4), ("validation", 2)):
        records = [json.loads(line) for line in (root / f"{name}.odgt").read_text().splitlines()]
        assert len(records) == count
        for record in records:
            image = cv2.imread(str(root / record["fpath_img"]), cv2.IMREAD_UNCHANGED)
            label = cv2.imread(str(root / record["fpath_segm"]), cv2.IMREAD_UNCHANGED)
            assert image.shape == (*label.shape, 3) == (record["height"], record["width"], 3)
            sizes.add(label.shape)
    assert len(sizes) == 3, "one in four is upright, one is wider"
    image, label = streets.render((9, 1, 0), (64, 96))
    written = cv2.imread(str(root / "images/validation/0000.png"))[..., ::-1]
    assert np.array_equal(written, image)
    names = [name for name, _ in classes.CLASSES]
    with (root / "classes.csv").open(newline="") as file:
        rows = [(row["Idx"], row["Name"]) for row in csv.DictReader(file)]
    assert rows == [(str(i), name) for i, name in enumerate(names, 1)]
    # It reads back through the library.
    opts = [
        *("DATASET.root_dataset", str(root), "DATASET.num_class", str(len(names))),
        *("DATASET.list_train", str(root / "training.odgt")),
        *("DATASET.list_val", str(root / "validation.odgt")),
        *("DATASET.classes", str(root / "classes.csv")),
    ]
    split = build_split(load_config(None, opts).DATASET, "val")
    assert list(split.classes.names) == names
    assert split.classes.colors.tolist() == [list(color) for _, color in classes.CLASSES]
    assert np.array_equal(split.label_map(label), label.astype(int) - 1)
