"""The weights that come with the repository: whole, small, and good at what they are for."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mit_semseg import Segmenter
from mit_semseg.cli import main
from mit_semseg.config import load_config
from mit_semseg.dataset import build_split
from mit_semseg.engine.checkpoint import CheckpointFolder
from mit_semseg.metrics import ConfusionMatrix

ROOT = Path(__file__).resolve().parents[1]
CAMVID = ROOT / "weights" / "camvid-mobilenetv2dilated-c1_deepsup"
RECIPE = ROOT / "config" / "camvid-mobilenetv2dilated-c1_deepsup.yaml"
DATA = Path(os.environ.get("SEMSEG_DATA", ROOT.parent / "shared" / "data")) / "CamVid"


def test_the_folder_is_whole_and_small():
    folder = CheckpointFolder(CAMVID)
    assert folder.best_or_latest() == "best.pth"
    assert len(folder.classes().names) == folder.config().DATASET.num_class == 11
    assert sum(file.stat().st_size for file in CAMVID.glob("*.pth")) < 6_000_000
    for name in ("metrics.jsonl", "curves.png", "log.txt", "eval.json"):
        assert (CAMVID / name).is_file(), name


def test_the_recipe_is_what_was_trained():
    recipe, trained = load_config(RECIPE), CheckpointFolder(CAMVID).config()
    assert recipe.DATASET == trained.DATASET
    # On the CPU, where it was trained, what is the default now is what was the default then.
    assert dict(trained.TRAIN) == {**recipe.TRAIN, "channels_last": True}
    assert recipe.TRAIN.channels_last == "auto"
    assert recipe.VAL.imgSizes == trained.VAL.imgSizes


def test_python_test_py_runs_it_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    # A sky above a road: no photograph, but the classes of the two halves are beyond doubt.
    picture = np.zeros((180, 240, 3), np.uint8)
    picture[:90] = (235, 240, 245)
    picture[90:] = (90, 90, 92)
    Image.fromarray(picture).save(tmp_path / "street.jpg")
    arguments = ["predict", "--imgs", str(tmp_path / "street.jpg"), "--gpu", "cpu"]
    arguments += ["--cfg", str(RECIPE), "TEST.result", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "sky: " in capsys.readouterr().out
    assert (tmp_path / "out" / "street_overlay.png").is_file()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no CamVid at {DATA} (or under $SEMSEG_DATA)")
def test_real_streets_are_parsed_as_measured():
    cfg = CheckpointFolder(CAMVID).config()
    cfg.DATASET.root_dataset = str(DATA)
    split = build_split(cfg.DATASET, "val")
    segmenter = Segmenter.from_checkpoint(CAMVID, device="cpu")
    matrix = ConfusionMatrix(11)
    for record in split.records[::20]:
        label = split.label_map(np.asarray(Image.open(record["fpath_segm"])), "mask")
        matrix.update(
            torch.from_numpy(segmenter(record["fpath_img"]).labels), torch.from_numpy(label)
        )
    figures = json.loads((CAMVID / "eval.json").read_text())
    # Every twentieth image of the clip says nearly what all of them say.
    assert matrix.compute()["pixel_accuracy"] == pytest.approx(figures["pixel_accuracy"], abs=0.02)
    assert figures["mean_iou"] > 0.62
