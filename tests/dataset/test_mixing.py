"""CutMix, ClassMix and transforms of the user's own."""

import os
import pickle

import numpy as np
import pytest
import torch

from mit_semseg.config import DataOptions
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.mixing import Mixing
from mit_semseg.dataset.sample import LoadedSample


def painted(labels, base):
    """A sample whose pixels are `base` plus their label."""
    image = np.repeat((base + labels).astype(np.uint8)[..., None], 3, axis=2)
    rows, columns = (np.arange(n) for n in labels.shape)
    return LoadedSample(image, None, labels + 1, rows, columns, LabelMap.shifted(8), "mask.png")


def mixed(samples, seed=0, **options):
    return Mixing(DataOptions(num_class=8, **options))(samples, np.random.default_rng(seed))


def test_classmix_takes_whole_classes():
    first = painted(np.full((12, 10), 6), 100)
    labels = np.repeat(np.arange(-1, 4), 2)[:, None].repeat(14, axis=1)  # ignored, and 0 to 3
    second = painted(labels, 200)
    one, two = mixed([first, second], classmix=1.0)
    found = one.labels()
    overlap = labels[:, :10]
    classes = set(np.unique(found)) - {6}
    assert len(classes) == 2 and classes < {0, 1, 2, 3}
    taken = np.isin(overlap, list(classes))
    assert np.array_equal(found[:10] != 6, taken) and (found[10:] == 6).all()
    assert np.array_equal(one.image[:10][taken], second.image[:, :10][taken])
    assert (one.image[:10][~taken] == 106).all()
    assert (two.labels()[:, :10] == 6).all()  # the one class that the first has
    assert np.array_equal(two.labels()[:, 10:], labels[:, 10:])
    assert (first.image == 106).all() and np.array_equal(second.labels(), labels)


def test_cutmix_takes_rectangles_of_any_size():
    shares = []
    for seed in range(200):
        one, _ = mixed(
            [painted(np.zeros((20, 30), int), 0), painted(np.ones((20, 30), int), 50)],
            seed,
            cutmix=1.0,
        )
        taken = one.labels() == 1
        assert np.array_equal(taken, one.image[..., 0] == 51)
        rows, columns = np.flatnonzero(taken.any(1)), np.flatnonzero(taken.any(0))
        assert taken.sum() == len(rows) * len(columns)
        shares.append(taken.mean())
    # Half of the area before the rectangle is cut off at the edges of the image.
    assert 0.25 < np.mean(shares) < 0.5 and max(shares) > 0.7 and min(shares) < 0.05


def test_a_probability_of_0_and_a_single_sample_change_nothing():
    pair = [painted(np.zeros((4, 4), int), 0), painted(np.ones((4, 4), int), 9)]
    assert not Mixing(DataOptions())
    assert mixed(pair) == pair
    assert mixed(pair[:1], cutmix=1.0) == pair[:1]


def test_mixed_batches_are_the_same_for_any_worker(samples):
    records = samples.mixed()

    def batches(**changes):
        data = samples.train(records, 3, **changes)
        return [data[k] for k in range(3)]

    plain, first, again = batches(), batches(classmix=0.5), batches(classmix=0.5)
    for one, other in zip(first, again):
        assert torch.equal(one["img_data"], other["img_data"])
        assert torch.equal(one["seg_label"], other["seg_label"])
    assert any(not torch.equal(a["seg_label"], b["seg_label"]) for a, b in zip(plain, first))
    with pytest.raises(ValueError, match="TRAIN.batch_size_per_gpu is 1: set it to 2 or more"):
        samples.train(records, cutmix=0.1)


# ------------------------------------------------------------------------------ of the user's own
MODULE = """
import random
import numpy as np
import torch
from torchvision.transforms import v2

both = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomCrop((16, 24), pad_if_needed=True)])

def noisy(image, mask):
    level = torch.rand(1).item() + random.random() + np.random.rand()
    image[:] = int(80 * level)
    return image, mask

def wrong(image, mask):
    return image.float(), mask

def broken(image, mask):
    return image / mask.nothing

def padded(image, mask):
    return image, torch.full_like(mask, 255)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working folder."""
    name = f"transforms_{os.getpid()}_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    return name


def test_a_transform_of_torchvision(samples, module):
    settings = {"random_flip": False, "segm_downsampling_rate": 1, "normalized": False}
    records = samples.mixed()[:5]
    plain = samples.train(records, **settings)
    own = samples.train(records, transform=f"{module}:both", **settings)
    own = pickle.loads(pickle.dumps(own))
    for k in range(4):
        before, after = plain[k], own[k]
        assert after["seg_label"].shape == (1, 16, 24)
        h, w = before["img_size"][0].tolist()
        flipped = before["img_data"][0, :, :h, :w].flip(-1)
        labels = before["seg_label"][0, :h, :w].flip(-1)
        found = [
            (y, x)
            for y in range(max(h - 16, 0) + 1)
            for x in range(max(w - 24, 0) + 1)
            if torch.equal(flipped[:, y : y + 16, x : x + 24], after["img_data"][0])
        ]
        assert len(found) == 1
        y, x = found[0]
        assert torch.equal(labels[y : y + 16, x : x + 24], after["seg_label"][0])


def test_random_numbers_of_a_transform_follow_from_the_seed(samples, module):
    own = samples.train(samples.mixed(), transform=f"{module}:noisy", normalized=False)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = [own[k]["img_data"][0, 0, 0, 0].item() for k in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert [own[k]["img_data"][0, 0, 0, 0].item() for k in range(6)] == first
    assert len(set(first)) > 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("flip", ValueError, "is 'flip'; give module:function, such as my_transforms:train"),
        ("no_such_module:f", ValueError, "cannot be imported.*put no_such_module.py"),
        ("{}:f", ValueError, r"\.py has no function f$"),
        ("{}:wrong", RuntimeError, r"returned \(3, .* torch.float32, .*has to return \(image"),
        ("{}:padded", RuntimeError, r"returned the class 255; give 0\.\.\d+, or -1 for ignored"),
        ("{}:broken", RuntimeError, "failed with AttributeError: .*nothing"),
    ],
)
def test_transforms_that_cannot_be_used(samples, module, name, error, message):
    settings = {"transform": name.format(module), "on_error": "skip"}
    with pytest.raises(error, match=message):
        samples.train(samples.mixed(), **settings)[0]
