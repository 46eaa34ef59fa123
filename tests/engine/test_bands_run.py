"""A model of five bands, whose classes only the near infrared tells apart: trained, evaluated,
resumed, and run on files, arrays and windows."""

import io
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import CPU, SMALL, assert_same_weights, signal_after

from mit_semseg import Segmenter
from mit_semseg.config import load_config
from mit_semseg.engine import cpu, windows
from mit_semseg.engine.checkpoint import pack
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.predict import predict
from mit_semseg.engine.train import train
from mit_semseg.engine.training import metrics_log
from mit_semseg.models import ENCODERS
from mit_semseg.visualize.bands import picture

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")

NAMES = ("blue", "green", "red", "nir", "swir")
MEAN, STD = 3000.0, 1500.0


def scene(path, number, height=48, width=64):
    """Plants, bright in the near infrared only, of 8 x 8 pixels each; a corner without values."""
    rng = np.random.default_rng(number)
    plants = np.kron(rng.random((height // 8, width // 8)) < 0.5, np.ones((8, 8))).astype(bool)
    planes = rng.normal(MEAN, 300, (5, height, width))
    planes[3] += np.where(plants, 2000, -2000)
    planes = planes.clip(1, None).astype(np.uint16)
    planes[:, :8, :8] = 0
    place = rasterio.Affine(10, 0, 500000 + number, 0, -10, 5500000)
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 5, "nodata": 0}
    profile |= {"height": height, "width": width, "crs": "EPSG:32632", "transform": place}
    for folder in ("images", "masks"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    with rasterio.open(path / f"images/{number}.tif", "w", **profile) as file:
        file.write(planes)
        file.descriptions = NAMES
    Image.fromarray(plants.astype(np.uint8) + 1).save(path / f"masks/{number}.png")
    return plants


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(bands, name, **changes)` -> the configuration of a training on eight scenes."""
    folder = tmp_path_factory.mktemp("bands")
    for number in range(12):
        scene(folder / ("val" if number > 7 else "train"), number)

    def build(bands, name, **changes):
        values = {
            "DIR": str(folder / name),
            "DATASET__root_dataset": str(folder),
            "DATASET__format": "folder",
            "DATASET__list_train": "train/images:train/masks",
            "DATASET__list_val": "val/images:val/masks",
            "DATASET__num_class": 2,
            "DATASET__imgSizes": [0],
            "DATASET__segm_downsampling_rate": 4,
            "DATASET__bands": list(bands),
            "MODEL__in_channels": len(bands),
            "DATASET__mean": [MEAN] * len(bands),
            "DATASET__std": [STD] * len(bands),
            "MODEL__arch_encoder": "small",
            "MODEL__arch_decoder": "c1",
            "MODEL__fc_dim": 16,
            "MODEL__weights_encoder": "none",
            "TRAIN__num_epoch": 2,
            "TRAIN__epoch_iters": 25,
            "TRAIN__workers": 0,
            "TEST__save": ["index"],
            "TEST__checkpoint": "best.pth",
            "VAL__checkpoint": "best.pth",
            **changes,
        }
        return load_config(None, [x for k, v in values.items() for x in (k.replace("__", "."), v)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_fixed_threads", torch.get_num_threads())
        for encoder, kind in SMALL.items():
            patch.setitem(ENCODERS._entries, encoder, kind)
        patch.setattr(metrics_log, "curves", lambda figures, file: None)
        yield build


@pytest.fixture(scope="module")
def trained(run):
    """A model of all bands, and its mean IoU."""
    cfg = run(NAMES, "model")
    return cfg, train(cfg, [CPU], progress=False)["best_mean_iou"]


def test_the_near_infrared_is_learned_and_colours_alone_are_not(run, trained, tmp_path):
    every, mean_iou = trained
    colours = run(("red", "green", "blue"), "colours")
    assert mean_iou > 0.95 and train(colours, [CPU], progress=False)["best_mean_iou"] < 0.5
    every = every.clone()
    every.VAL.visualize = True
    scores = evaluate(every, [CPU], progress=False, out_dir=tmp_path, report=True)
    assert len(list(tmp_path.rglob("*.png"))) >= 4 and (tmp_path / "report.html").is_file()
    assert scores["mean_iou"] == pytest.approx(mean_iou)
    assert scores["pixels"] == 4 * (48 * 64 - 64)  # without those that have no value


def test_a_run_with_bands_resumes_exactly(run, monkeypatch):
    changes = {
        "TRAIN__epoch_iters": 2,
        "TRAIN__eval_epochs": 0,
        "DATASET__batching": "crop",
        "DATASET__crop_size": [32, 32],
        "DATASET__classmix": 0.5,
    }
    whole, cut = (run(NAMES, name, **changes) for name in ("whole", "cut"))
    train(whole, [CPU], progress=False)
    with monkeypatch.context() as patch:
        signal_after(1, signal.SIGTERM, patch)
        assert train(cut, [CPU], progress=False)["stopped"] == "SIGTERM"
    train(cut, [CPU], resume="auto", progress=False)
    assert_same_weights(whole, cut, "epoch_2.pth")


def read(path):
    with rasterio.open(path) as file:
        return file.read(1), file.crs, file.transform, file.nodata


def test_prediction_of_files_and_arrays(trained, tmp_path):
    cfg, _ = trained
    images = Path(cfg.DATASET.root_dataset) / "val/images"
    with warnings.catch_warnings():
        warnings.simplefilter("error", rasterio.errors.NotGeoreferencedWarning)
        results = predict(cfg, images, CPU, result=tmp_path / "out", progress=False)
    plants = scene(tmp_path / "again", 9)
    (one,) = [x for x in results if x["image"].endswith("9.tif")]
    labels, crs, place, nodata = read(one["outputs"]["index"])
    with rasterio.open(images / "9.tif") as file:
        assert (crs, place) == (file.crs, file.transform)
        values = file.read().transpose(1, 2, 0)
    assert nodata == 0 and (labels[:8, :8] == 0).all() and (labels == 0).sum() == 64
    assert (labels == plants + 1).mean() > 0.95
    assert sum(one["areas"].values()) == pytest.approx(1 - 64 / labels.size)

    segmenter = Segmenter.from_checkpoint(cfg.DIR, device="cpu")
    result = segmenter(images / "9.tif")
    assert np.array_equal(result.labels, labels.astype(int) - 1)
    assert result.image.shape == (48, 64, 3) and result.image.dtype == np.uint8
    assert not result.image[:8, :8].any()
    result.save(tmp_path / "overlay.png")
    array = np.where(values == 0, np.nan, values)
    content = (images / "9.tif").read_bytes()
    for source in (array, content, io.BytesIO(content)):
        assert np.array_equal(segmenter(source).labels, result.labels)
    with pytest.raises(ValueError, match="^image: not a readable raster"):
        segmenter(b"no raster")
    assert np.array_equal(segmenter(array[None])[0].labels, result.labels)
    for wrong in (array[..., :3], Image.fromarray(result.image)):
        with pytest.raises(ValueError, match=r"give a file or an array \(H, W, 5\) in the units"):
            segmenter(wrong)
    packed = Segmenter.from_checkpoint(pack(cfg.DIR, tmp_path / "packed"), device="cpu")
    assert (packed(array).labels == result.labels).mean() > 0.99


def test_pictures_of_bands(trained, tmp_path):
    changed = trained[0].clone()
    changed.TEST.save = ["overlay", "color", "side", "index", "prob"]
    source = Path(changed.DATASET.root_dataset) / "val/images/8.tif"
    (one,) = predict(changed, source, CPU, result=tmp_path / "out", progress=False)
    side = np.asarray(Image.open(one["outputs"]["side"]))
    with rasterio.open(source) as file:
        red = file.read(3).astype(float)
    low, high = np.percentile(red[red > 0], [2, 98])
    expected = np.where(red > 0, (255 * (red - low) / (high - low)).clip(0, 255), 0)
    assert np.abs(side[:, :64, 0] - expected).max() <= 1
    assert np.load(one["outputs"]["prob"]).shape == (2, 48, 64)
    grey = picture(np.array([[[0.0], [1.0]]], dtype=np.float32), ("nir",))
    assert grey.tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_windows_agree_with_the_whole_raster(trained, tmp_path, monkeypatch):
    cfg, _ = trained
    plants = scene(tmp_path / "large", 0, 416, 608)
    source = tmp_path / "large/images/0.tif"
    (whole,) = predict(cfg, source, CPU, result=tmp_path / "whole", progress=False)
    monkeypatch.setattr(windows, "PIXELS", 10_000)
    monkeypatch.setattr(windows, "SIDE", 192)
    monkeypatch.setattr(windows, "OVERLAP", 64)
    (parts,) = predict(cfg, source, CPU, result=tmp_path / "parts", progress=False)
    found, expected = (read(one["outputs"]["index"]) for one in (parts, whole))
    assert found[1:] == expected[1:]
    # The overlap is larger than what the network sees.
    assert np.array_equal(found[0], expected[0])
    assert (found[0] == plants + 1).mean() > 0.95
    assert parts["areas"] == pytest.approx(whole["areas"]) and parts["size"] == (608, 416)
    changed = cfg.clone()
    changed.TEST.save = ["overlay", "index"]
    (one,) = predict(changed, source, CPU, result=tmp_path / "both", progress=False)
    assert "608x416 pixels are predicted by windows, without overlay: set TEST.save" in one["error"]
