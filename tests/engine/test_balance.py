"""Class weights: formulas by hand, counts of real masks, and a cache that notices changes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mit_semseg.config import Options, load_config
from mit_semseg.dataset import Split, build_split
from mit_semseg.engine.training import balance
from mit_semseg.engine.training.balance import class_weights, enet_weights, frequency_weights
from mit_semseg.losses import build_loss


@pytest.fixture
def cfg(tmp_path, make_images):
    make_images(tmp_path, [(48, 64), (64, 48), (40, 72)])
    opts = [
        *("DIR", str(tmp_path / "run"), "DATASET.root_dataset", str(tmp_path)),
        *("DATASET.list_train", str(tmp_path / "val.odgt"), "DATASET.num_class", "4"),
    ]
    return load_config(None, opts)


def weights(cfg, scheme):
    cfg.TRAIN.class_weights = scheme
    return class_weights(Options.read(cfg), build_split(cfg.DATASET, "train"), progress=False)


def masks(cfg):
    """Class ids: stored values minus one."""
    files = sorted(Path(cfg.DATASET.root_dataset).glob("ann/*/*.png"))
    return [np.asarray(Image.open(file)).astype(int) - 1 for file in files]


def test_weights_by_hand():
    found = enet_weights(np.array([75, 25, 0]))
    expected = [1 / math.log(1.77), 1 / math.log(1.27), 1 / math.log(1.02)]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected)
    assert enet_weights(np.zeros(2)).tolist() == pytest.approx([1 / math.log(1.02)] * 2)
    pixels, images = np.array([80.0, 10.0, 0.0, 30.0]), np.array([100.0, 100.0, 0.0, 100.0])
    # Frequencies 0.8, 0.1, 0.3 have the median 0.3; the class that never occurs gets 1.
    expected = torch.tensor([0.3 / 0.8, 3.0, 1.0, 1.0])
    torch.testing.assert_close(frequency_weights(pixels, images, 1.0), expected)
    torch.testing.assert_close(frequency_weights(pixels, images, 0.5), expected.sqrt())
    nothing = np.zeros(3, np.int64)
    assert frequency_weights(nothing, nothing, 1.0).tolist() == [1, 1, 1]


def test_schemes_follow_from_the_masks(cfg):
    found = masks(cfg)
    pixels = np.array([sum((mask == k).sum() for mask in found) for k in range(4)])
    images = [sum((mask >= 0).sum() for mask in found if (mask == k).any()) for k in range(4)]
    assert pixels[3] == 0 and (pixels[:3] > 0).all()
    enet = [1 / math.log(1.02 + share) for share in pixels / pixels.sum()]
    frequency = [pixels[k] / images[k] for k in range(3)]
    median = [sorted(frequency)[1] / f for f in frequency] + [1.0]
    sqrt = [math.sqrt(w) for w in median]
    for scheme, expected in (("enet", enet), ("median", median), ("sqrt", sqrt)):
        assert weights(cfg, scheme).tolist() == pytest.approx(expected)
    build_loss("smooth", 4, weights(cfg, "enet"))


def test_counts_are_kept_until_something_changes(cfg, tmp_path, monkeypatch):
    read, load = [], balance.load_mask
    monkeypatch.setattr(balance, "load_mask", lambda path: read.append(path) or load(path))

    def reads(scheme="enet"):
        read.clear()
        weights(cfg, scheme)
        return len(read)

    assert reads() == 3
    first = weights(cfg, "enet")
    assert (reads("median"), reads("sqrt"), reads("enet")) == (0, 0, 0)
    assert torch.equal(weights(cfg, "enet"), first)
    # A mask that is drawn anew, in a file of the same name.
    Image.new("L", (48, 64), 4).save(tmp_path / "ann" / "part1" / "1.png")
    assert reads() == 3
    found = np.concatenate([mask.ravel() for mask in masks(cfg)])
    share = (found == 3).sum() / (found >= 0).sum()
    assert weights(cfg, "enet")[3].item() == pytest.approx(1 / math.log(1.02 + share))
    # A list that is shorter, and what stored values mean.
    listing = Path(cfg.DATASET.list_train)
    listing.write_text("\n".join(listing.read_text().splitlines()[:2]))
    assert (reads(), reads()) == (2, 0)
    cfg.DATASET.ignore_label = [1]
    assert (reads(), reads()) == (2, 0)
    assert weights(cfg, "enet")[0].item() == pytest.approx(1 / math.log(1.02))


def test_a_cache_that_cannot_be_used_is_no_error(cfg, tmp_path):
    expected = weights(cfg, "median")
    file = tmp_path / "run" / balance.CACHE
    assert len(json.loads(file.read_text())["pixels"]) == 4
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    for content in ("", "[1, 2]", '{"key": 3}', "\0"):
        file.write_text(content)
        assert torch.equal(weights(cfg, "median"), expected)
    cfg.DIR = str(file)  # a file, where a folder would be
    assert torch.equal(weights(cfg, "median"), expected)


def test_mistakes_are_named(cfg):
    with pytest.raises(ValueError, match=r"'mean'; give none, sqrt, median, enet or a list"):
        weights(cfg, "mean")
    with pytest.raises(ValueError, match=r"has 2 numbers, but DATASET\.num_class is 4"):
        weights(cfg, [1, 2])
    (Path(cfg.DATASET.root_dataset) / "ann" / "part0" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.png"):
        weights(cfg, "enet")


def frequencies(cfg, count):
    split = build_split(cfg.DATASET, "train")
    records = [{"fpath_img": str(k), "fpath_segm": f"{k}.png"} for k in range(count)]
    data = Split(records, split.classes, split.label_map)
    return balance._frequencies(Path(cfg.DIR) / balance.CACHE, data, 4, False, False)


@pytest.mark.parametrize("count", [1, 999, 1000, 1999, 2975])
def test_sampled_masks_are_spread_over_the_whole_list(cfg, monkeypatch, count):
    """Lists are sorted, by city or by film: the first thousand are no fair sample."""
    seen = []

    def count_none(records, *args):
        seen.extend(int(record["fpath_img"]) for record in records)
        return np.ones(4, np.int64), np.ones(4, np.int64)

    monkeypatch.setattr(balance, "_count", count_none)
    frequencies(cfg, count)
    assert len(seen) == min(count, 1000) and sorted(set(seen)) == seen
    assert seen[0] == 0 and count - seen[-1] <= 3
    assert max(np.diff(seen), default=1) <= 3


def test_a_missing_class_enlarges_the_sample(cfg, monkeypatch):
    counted = []

    def count(records, *args):
        counted.append(len(records))
        rare = sum(record["fpath_img"] == "7" for record in records)
        return np.array([5, 5, 5, rare]), np.array([9, 9, 9, 9 * rare])

    monkeypatch.setattr(balance, "SAMPLES", (10, 50))
    monkeypatch.setattr(balance, "_count", count)
    for _ in range(2):  # the second time from the cache
        pixels, _ = frequencies(cfg, 40)
        assert pixels.tolist() == [5, 5, 5, 1] and counted == [10, 40]
