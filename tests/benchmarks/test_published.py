"""The published procedure, as re-expressed for the benchmark, computes what ours does."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mit_semseg import scores
from mit_semseg.benchmarks import published
from mit_semseg.dataset import ClassTable, TrainDataset
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.metrics import ConfusionMatrix
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.segmenter import Segmenter
from mit_semseg.visualize import color_encode, palette


def build(encoder, decoder):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, weights="none")
    dec = ModelBuilder.build_decoder(
        decoder, num_class=9, channels=enc.channels, strides=enc.strides
    )
    return SegmentationModule(enc, dec, None, normalize=Normalize.of({})).eval()


@pytest.mark.parametrize(
    ("encoder", "decoder"), [("resnet18dilated", "ppm"), ("mobilenetv2dilated", "c1")]
)
@torch.no_grad()
def test_the_published_network_computes_the_same(encoder, decoder):
    module = build(encoder, decoder)
    plain = published.as_published(module)
    kinds = {type(layer) for layer in plain.modules()}
    assert DepthwiseConv2d not in kinds
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(plain.logits(x), module.logits(x), rtol=1e-4, atol=1e-5)


def test_one_image_gets_the_same_labels():
    module = build("resnet18dilated", "ppm")
    # Flat random scores would tie: the classifier's are spread out.
    nn.init.normal_(module.decoder.conv_last[-1].weight, std=1)
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    plain = published.as_published(module)
    plain.decoder.use_softmax = True
    theirs = published.predict(plain, image, (64, 96))
    segmenter = Segmenter(module, ClassTable.numbered(9), {"imgSizes": (64, 96)})
    assert (segmenter(image).labels == theirs).mean() > 0.998


@pytest.mark.parametrize("count", [1, 3])
def test_class_maps_are_the_same(count):
    torch.manual_seed(0)
    logits = [torch.randn(2, 7, 5 + 2 * k, 8 + k) for k in range(count)]
    theirs = published.class_map(logits, (41, 53))
    assert torch.equal(theirs, scores.class_map(logits, (41, 53)))


def test_counts_are_the_same():
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 6, (40, 50)), rng.integers(-1, 6, (40, 50))
    accuracy, intersection, union = published.count(prediction, label, 6)
    matrix = ConfusionMatrix(6)
    matrix.update(prediction, label)
    figures = matrix.compute()
    assert accuracy == pytest.approx(figures["pixel_accuracy"])
    np.testing.assert_allclose(intersection / union, figures["iou"].numpy())


def test_colours_are_the_same():
    labels = np.random.default_rng(0).integers(-1, 12, (30, 40))
    colors = palette(12)
    assert np.array_equal(published.color_encode(labels, colors), color_encode(labels, colors))


def test_batches_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    files = {}
    for k, (height, width) in enumerate([(100, 140), (90, 150)]):
        image, mask = tmp_path / f"{k}.png", tmp_path / f"{k}_mask.png"
        smooth = rng.integers(0, 255, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC).save(image)
        Image.fromarray(rng.integers(0, 9, (height, width), dtype=np.uint8)).save(mask)
        files[str(image)] = str(mask)
        paths = {"fpath_img": str(image), "fpath_segm": str(mask)}
        records.append({**paths, "width": width, "height": height})
    options = {"imgSizes": (64,), "random_flip": False, "num_class": 8}
    data = TrainDataset("", records, options, batch_per_gpu=2)
    ours = data[0]
    theirs = published.training_batch(
        [(path, files[path]) for path in ours["info"]], 64, 1000, [False, False]
    )
    assert theirs["img_data"].shape == ours["img_data"].shape
    # One grey level, in units of the smallest standard deviation.
    level = 1 / 255 / min(published.STD)
    assert (theirs["img_data"] - ours["img_data"]).abs().max() <= level * 1.001
    # The published code labels the padding of a batch with class 0, ours ignores it.
    inside = ours["seg_label"] >= 0
    assert torch.equal(theirs["seg_label"][inside], ours["seg_label"][inside])
