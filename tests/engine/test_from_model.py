"""What `--model` and `--data` are completed with."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mit_semseg import shipped
from mit_semseg.cli import main
from mit_semseg.config import DataOptions, load_options
from mit_semseg.engine.checkpoint import CheckpointFolder
from mit_semseg.engine.from_model import classes_of, on_data, recipe, training_options

SMALL = ["DATASET.imgSizes", "(64,)", "VAL.imgSizes", "(64,)", "TEST.imgSizes", "(64,)"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Six images with masks of the values 0 and 255, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    for k in range(6):
        image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(image).save(f"photos/{k}.png")
        Image.fromarray(np.where(image[..., 0] > 127, 255, 0).astype(np.uint8)).save(
            f"masks/{k}.png"
        )
    return tmp_path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({0, 1, 2}, {"num_class": 3, "label_offset": 0}),
        ({1, 2, 4}, {"num_class": 4, "label_offset": 1}),
        ({0, 1, 255}, {"num_class": 2, "label_offset": 0, "ignore_label": (255,)}),
        ({0, 255}, {"num_class": 2, "label_map": ((0, 0), (255, 1))}),
        ({10, 90, 255}, {"num_class": 2, "label_map": ((10, 0), (90, 1), (255, -1))}),
    ],
)
def test_classes_follow_from_the_values_in_masks(values, expected):
    found = classes_of(values)
    assert {key: found[key] for key in expected} == expected
    DataOptions.read(found)


def test_masks_of_one_value_are_refused():
    with pytest.raises(ValueError, match="two classes"):
        classes_of({7})


def test_data_have_several_forms(photos):
    start = DataOptions(num_class=11, label_offset=0)
    folder = on_data(start, "photos:masks")
    assert (folder.format, folder.list_val, folder.num_class) == ("folder", "photos:masks", 11)
    assert on_data(start, "photos:notes.json").format == "coco"
    camvid = on_data(start, "camvid:here")
    assert (camvid.format, camvid.root_dataset, camvid.list_val) == ("camvid", "here", "val")
    assert on_data(start, "voc2012").root_dataset == "./data/VOC2012"
    with pytest.raises(ValueError, match="--data is 'photos'; give images_dir:masks_dir"):
        on_data(start, "photos")


def test_a_model_is_evaluated_on_other_data(photos, capsys):
    for file in Path("masks").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) // 255).save(file)
    words = ["--model", shipped.MODEL, "--data", "photos:masks", "--gpus", "cpu"]
    assert main(["eval", *words, *SMALL]) == 0
    output = capsys.readouterr().out
    assert f"# VAL of {shipped.MODEL} on photos:masks" in output and "format: folder" in output
    assert json.loads(Path("result_eval/eval.json").read_text())


def test_a_model_is_fine_tuned_on_two_folders(photos, capsys):
    words = ["--model", shipped.MODEL, "--data", "photos:masks", "--gpus", "cpu"]
    assert main(["train", *words, *SMALL, "TRAIN.num_epoch", "1", "TRAIN.workers", "0"]) == 0
    folder = CheckpointFolder(f"ckpt/{shipped.MODEL}-photos")
    assert folder.best_or_latest() == "best.pth"
    options = folder.options()
    assert (options.DATASET.num_class, options.MODEL.arch_encoder) == (2, "mobilenetv2dilated")
    output = capsys.readouterr().out
    assert options.DATASET.label_map == ((0, 0), (255, 1))
    assert Path(options.MODEL.weights_encoder).name == "encoder_best.pth"
    # What is printed is kept, and is the same configuration.
    assert load_options(folder.path / "recipe.yaml") == options
    assert recipe(options) in output
    again = training_options(shipped.MODEL, "photos:masks", [*SMALL, "DIR", "other"])
    assert again.DIR == "other" and Path("other/lists/validation.odgt").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --data photos:masks", "--data needs --model"),
        (f"train --model {shipped.MODEL}", "train --model needs --data"),
        ("eval --model nothing --data photos:masks", "nothing is neither a folder"),
        (f"train --model {shipped.MODEL} --data photos:none", "none"),
    ],
)
def test_mistakes_are_named(words, message, photos, capsys):
    assert main([*words.split(), "--gpus", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_torchrun_needs_a_recipe(photos, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--model", shipped.MODEL, "--data", "photos:masks"]) == 2
    assert "under torchrun give --cfg" in capsys.readouterr().err
