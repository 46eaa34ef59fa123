"""A configuration that is read is checked against its models and data."""

from pathlib import Path

import pytest

from mit_semseg.config import load_options
from mit_semseg.engine.launch import read_config, without_effect

CROPS = ["DATASET.batching", "crop", "DATASET.crop_size", "(64, 64)"]


def test_a_pair_that_cannot_work_is_refused_when_it_is_read(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("MODEL:\n  arch_encoder: hrnetv2\n  arch_decoder: upernet\n  fc_dim: 720\n")
    with pytest.raises(ValueError, match=r"upernet needs at least \d feature maps.*hrnetv2"):
        read_config(file)
    with pytest.raises(ValueError, match=r"resnet18 emits 512 channels; MODEL.fc_dim is 2048"):
        read_config(None, ["MODEL.arch_encoder", "resnet18", "MODEL.fc_dim", "2048"])
    assert read_config(file, ["MODEL.arch_decoder", "c1"]).MODEL.arch_decoder == "c1"
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist.*mine\.yaml"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("section", ["VAL", "TEST"])
def test_windows_that_cannot_work_are_refused_when_they_are_read(section):
    key = f"{section}.window"
    with pytest.raises(ValueError, match=rf"{key} is \[100, 96\], .* {key} \[104, 96\]"):
        read_config(None, [key, "(100, 96)"])  # resnet50dilated: stride 8
    assert read_config(None, [key, "(104, 96)"])[section].window == [104, 96]
    whole = ["MODEL.arch_encoder", "resnet18", "MODEL.fc_dim", "512", "MODEL.arch_decoder", "c1"]
    with pytest.raises(ValueError, match=r"multiples of its stride 32.* \[128, 96\]"):
        read_config(None, [*whole, key, "(104, 96)"])


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("TRAIN.label_smoothing", "0.2", ["TRAIN.loss", "smooth+dice"]),
        ("TRAIN.gamma", "0.5", ["TRAIN.schedule", "multi_step", "TRAIN.milestones", "3"]),
        ("VAL.overlap", "0.5", ["VAL.window", "(96, 96)"]),
        ("TEST.overlap", "0.5", ["TEST.window", "(96, 96)"]),
        ("DATASET.depth_scale", "500", ["DATASET.depth", "True", "MODEL.in_channels", "4"]),
        ("DATASET.depth_mean", "2", ["DATASET.depth", "True", "MODEL.in_channels", "4"]),
        ("DATASET.depth_std", "2", ["DATASET.depth", "True", "MODEL.in_channels", "4"]),
        ("DATASET.label_map", "[[7, 0]]", ["DATASET.format", "folder"]),
        ("DATASET.random_blur", "0.1", CROPS),
    ],
)
def test_settings_without_effect_are_pointed_out(key, value, needs, caplog, monkeypatch):
    read_config(None, [key, value, *needs])
    read_config(None, needs)
    assert not caplog.text
    without = ["DATASET.format", "camvid"] if "DATASET.format" in needs else []
    read_config(None, [key, value, *without])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{key} has no effect without ")
    monkeypatch.setenv("RANK", "1")
    read_config(None, [key, value, *without])
    assert len(caplog.records) == 1  # one rank says it


def test_recipes_have_no_settings_without_effect():
    for path in sorted((Path(__file__).parents[2] / "config").glob("*.yaml")):
        assert without_effect(load_options(path)) == [], path.name
