"""The street renderer: deterministic, exactly labelled, and a data set as users keep one."""

import csv
import json

import cv2
import numpy as np
import pytest

from mit_semseg.demo import classes, streets
from mit_semseg.demo.canvas import SAMPLES, Canvas


@pytest.fixture(scope="module")
def scenes():
    return [streets.render(seed, (120, 160)) for seed in range(24)]


def test_the_same_seed_draws_the_same_scene_and_another_a_different_one():
    image, label = streets.render((3, 1), (96, 128))
    again = streets.render((3, 1), (96, 128))
    other = streets.render((3, 2), (96, 128))
    assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
    assert not np.array_equal(label, other[1])


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    streets.render(11, (64, 64))
    assert np.random.rand() == expected


@pytest.mark.parametrize("size", [(96, 128), (128, 96), (64, 200)])
def test_sizes_and_types(size):
    image, label = streets.render(1, size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert label.shape == size and label.dtype == np.uint8
    assert label.max() <= len(classes.CLASSES)


def test_a_size_without_room_for_a_street_is_refused():
    with pytest.raises(ValueError, match="40x320"):
        streets.render(1, (40, 320))


def test_every_class_occurs_and_the_large_ones_in_every_scene(scenes):
    counts = np.stack([np.bincount(label.ravel(), minlength=11) for _, label in scenes])
    assert (counts.sum(0) > 0).all(), "a class, or the ignored value, never occurs"
    for cls in (classes.SKY, classes.ROAD, classes.PAVEMENT):
        assert (counts[:, cls + 1] > 0).all()
    assert (counts.sum(0) / counts.sum() > 0.002).all()


def test_sky_lies_over_road(scenes):
    for _, label in scenes:
        sky_rows, road_rows = (np.nonzero(label == c + 1)[0] for c in (classes.SKY, classes.ROAD))
        assert sky_rows.mean() < road_rows.mean()


def test_labels_are_exact_where_the_picture_has_an_edge():
    """One polygon with corners in pixels: its labels are the pixels whose centre it holds."""
    canvas = Canvas(20, 20)
    corners = np.array([(3.0, 2.0), (17.0, 6.0), (8.0, 18.0)])
    canvas.fill(corners, (250.0, 0.0, 0.0), classes.CAR)
    middle = SAMPLES // 2
    label = canvas.label[middle::SAMPLES, middle::SAMPLES]

    def side(a, b, x, y):
        return float((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]))

    for row in range(20):
        for column in range(20):
            x, y = column + 0.5, row + 0.5
            edges = [side(corners[i], corners[(i + 1) % 3], x, y) for i in range(3)]
            lengths = [np.linalg.norm(corners[(i + 1) % 3] - corners[i]) for i in range(3)]
            distances = np.array(edges) / lengths  # pixels, positive inside
            # OpenCV also fills samples that the outline touches: half a sample of doubt.
            if distances.min() > 0.2:
                assert label[row, column] == classes.CAR + 1
            elif distances.min() < -0.4:
                assert label[row, column] == 0


def test_picture_is_antialiased_and_labels_are_not():
    canvas = Canvas(40, 40)
    canvas.fill(np.array([(5.0, 5.0), (35.0, 9.0), (20.0, 36.0)]), (255.0,) * 3, classes.SIGN)
    image = cv2.resize(canvas.image, (40, 40), interpolation=cv2.INTER_AREA)
    assert len(np.unique(image)) > 2
    assert set(np.unique(canvas.label)) == {0, classes.SIGN + 1}


def test_write_makes_a_data_set(tmp_path):
    root = streets.write(tmp_path / "data", n_train=4, n_val=2, seed=9, size=(64, 96))
    sizes = set()
    for name, count in (("training", 4), ("validation", 2)):
        records = [json.loads(line) for line in (root / f"{name}.odgt").read_text().splitlines()]
        assert len(records) == count
        for record in records:
            image = cv2.imread(str(root / record["fpath_img"]), cv2.IMREAD_UNCHANGED)
            label = cv2.imread(str(root / record["fpath_segm"]), cv2.IMREAD_UNCHANGED)
            assert image.shape == (record["height"], record["width"], 3)
            assert label.shape == (record["height"], record["width"])
            sizes.add(label.shape)
    assert len(sizes) == 3, "one in four is upright, one is wider"
    image, label = streets.render((9, 1, 0), (64, 96))
    written = cv2.imread(str(root / "images/validation/0000.png"))[..., ::-1]
    assert np.array_equal(written, image)
    with (root / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Name"] for row in rows] == [name for name, _ in classes.CLASSES]
    assert [row["Idx"] for row in rows] == [str(i + 1) for i in range(len(rows))]


def test_written_set_reads_back_through_the_library(tmp_path):
    from mit_semseg.config import load_config
    from mit_semseg.dataset import build_split

    root = streets.write(tmp_path, n_train=2, n_val=1, size=(64, 96))
    cfg = load_config(
        None,
        [
            *("DATASET.root_dataset", str(root)),
            *("DATASET.list_train", str(root / "training.odgt")),
            *("DATASET.list_val", str(root / "validation.odgt")),
            *("DATASET.classes", str(root / "classes.csv")),
            *("DATASET.num_class", str(len(classes.CLASSES))),
        ],
    )
    split = build_split(cfg.DATASET, "val")
    assert split.classes.names == tuple(name for name, _ in classes.CLASSES)
    assert split.classes.colors.tolist() == [list(color) for _, color in classes.CLASSES]
    _, label = streets.render((304, 1, 0), (64, 96))
    assert np.array_equal(split.label_map(label), label.astype(int) - 1)


def test_counts_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="n_val=0"):
        streets.write(tmp_path, n_train=1, n_val=0)
