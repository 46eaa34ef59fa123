"""What the data sets share: a part of a list, and the published names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import rounding

from mit_semseg.dataset import BaseDataset, TestDataset, TrainDataset, ValDataset, imresize

OPTIONS = SimpleNamespace(num_class=4, imgSizes=(16, 24), imgMaxSize=64)
COUNT = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_images(folder, [(24, 32)] * COUNT)
    return folder


def make(kind: str, root: Path, **part: int) -> Any:
    odgt = str(root / "val.odgt")
    if kind == "test":
        return TestDataset(odgt, OPTIONS, **part)
    if kind == "val":
        return ValDataset(root, odgt, OPTIONS, **part)
    return TrainDataset(root, odgt, OPTIONS, batch_per_gpu=2, **part)


@pytest.mark.parametrize("kind", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("part", "kept"),
    [
        ({}, range(5)),
        ({"max_sample": 2}, range(2)),
        ({"max_sample": 0}, range(5)),
        ({"max_sample": 99}, range(5)),
        ({"start_idx": 1, "end_idx": 3}, range(1, 3)),
        ({"start_idx": 3, "end_idx": 99}, range(3, 5)),
        ({"start_idx": 3}, range(5)),  # as published, both or none
        ({"max_sample": 4, "start_idx": 2, "end_idx": 5}, range(2, 4)),
    ],
)
def test_a_part_of_the_list(kind: str, root: Path, part: dict[str, int], kept: range) -> None:
    data = make(kind, root, **part)
    names = [f"img/part{k % 2}/{k}.png" for k in kept]
    assert [record["fpath_img"] for record in data.list_sample] == names
    assert data.num_sample == len(names)
    assert len(data) == (10**10 if kind == "train" else len(names))


def test_what_workers_take_is_all_of_it(root: Path) -> None:
    """As the published evaluation divides a list among its processes."""
    share = -(-COUNT // 2)
    seen = []
    for k in range(2):
        data = make("val", root, start_idx=k * share, end_idx=min((k + 1) * share, COUNT))
        seen += [data[i]["info"] for i in range(len(data))]
    assert seen == [make("val", root)[i]["info"] for i in range(COUNT)]


def test_nothing_left_is_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match=r"start_idx 5 and end_idx 5 leave none of the 5 records"):
        make("val", root, start_idx=5, end_idx=5)
    with pytest.raises(TypeError, match="first"):
        make("val", root, first=1)


@pytest.mark.parametrize("kind", ["train", "val", "test"])
def test_published_attributes(kind: str, root: Path) -> None:
    data = make(kind, root)
    assert isinstance(data, BaseDataset)
    assert (tuple(data.imgSizes), data.imgMaxSize, data.padding_constant) == ((16, 24), 64, 8)
    assert data.round2nearest_multiple(17, 8) == 24
    assert data.round2nearest_multiple(16, 8) == 16
    if kind == "train":
        assert (data.batch_per_gpu, data.segm_downsampling_rate) == (2, 8)
    if kind != "test":
        assert data.root_dataset == str(root)


def test_published_transforms_by_hand() -> None:
    data = BaseDataset([{"fpath_img": "a.png"}], OPTIONS)
    pixels = np.array([[[0, 51, 255], [255, 0, 102]]], dtype=np.uint8)  # (1, 2, 3)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    for image in (pixels, Image.fromarray(pixels), pixels.astype(np.float32)):
        out = data.img_transform(image)
        assert out.dtype == torch.float32
        np.testing.assert_allclose(out.numpy(), expected, atol=rounding(out, 4))
    mask = np.array([[0, 1, 4]], dtype=np.uint8)
    for segm in (mask, Image.fromarray(mask)):
        out = data.segm_transform(segm)
        assert out.dtype == torch.int64
        assert out.tolist() == [[-1, 0, 3]]
    with pytest.raises(ValueError, match="label 9"):
        data.segm_transform(np.array([[9]]))


def test_transforms_follow_the_options() -> None:
    options = SimpleNamespace(
        num_class=2,
        label_offset=0,
        color_order="BGR",
        value_range=255,
        mean=(1, 2, 3),
        std=(1, 1, 2),
    )
    data = BaseDataset([{"fpath_img": "a.png"}], options)
    out = data.img_transform(np.array([[[10, 20, 30]]], dtype=np.uint8))
    np.testing.assert_allclose(out.flatten().numpy(), [29, 18, 3.5], rtol=1e-5)
    assert data.segm_transform(np.array([[0, 1]])).tolist() == [[0, 1]]


def test_transforms_agree_with_the_samples(root: Path) -> None:
    data = make("val", root)
    sample = data[0]
    at_its_size = ValDataset(root, data.list_sample, SimpleNamespace(num_class=4, imgSizes=24))[0]
    image = data.img_transform(sample["img_ori"])
    torch.testing.assert_close(at_its_size["img_data"][0][0], image)
    mask = Image.open(root / "ann/part0/0.png")
    assert torch.equal(sample["seg_label"][0], data.segm_transform(mask))


def test_a_method_that_would_not_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Mine.segm_transform would never be called.*label_offset"):

        class Mine(ValDataset):
            def segm_transform(self, segm: Any) -> torch.Tensor:
                return torch.zeros(1)

    class Own(BaseDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"seg_label": self.segm_transform(index)}

        def segm_transform(self, segm: Any) -> torch.Tensor:
            return torch.full((1,), segm)

    assert Own([{"fpath_img": "a.png"}], OPTIONS)[7]["seg_label"] == 7


def test_a_list_of_ones_own_kind_is_read() -> None:
    class Numbers(BaseDataset):
        def parse_input_list(self, odgt: Any, count: int = 1) -> None:  # type: ignore[override]
            self.list_sample = [{"fpath_img": f"{odgt}{k}.png"} for k in range(count)]
            self.num_sample = count

    assert len(Numbers("a", OPTIONS, count=3)) == 3


@pytest.mark.parametrize(
    ("interp", "resample"),
    [
        ("nearest", Image.Resampling.NEAREST),
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
    ],
)
def test_imresize_is_pillows(interp: str, resample: Image.Resampling) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    assert imresize(image, (4, 5), interp).tobytes() == image.resize((4, 5), resample).tobytes()


def test_imresize_refuses_other_filters() -> None:
    image = Image.new("L", (2, 2))
    assert imresize(image, (1, 1)).size == (1, 1)
    with pytest.raises(ValueError, match="'nearest', 'bilinear', 'bicubic'"):
        imresize(image, (1, 1), "lanczos")
