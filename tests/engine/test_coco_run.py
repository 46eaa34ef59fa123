"""An annotation file of one's own, from training to pictures, by the commands."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mit_semseg.cli import main
from mit_semseg.segmenter import Segmenter

NAMES = ["background", "pole", "sign"]


def write(root, file, categories):
    """Two images of 32 x 48 pixels with a pole and a sign, whose ids `categories` says."""
    ids = {name: key for key, name in categories.items()}
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": key, "name": name} for key, name in categories.items()]
    (root / "photos").mkdir(parents=True, exist_ok=True)
    for k in range(2):
        pixels = np.full((32, 48, 3), 90, np.uint8)
        pixels[:, 8:16], pixels[8:24, 24:40] = (250, 40, 40), (40, 250, 250)
        Image.fromarray(pixels).save(root / f"photos/{k}.png")
        content["images"].append({"id": k, "file_name": f"{k}.png", "width": 48, "height": 32})
        shapes = {
            "pole": [[8, 0, 16, 0, 16, 32, 8, 32]],
            "sign": {"size": [32, 48], "counts": [24 * 32 + 8, *[16, 16] * 15, 16, 8 * 32 + 8]},
        }
        content["annotations"] += [
            {"image_id": k, "category_id": ids[name], "segmentation": shape}
            for name, shape in shapes.items()
        ]
    (root / file).write_text(json.dumps(content))


@pytest.fixture
def settings(tmp_path):
    """`KEY value` pairs of a small job on `photos:train.json`."""
    write(tmp_path / "data", "train.json", {1: "pole", 5: "sign"})
    values = {
        "DIR": tmp_path / "model",
        "DATASET.format": "coco",
        "DATASET.root_dataset": tmp_path / "data",
        "DATASET.list_train": "photos:train.json",
        "DATASET.list_val": "photos:train.json",
        "DATASET.num_class": 3,
        "DATASET.imgSizes": 32,
        "DATASET.segm_downsampling_rate": 1,
        "MODEL.arch_encoder": "enet",
        "MODEL.arch_decoder": "enet",
        "MODEL.fc_dim": 128,
        "MODEL.weights_encoder": "none",
        "TRAIN.num_epoch": 1,
        "TRAIN.epoch_iters": 2,
        "TRAIN.workers": 0,
        "VAL.checkpoint": "best.pth",
        "TEST.checkpoint": "best.pth",
        "TEST.result": tmp_path / "out",
        "TEST.save": "[legend,overlay]",
    }
    return [str(word) for pair in values.items() for word in pair]


def command(name, settings, *words):
    file = Path(settings[1]).with_name("empty.yaml")
    file.write_text("")
    return main([name, *words, "--gpus", "cpu", "--cfg", str(file), *settings])


def test_names_of_categories_reach_figures_and_pictures(tmp_path, settings, capsys):
    data = tmp_path / "data"
    # The same two names, numbered the other way round: figures would be of the wrong classes.
    write(data, "val.json", {1: "sign", 5: "pole"})
    swapped = [*settings, "DATASET.list_val", "photos:val.json"]
    assert command("train", swapped) == 2
    output = capsys.readouterr().err
    assert "different classes, background, pole, sign and background, sign, pole" in output

    assert main(["data", "check", "photos:train.json", "--root", str(data)]) == 0
    output = capsys.readouterr().out
    for name, pixels in (("pole", 2 * 8 * 32), ("sign", 2 * 16 * 16)):
        assert f" {name} " in output and f" {pixels} " in output
    assert command("train", settings) == 0
    with open(tmp_path / "model/classes.csv", newline="") as file:
        assert [row["Name"] for row in csv.DictReader(file)] == NAMES
    assert command("eval", swapped) == 2
    output = capsys.readouterr().err
    assert "class 1 is 'pole' in the checkpoint and 'sign' in DATASET.list_val" in output
    assert command("eval", settings) == 0
    report = json.loads((tmp_path / "model/result_eval/eval.json").read_text())
    assert [row["name"] for row in report["classes"]] == NAMES
    assert report["classes"][1]["pixel_share"] == pytest.approx(8 / 48)
    capsys.readouterr()
    assert command("predict", settings, "--imgs", str(data / "photos")) == 0
    predicted = [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert set(predicted) & set(NAMES) and "person" not in predicted
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("0.png", "1.png", "0_legend.png", "1_legend.png")
    }
    segmenter = Segmenter.from_checkpoint(tmp_path / "model", device="cpu")
    assert list(segmenter.classes.names) == NAMES
