"""Validation and test samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mit_semseg.dataset import LabelMap, TestDataset, ValDataset
from mit_semseg.dataset.images import load_image, load_mask
from mit_semseg.dataset.transforms import Normalize, scaled_inputs

Options = Callable[..., SimpleNamespace]
Writer = Callable[..., dict[str, Any]]


def test_val_sample(tmp_path: Path, write_pair: Writer, options: Options) -> None:
    records = [write_pair("a", (50, 30)), write_pair("b", (30, 50))]
    data = ValDataset(tmp_path, records, options())
    assert len(data) == 2
    sample = data[1]
    assert sample["info"] == "images/b.png"
    assert np.array_equal(sample["img_ori"], load_image(tmp_path / "images/b.png"))
    assert [tuple(x.shape) for x in sample["img_data"]] == [(1, 3, 40, 24), (1, 3, 56, 32)]
    for got, want in zip(sample["img_data"], scaled_inputs(sample["img_ori"], options())):
        assert torch.equal(got, want)
    assert sample["seg_label"].shape == (1, 50, 30) and sample["seg_label"].dtype == torch.int64
    stored = load_mask(tmp_path / "masks/b.png")
    assert np.array_equal(sample["seg_label"][0].numpy(), stored - 1)


def test_val_takes_a_label_map(tmp_path: Path, write_pair: Writer, options: Options) -> None:
    record = write_pair("a")
    label_map = LabelMap({0: 2, 1: 0, 2: 0, 3: -1}, 3)
    label = ValDataset(tmp_path, [record], options(), label_map=label_map)[0]["seg_label"][0]
    stored = load_mask(tmp_path / "masks/a.png")
    assert np.array_equal(label.numpy(), np.array([2, 0, 0, -1])[stored])


def test_val_settings_describe_the_masks(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("a")
    plain = ValDataset(tmp_path, [record], options(label_offset=0, num_class=4))[0]["seg_label"]
    assert np.array_equal(plain[0].numpy(), load_mask(tmp_path / "masks/a.png"))
    with pytest.raises(ValueError, match=r"a\.png: label 3 is outside 0\.\.2"):
        ValDataset(tmp_path, [record], options(label_offset=0))[0]
    quiet = ValDataset(tmp_path, [record], options(label_offset=0, ignore_label=3))[0]
    assert set(quiet["seg_label"].unique().tolist()) == {-1, 0, 1, 2}


def test_options_may_be_a_dict(tmp_path: Path, write_pair: Writer, options: Options) -> None:
    data = ValDataset(tmp_path, [write_pair("a")], vars(options(imgSizes=16)))
    assert [x.shape for x in data[0]["img_data"]] == [(1, 3, 16, 24)]


def test_val_needs_a_mask(tmp_path: Path, write_pair: Writer, options: Options) -> None:
    record = write_pair("a")
    del record["fpath_segm"]
    with pytest.raises(ValueError, match=r"a\.png: the list gives no mask"):
        ValDataset(tmp_path, [record], options())[0]


def test_test_sample_needs_an_image_only(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    write_pair("a")
    path = str(tmp_path / "images/a.png")
    sample = TestDataset([{"fpath_img": path}], options())[0]
    assert set(sample) == {"img_ori", "img_data", "info"}
    assert sample["info"] == path and len(sample["img_data"]) == 2


def test_pixels_may_be_normalised_later(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("a", (50, 30))
    path = {"fpath_img": str(tmp_path / record["fpath_img"])}
    opt = options()
    pairs: list[tuple[Any, Any]] = [
        (
            ValDataset(tmp_path, [record], opt)[0],
            ValDataset(tmp_path, [record], opt, normalized=False)[0],
        ),
        (TestDataset([path], opt)[0], TestDataset([path], opt, normalized=False)[0]),
    ]
    for ready, raw in pairs:
        assert set(ready) == set(raw) and len(raw["img_data"]) == 2
        for done, pixels in zip(ready["img_data"], raw["img_data"]):
            assert pixels.dtype == torch.uint8
            assert pixels.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(Normalize.of(opt)(pixels), done)
