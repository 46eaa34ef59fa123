"""What the data sets share: a part of a list, and the published names."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import normalize
from PIL import Image
from tolerances import rounding

from mit_semseg.config import DataOptions
from mit_semseg.dataset import BaseDataset, TestDataset, TrainDataset, ValDataset, imresize

OPTIONS = SimpleNamespace(num_class=4, imgSizes=(16, 24), imgMaxSize=64)
ONE = [{"fpath_img": "a.png"}]
COUNT = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_images):
    folder = tmp_path_factory.mktemp("samples")
    make_images(folder, [(24, 32)] * COUNT)
    return folder


def make(kind, root, **part):
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
def test_a_part_of_the_list(kind, root, part, kept):
    data = make(kind, root, **part)
    names = [f"img/part{k % 2}/{k}.png" for k in kept]
    assert [record["fpath_img"] for record in data.list_sample] == names
    assert data.num_sample == len(names)
    assert len(data) == (10**10 if kind == "train" else len(names))
    # The published attributes.
    assert isinstance(data, BaseDataset)
    assert (tuple(data.imgSizes), data.imgMaxSize, data.padding_constant) == ((16, 24), 64, 8)
    assert [data.round2nearest_multiple(n, 8) for n in (16, 17)] == [16, 24]
    if kind == "train":
        assert (data.batch_per_gpu, data.segm_downsampling_rate) == (2, 8)
    if kind != "test":
        assert data.root_dataset == str(root)


def test_an_empty_part_of_a_list_is_an_error(root):
    with pytest.raises(ValueError, match=r"start_idx 5 and end_idx 5 leave none of the 5 records"):
        make("val", root, start_idx=5, end_idx=5)
    with pytest.raises(TypeError, match="first"):
        make("val", root, first=1)


@pytest.mark.parametrize(
    "changes", [{}, {"color_order": "BGR", "value_range": 255, "mean": (1, 2, 3), "std": (1, 1, 2)}]
)
def test_published_transforms(root, changes):
    options = DataOptions.read({**vars(OPTIONS), "imgSizes": 24, **changes})
    sample = ValDataset(root, str(root / "val.odgt"), options)[0]
    data, pixels = BaseDataset(ONE, options), sample["img_ori"]
    for image in (pixels, Image.fromarray(pixels), pixels.astype(np.float32)):
        out = data.img_transform(image)
        assert out.dtype == torch.float32
        for expected in (normalize(pixels, options), sample["img_data"][0][0]):
            assert (out - expected).abs().max() <= rounding(out, 4)
    with Image.open(root / "ann/part0/0.png") as mask:
        for segm in (mask, np.asarray(mask)):
            assert torch.equal(data.segm_transform(segm), sample["seg_label"][0])
    assert data.segm_transform(np.array([[0, 1, 4]])).tolist() == [[-1, 0, 3]]
    with pytest.raises(ValueError, match="label 9"):
        data.segm_transform(np.array([[9]]))


def test_methods_of_subclasses():
    with pytest.raises(TypeError, match=r"Mine.segm_transform would never be called.*label_offset"):

        class Mine(ValDataset):
            def segm_transform(self, segm):
                return torch.zeros(1)

    class Own(BaseDataset):
        def parse_input_list(self, odgt, count=1):
            self.list_sample = [{"fpath_img": f"{odgt}{k}.png"} for k in range(count)]
            self.num_sample = count

        def __getitem__(self, index):
            return {"seg_label": self.segm_transform(index)}

        def segm_transform(self, segm):
            return torch.full((1,), segm)

    data = Own("a", OPTIONS, count=3)
    assert len(data) == 3 and data[7]["seg_label"] == 7


@pytest.mark.parametrize("interp", ["nearest", "bilinear", "bicubic"])
def test_imresize_is_pillows(interp):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    expected = image.resize((4, 5), Image.Resampling[interp.upper()])
    assert imresize(image, (4, 5), interp).tobytes() == expected.tobytes()
    assert imresize(image, (1, 1)).size == (1, 1)
    with pytest.raises(ValueError, match="'nearest', 'bilinear', 'bicubic'"):
        imresize(image, (1, 1), "lanczos")
