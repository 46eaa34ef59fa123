"""Sizes as factors of the image's own: by hand, in evaluation, prediction and `Segmenter`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mit_semseg.cli import main
from mit_semseg.config import DataOptions, Options, load_config
from mit_semseg.dataset.transforms import scaled_inputs
from mit_semseg.engine.checkpoint import load_model
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.windows import needs_windows
from mit_semseg.segmenter import Segmenter

NAMES = ("wall", "floor", "lamp", "plant")
CPU = torch.device("cpu")
FACTORS = (0.5, 1.25)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory, make_model, make_images):
    root = tmp_path_factory.mktemp("scales")
    make_images(root, [(48, 64), (64, 48), (40, 88)])
    data = {"DATASET__root_dataset": str(root), "DATASET__list_val": str(root / "val.odgt")}
    return make_model(root / "model", NAMES, **data)


@pytest.fixture
def image():
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC))


def test_sizes_by_hand():
    def sizes(height, width, **options):
        found = scaled_inputs(np.zeros((height, width, 3), np.uint8), options)
        return [tuple(x.shape[2:]) for x in found]

    factors = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    expected = [(240, 320), (360, 480), (480, 640), (600, 800), (720, 960), (840, 1120)]
    # Whatever imgSizes and imgMaxSize are; to multiples of padding_constant, and never 0.
    assert sizes(480, 640, scales=factors, imgSizes=[300], imgMaxSize=500) == expected
    assert sizes(101, 99, scales=0.5) == [(56, 56)]
    assert sizes(3, 5, scales=0.1, padding_constant=32) == [(32, 32)]
    assert sizes(48, 64, scales=1.0) == sizes(48, 64, imgSizes=0) == [(48, 64)]


def test_the_mean_over_scales_by_hand(cfg, image):
    """Pillow resizes, and torch computes, resizes and averages."""
    module = load_model(cfg, "best.pth").eval()
    mean, std = (np.array(x, np.float32) for x in (cfg.DATASET.mean, cfg.DATASET.std))
    p = 0
    for size in ((32, 24), (80, 64)):  # 60 pixels high at 1.25, to a multiple of 8
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        planes = torch.from_numpy((resized / np.float32(255) - mean) / std).permute(2, 0, 1)
        with torch.no_grad():
            logits = module.logits(planes[None].float())
        logits = F.interpolate(logits, (48, 64), mode="bilinear", align_corners=False)
        p = p + logits.softmax(1).numpy()[0] / 2
    result = Segmenter.from_checkpoint(cfg.DIR, device="cpu", scales=FACTORS)(
        image, probabilities=True
    )
    # Resizing is within a grey level of Pillow's.
    assert np.abs(result.probabilities() - p).max() < 0.05
    assert (result.labels == p.argmax(0)).mean() > 0.98


def test_prediction_evaluation_and_segmenter_agree(cfg, tmp_path):
    segmenter = Segmenter.from_checkpoint(cfg.DIR, device="cpu", scales=FACTORS)
    root = cfg.DATASET.root_dataset
    right = labelled = 0
    for line in Path(cfg.DATASET.list_val).read_text().splitlines():
        record = json.loads(line)
        stored = np.asarray(Image.open(f"{root}/{record['fpath_segm']}")).astype(int)
        found = segmenter(f"{root}/{record['fpath_img']}").labels
        right += (found == stored - 1).sum()
        labelled += (stored > 0).sum()
    changed = cfg.clone()
    changed.VAL.scales = list(FACTORS)
    result = evaluate(Options.read(changed), [CPU], out_dir=tmp_path / "eval")
    assert result["pixel_accuracy"] == pytest.approx(right / labelled)
    assert (result["scales"], result["imgSizes"]) == ([0.5, 1.25], [32, 48])
    words = ["--cfg", cfg.DIR, "--gpu", "cpu", "TEST.save", "index", "TEST.result", str(tmp_path)]
    path = f"{root}/{record['fpath_img']}"
    assert main(["predict", path, *words, "TEST.scales", "(0.5, 1.25)"]) == 0
    stored = np.asarray(Image.open(tmp_path / path.rpartition("/")[2]))
    np.testing.assert_array_equal(stored - cfg.DATASET.label_offset, segmenter(path).labels)


def test_which_setting_counts(cfg):
    def scales(**given):
        changed = cfg.clone()
        for key, value in given.items():
            section, _, name = key.partition("__")
            changed[section][name] = value
        options = Options.read(changed)
        return options.DATASET.at_scales(options.VAL.imgSizes, options.VAL.scales)

    assert scales(DATASET__scales=[2.0]).scales == (2.0,)
    assert scales(DATASET__scales=[2.0], VAL__scales=[0.5]).scales == (0.5,)
    assert scales(VAL__scales=[0.5], VAL__imgSizes=[450]).scales == (0.5,)
    both = scales(DATASET__scales=[2.0], VAL__imgSizes=[450])
    assert (both.scales, both.imgSizes) == ((), (450,))
    assert scales().sizes_text == "short sides 32, 48"
    assert scales(VAL__scales=[0.5, 1]).sizes_text == "0.5, 1 times the image's size"
    tuned = Segmenter.from_checkpoint(cfg.DIR, device="cpu", imgSizes=40)
    assert (tuned.opt.imgSizes, tuned.opt.scales) == ((40,), ())


@pytest.mark.parametrize("wrong", ["0", "-1", "(0.5, 9)", "half", "nan"])
def test_wrong_factors(wrong):
    with pytest.raises(ValueError, match=r"TEST.scales is .*; give factors of the image's size"):
        load_config(None, ["TEST.scales", wrong])
    with pytest.raises(ValueError, match="DATASET.scales is"):
        DataOptions().at_scales((), float("nan"))


def test_large_rasters_by_windows():
    options = DataOptions(bands=["1", "2"], mean=[0, 0], std=[1, 1], imgSizes=300)
    large = (10000, 10000)
    assert not needs_windows(large, options)
    assert needs_windows(large, options.at_scales((), (0.5, 1)))
    assert needs_windows(large, options.at_scales(0))
