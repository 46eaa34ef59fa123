"""Validation and test samples."""

import numpy as np
import pytest
import torch
from dataset_files import options

from mit_semseg.dataset import LabelMap, TestDataset, ValDataset
from mit_semseg.dataset.images import load_image, load_mask
from mit_semseg.dataset.transforms import Normalize, scaled_inputs


def test_val_sample(samples):
    data = samples.val(samples.write("a", (50, 30)), samples.write("b", (30, 50)))
    assert len(data) == 2
    sample = data[1]
    assert sample["info"] == "images/b.png"
    assert np.array_equal(sample["img_ori"], load_image(samples.root / "images/b.png"))
    assert [tuple(x.shape) for x in sample["img_data"]] == [(1, 3, 40, 24), (1, 3, 56, 32)]
    for got, want in zip(sample["img_data"], scaled_inputs(sample["img_ori"], options())):
        assert torch.equal(got, want)
    assert sample["seg_label"].shape == (1, 50, 30) and sample["seg_label"].dtype == torch.int64
    stored = load_mask(samples.root / "masks/b.png")
    assert np.array_equal(sample["seg_label"][0].numpy(), stored - 1)


def test_stored_values_follow_settings_or_a_label_map(samples):
    record = samples.write("a")
    stored = load_mask(samples.root / record["fpath_segm"])
    plain = samples.val(record, label_offset=0, num_class=4)[0]["seg_label"][0]
    assert np.array_equal(plain.numpy(), stored)
    with pytest.raises(ValueError, match=r"a\.png: label 3 is outside 0\.\.2"):
        samples.val(record, label_offset=0)[0]
    quiet = samples.val(record, label_offset=0, ignore_label=3)[0]["seg_label"][0]
    assert np.array_equal(quiet.numpy(), np.array([0, 1, 2, -1])[stored])
    own = LabelMap({0: 2, 1: 0, 2: 0, 3: -1}, 3)
    settings = vars(options(imgSizes=16))  # settings may be a dict
    sample = ValDataset(samples.root, [record], settings, label_map=own)[0]
    assert np.array_equal(sample["seg_label"][0].numpy(), np.array([2, 0, 0, -1])[stored])
    assert [x.shape for x in sample["img_data"]] == [(1, 3, 16, 24)]


def test_test_sample_needs_an_image_only(samples):
    path = str(samples.root / samples.write("a")["fpath_img"])
    sample = TestDataset([{"fpath_img": path}], options())[0]
    assert set(sample) == {"img_ori", "img_data", "info"}
    assert sample["info"] == path and len(sample["img_data"]) == 2


def test_pixels_may_be_normalised_later(samples):
    record, opt = samples.write("a", (50, 30)), options()
    path = {"fpath_img": str(samples.root / record["fpath_img"])}
    for ready, raw in (
        [ValDataset(samples.root, [record], opt, normalized=n)[0] for n in (True, False)],
        [TestDataset([path], opt, normalized=n)[0] for n in (True, False)],
    ):
        assert set(ready) == set(raw) and len(raw["img_data"]) == 2
        for done, pixels in zip(ready["img_data"], raw["img_data"]):
            assert pixels.dtype == torch.uint8
            assert pixels.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(Normalize.of(opt)(pixels), done)
