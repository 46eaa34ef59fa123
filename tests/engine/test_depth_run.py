"""A model of four channels: trained, evaluated, and run on a folder, from SUN RGB-D's layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mit_semseg.config import load_config
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.launch import read_config
from mit_semseg.engine.predict import predict
from mit_semseg.engine.train import train
from mit_semseg.segmenter import Segmenter

CPU = torch.device("cpu")


def frame(root, name, number):
    """A frame in which depth alone tells the wall (far) from the floor (near)."""
    rng = np.random.default_rng(number)
    wall = np.zeros((32, 48), bool)
    wall[: 8 + 4 * (number % 3)] = True
    millimetres = np.where(wall, 4000, 1000).astype(np.uint16)
    folder = root / "SUNRGBD" / "kv2" / name
    files = {
        folder / "image" / f"{name}.png": rng.integers(0, 256, (32, 48, 3), dtype=np.uint8),
        folder / "depth_bfx" / f"{name}_abs.png": millimetres << 3,
        root / f"sunrgbd_train_test_labels/img-{number:06d}.png": np.where(wall, 1, 2),
    }
    for path, array in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(array.dtype if array.dtype != int else np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sun")
    for listing, first in (("training", 5051), ("testing", 1)):
        names = [f"{listing}{k}" for k in range(3)]
        for k, name in enumerate(names):
            frame(root, name, first + k)
        lines = [f"SUNRGBD/kv2/{name}/image/{name}.png\n" for name in names]
        (root / f"sunrgbd_{listing}_images.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """Two steps of a small model."""
    folder = tmp_path_factory.mktemp("run") / "model"
    opts = [
        *("DIR", str(folder), "DATASET.format", "sunrgbd", "DATASET.root_dataset", str(root)),
        *("DATASET.list_train", "train", "DATASET.list_val", "val", "DATASET.num_class", 37),
        *("DATASET.depth", True, "MODEL.in_channels", 4, "DATASET.imgSizes", [32]),
        *("MODEL.arch_encoder", "mobilenetv2dilated", "MODEL.arch_decoder", "c1"),
        *("MODEL.fc_dim", 320, "MODEL.weights_encoder", "none", "TRAIN.num_epoch", 1),
        *("TRAIN.epoch_iters", 2, "TRAIN.workers", 0, "TEST.checkpoint", "best.pth"),
        *("VAL.checkpoint", "best.pth", "TEST.save", ["index"]),
    ]
    cfg = load_config(None, opts)
    return cfg, train(cfg, [CPU], progress=False)


def test_two_steps_and_an_evaluation(trained, tmp_path, caplog):
    cfg, result = trained
    assert result["step"] == 2 and result["best_mean_iou"] is not None
    weights = torch.load(Path(cfg.DIR) / "encoder_best.pth", weights_only=True)
    assert [w.shape[1] for w in weights.values() if w.dim() == 4][0] == 4
    scores = evaluate(cfg, [CPU], progress=False, out_dir=tmp_path)
    assert scores["images"] == 3 and scores["pixels"] == 3 * 32 * 48
    assert scores["mean_iou"] == pytest.approx(result["best_mean_iou"])
    assert "not folded" not in caplog.text  # the trial image has four channels, too


def test_a_folder_with_depth_beside_the_images(trained, root, tmp_path):
    cfg, _ = trained
    native = predict(cfg, root / "SUNRGBD", CPU, result=tmp_path / "a", progress=False)
    assert len(native) == 6 and not any("error" in one for one in native)  # and no depth as image
    # The same frame in plain files, in plain millimetres.
    image = root / "SUNRGBD/kv2/testing0/image/testing0.png"
    depth = np.asarray(Image.open(root / "SUNRGBD/kv2/testing0/depth_bfx/testing0_abs.png"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/photo.png").write_bytes(image.read_bytes())
    Image.fromarray(depth >> 3).save(tmp_path / "in/photo_depth.png")
    plain = cfg.clone()
    plain.DATASET.depth_scale = 1000.0
    (one,) = predict(plain, tmp_path / "in", CPU, result=tmp_path / "b", progress=False)
    (same,) = [x for x in native if x["image"] == str(image)]
    pictures = [np.asarray(Image.open(x["outputs"]["index"])) for x in (one, same)]
    assert np.array_equal(*pictures)
    # One image without depth is reported, none with depth is refused.
    Image.open(image).save(tmp_path / "in/alone.png")
    results = predict(plain, tmp_path / "in", CPU, result=tmp_path / "b", progress=False)
    (error,) = [x["error"] for x in results if "error" in x]
    assert "no depth image; put alone_depth.png beside it, or depth/alone.png" in error
    (tmp_path / "in/photo_depth.png").unlink()
    with pytest.raises(FileNotFoundError, match="no depth image found for 2 images, "):
        predict(plain, tmp_path / "in", CPU, result=tmp_path / "b", progress=False)


def test_segmenter(trained, root):
    cfg, _ = trained
    segmenter = Segmenter.from_checkpoint(cfg.DIR, device="cpu")
    path = root / "SUNRGBD/kv2/testing1/image/testing1.png"
    image = np.asarray(Image.open(path))
    metres = np.full(image.shape[:2], 4.0)
    metres[12:] = 1
    expected = segmenter(path).labels
    assert np.array_equal(segmenter(image, depth=metres).labels, expected)
    with pytest.raises(ValueError, match="give the argument depth"):
        segmenter(image)
    with pytest.raises(ValueError, match=r"depth has shape \(12, 48\), but the image \(32, 48\)"):
        segmenter(image, depth=metres[:12])
    with pytest.raises(ValueError, match="depth is for a single image"):
        segmenter([image], depth=metres)


def test_refused_before_any_work(trained, root, tmp_path):
    cfg, _ = trained
    folder = cfg.clone()
    folder.DIR = str(tmp_path / "none")
    folder.DATASET.depth = False
    for start in (lambda: train(folder, [CPU]), lambda: predict(folder, root, CPU)):
        with pytest.raises(ValueError, match="in_channels is 4 and DATASET.depth False"):
            start()
    with pytest.raises(ValueError, match="in_channels is 4 and DATASET.depth False"):
        read_config(None, ["MODEL.in_channels", "4"])
    listing = tmp_path / "flat.odgt"
    record = {"fpath_img": "a.png", "fpath_segm": "b.png", "width": 4, "height": 4}
    listing.write_text(json.dumps(record) + "\n")
    lists = cfg.clone()
    lists.DATASET.format, lists.DATASET.list_train = "odgt", str(listing)
    with pytest.raises(ValueError, match=r"list_train has no depth for 1 of 1 images"):
        train(lists, [CPU])
    assert not (tmp_path / "none").exists()
