"""Configurations: published files drop in, mistakes are named."""

import re
from pathlib import Path

import pytest

from mit_semseg.cli import main
from mit_semseg.config import (
    Options,
    TrainOptions,
    cfg,
    dump_config,
    get_defaults,
    load_config,
    load_options,
)
from mit_semseg.config.node import tree_of
from mit_semseg.config.options import SETTINGS
from mit_semseg.engine.launch import read_config
from mit_semseg.errors import REPORTS

PUBLISHED = """
DATASET:
  root_dataset: "./data/"
  list_train: "./data/training.odgt"
  list_val: "./data/validation.odgt"
  num_class: 150
  imgSizes: (300, 375, 450, 525, 600)
  imgMaxSize: 1000
  padding_constant: 8
  segm_downsampling_rate: 8
  random_flip: True
MODEL:
  arch_encoder: "resnet50dilated"
  arch_decoder: "ppm_deepsup"
  fc_dim: 2048
TRAIN:
  batch_size_per_gpu: 2
  optim: "SGD"
  lr_encoder: 0.02
  beta1: 0.9
  weight_decay: 1e-4
  fix_bn: False
  workers: 16
  seed: 304
VAL:
  visualize: False
  checkpoint: "epoch_20.pth"
TEST:
  checkpoint: "epoch_20.pth"
  result: "./"
DIR: "ckpt/ade20k-resnet50dilated-ppm_deepsup"
"""


def test_published_files(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(PUBLISHED)
    tree = load_config(file)
    assert tree.DATASET.imgSizes == [300, 375, 450, 525, 600]
    assert tree.TRAIN.weight_decay == 1e-4
    assert tree.DIR == "ckpt/ade20k-resnet50dilated-ppm_deepsup"
    # Keys that the published script writes into its own.
    file.write_text("TRAIN:\n  max_iters: 100000\n  running_lr_encoder: 0.02\n  num_epoch: 3\n")
    assert load_config(file).TRAIN.num_epoch == 3
    mine = cfg.clone()
    mine.merge_from_file(str(file))
    mine.merge_from_list(["TRAIN.lr_encoder", "0.5"])
    assert (mine.TRAIN.num_epoch, mine.TRAIN.lr_encoder) == (3, 0.5)
    assert cfg.TRAIN.num_epoch == 20


def test_round_trip(tmp_path):
    tree = load_config(
        None, ["DATASET.crop_size", "(32, 48)", "TRAIN.epoch_iters", "auto", "DIR", "x"]
    )
    dump_config(tree, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == tree


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.lr_encodr", "1"], "unknown key TRAIN.lr_encodr; did you mean 'TRAIN.lr_encoder'"),
        (["TRAIN.optim", "adam"], "TRAIN.optim is 'adam'; did you mean 'Adam'"),
        (["TRAIN.num_epoch", "many"], "TRAIN.num_epoch is 'many'; give an integer"),
        (["TRAIN.num_epoch", "0"], "must be at least 1"),
        (["TRAIN.epoch_iters", "automatic"], "give a number of steps or auto"),
        (["DATASET.random_flip", "3"], "True or False"),
        (["DATASET.imgSizes", "(-1,)"], "short sides in pixels"),
        (["DATASET.crop_size", "(1, 2, 3)"], "height, width"),
        (["DATASET.ignore_label", "void"], "DATASET.ignore_label"),
        (["DATASET.mean", "(a, b, c)"], "DATASET.mean"),
        (["TEST.save", "[colour]"], "give any of color"),
        (["TRAIN", "1"], "is a section"),
        (["DIR"], "has no value"),
        (["TRAIN.workers", "-1"], "must not be negative"),
        (["TRAIN.beta1", "1"], "TRAIN.beta1 is 1; give a number in [0, 1)"),
        (["TRAIN.ema", "1.0"], "a decay in [0, 1)"),
        (["TRAIN.activation_checkpointing", "3"], "checkpointing is 3; give True or False"),
        (["TRAIN.compile", "max"], "TRAIN.compile is 'max'; give True or False"),
        (["VAL.compile", "1"], "True or False"),
        (["TEST.compile", "none"], "True or False"),
        (["TRAIN.num_epoch", "2", "--gpus", "cpu"], "put options before them"),
    ],
)
def test_mistakes_are_named(opts, message):
    with pytest.raises(ValueError) as error:
        load_config(None, opts)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("typed", ["[color, index]", "color,index", "('color', 'index')"])
def test_lists_as_typed_in_a_shell(typed):
    assert load_config(None, ["TEST.save", typed]).TEST.save == ["color", "index"]


@pytest.mark.parametrize("text", ["None", "2024_10", "1e-4", "ckpt/mine"])
def test_texts_stay_as_they_are_typed(text):
    for typed in (text, f"'{text}'"):
        assert load_config(None, ["MODEL.weights_encoder", typed]).MODEL.weights_encoder == text


def test_file_mistakes_name_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("TRAIN:\n  lr_encodr: 1\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: unknown key TRAIN\.lr_encodr"):
        load_config(tmp_path / "mine.yaml")
    (tmp_path / "empty.yaml").write_text("VAL:\n  # flip: True\nTRAIN:\n  num_epoch: 3\n")
    assert load_config(tmp_path / "empty.yaml").TRAIN.num_epoch == 3
    (tmp_path / "broken.yaml").write_text("TRAIN: [")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(FileNotFoundError, match="did you mean .*/mine.yaml"):
        load_config(tmp_path / "mime.yaml")


def test_a_missing_configuration_file_is_refused_with_those_there_are(tmp_path, monkeypatch):
    def output(path):
        with pytest.raises(FileNotFoundError) as error:
            load_config(path)
        return str(error.value)

    monkeypatch.chdir(tmp_path)
    nowhere = "configuration file none.yaml does not exist; recipes have names such as config/"
    assert output("none.yaml").startswith(nowhere)
    Path("config").mkdir()
    for name in ("sbu-unet", *(f"camvid-{k}" for k in range(8))):
        Path(f"config/{name}.yaml").write_text("")
    assert output("config/nonexist.yaml") == (
        "configuration file config/nonexist.yaml does not exist; config has 9 configuration "
        "files, such as camvid-0.yaml"
    )
    for near in ("sbu-unnet.yaml", "config/sbu-unnet.yaml", "config/sbu-unnet"):
        assert output(near).endswith("does not exist; did you mean config/sbu-unet.yaml?")
    Path("ckpt").mkdir()
    assert output("ckpt").startswith("ckpt is a folder, not a configuration file; recipes have")


def test_a_mapping_in_place_of_a_list_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("DATASET:\n  label_map: {0: 0, 255: 1}\n")
    with pytest.raises(ValueError, match=r"DATASET.label_map is \{0: 0, 255: 1\}; give a list"):
        load_config(tmp_path / "mine.yaml")


def test_pairs_are_checked_when_the_file_is_read():
    with pytest.raises(ValueError, match="set MODEL.fc_dim 512"):
        read_config(None, ["MODEL.arch_encoder", "resnet18dilated"])
    with pytest.raises(ValueError, match="hrnetv2"):
        opts = ["MODEL.arch_encoder", "hrnetv2", "MODEL.fc_dim", "720"]
        read_config(None, [*opts, "MODEL.arch_decoder", "upernet"])


def test_each_auxiliary_head_has_a_weight(caplog):
    icnet = ["MODEL.arch_encoder", "icnet_resnet50", "MODEL.arch_decoder", "icnet"]
    cfg = read_config(None, [*icnet, "TRAIN.aux_weights", "(0.4, 0.2)"])
    assert cfg.TRAIN.aux_weights == [0.4, 0.2]
    assert not caplog.text
    read_config(None, [*icnet, "TRAIN.aux_weights", "(0.4, 0.2)", "TRAIN.deep_sup_scale", "0.9"])
    assert "TRAIN.deep_sup_scale has no effect with TRAIN.aux_weights" in caplog.text
    for decoder, count in (("ppm_deepsup", 1), ("ppm", 0)):
        with pytest.raises(ValueError, match=rf"auxiliary heads of decoder {decoder}: {count};"):
            read_config(None, ["MODEL.arch_decoder", decoder, "TRAIN.aux_weights", "(0.4, 0.2)"])
    for wrong in ("(0.4, -1)", "(1e999, 0.1)", "('a', 0.1)"):
        with pytest.raises(ValueError, match="give a weight of 0 or more per"):
            read_config(None, [*icnet, "TRAIN.aux_weights", wrong])


def test_earlier_names_of_keys_are_understood(tmp_path, caplog):
    file = tmp_path / "dump.yaml"
    file.write_text(
        "TRAIN:\n  timeout: 77\n  keep_checkpoints: 3\n  recompute: true\n"
        "VAL:\n  stride: 0.667\nDATASET:\n  random_scale: [1, 2]\n"
    )
    cfg = load_config(file, ["TEST.stride", "0.75"])
    assert (cfg.TRAIN.stall_seconds, cfg.TRAIN.keep) == (77, 3)
    assert cfg.TRAIN.activation_checkpointing and cfg.DATASET.scale_jitter == [1.0, 2.0]
    assert (cfg.VAL.overlap, cfg.TEST.overlap) == (0.333, 0.25)
    in_file, in_line = (record.getMessage() for record in caplog.records)
    assert in_file.startswith(f"{file}: renamed keys: TRAIN.timeout is now TRAIN.stall_")
    assert "TRAIN.recompute is now TRAIN.activation_checkpointing" in in_file
    assert "VAL.stride 0.667 is now VAL.overlap 0.333" in in_file
    assert in_line.endswith("TEST.stride 0.75 is now TEST.overlap 0.25")
    for wrong, advice in (("0", "a fraction of"), ("1.5", "a fraction of"), ("wide", "a number")):
        with pytest.raises(ValueError, match=rf"VAL\.stride .*now VAL\.overlap.* {advice}"):
            load_config(None, ["VAL.stride", wrong])


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        ({}, True),  # one process, or the command that starts ranks
        ({"RANK": "0"}, True),  # torchrun
        ({"RANK": "1"}, False),
        ({"RANK": "0", REPORTS: "folder"}, False),  # a rank started by a command
        ({"RANK": "1", REPORTS: "folder"}, False),
    ],
)
def test_renamed_keys_are_reported_by_one_process(monkeypatch, caplog, environment, warns):
    for name in ("RANK", REPORTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    load_config(None, ["TEST.stride", "0.75"])
    assert len(caplog.records) == warns


def test_an_earlier_name_that_is_set_in_a_tree_counts():
    tree = get_defaults()
    tree.VAL.stride = 0.5
    tree.TRAIN.max_iters = 100  # as the published training script does
    assert Options.read(tree).VAL.overlap == 0.5


def test_options_are_typed_and_checked():
    options = load_options(None, ["DATASET.imgSizes", "450", "TRAIN.epoch_iters", "auto"])
    assert options.DATASET.imgSizes == (450,) and options.TRAIN.epoch_iters == "auto"
    assert Options.read(tree_of(options)) == options == Options.read(options)
    assert Options.read(get_defaults()) == Options() == Options.read({})
    with pytest.raises(ValueError, match="TRAIN.lr_encoder is -1; it must not be negative"):
        TrainOptions(lr_encoder=-1)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.in_channels", "4"], "set MODEL.in_channels 3, or DATASET.depth True"),
        (["DATASET.mean", "(1, 2)"], r"mean is \[1.0, 2.0\]; give three numbers"),
        (["DATASET.bands", "red,4"], "in_channels is 3 and DATASET.bands red, 4: .*_channels 2"),
        (
            ["DATASET.bands", "red,4", "DATASET.mean", "(1, 2, 3)"],
            "give a number for each of the bands red, 4",
        ),
        (["DATASET.bands", "1,2,3", "DATASET.color_jitter", "0.1"], "color_jitter is 0.1, which"),
        (["DATASET.bands", "1,2,3", "DATASET.depth", "True"], "DATASET.depth is True, which"),
        (
            ["TRAIN.class_weights", "(1, 2)"],
            "class_weights has 2 numbers, but DATASET.num_class is 150",
        ),
        (["TRAIN.class_weights", "(0, 0)", "DATASET.num_class", "2"], "are all 0"),
        (["TRAIN.start_epoch", "21"], "is greater than TRAIN.num_epoch 20"),
        (["DATASET.batching", "crop"], "set DATASET.crop_size"),
    ],
)
def test_values_that_contradict_each_other_are_refused(opts, message):
    with pytest.raises(ValueError, match=message):
        load_options(None, opts)


def test_the_command_says_where_values_come_from(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("VAL:\n  tile: off\n  flip: true\n")
    words = ["config", "--cfg", str(file), "--only", "val.", "VAL.flip", "False"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert f"VAL.tile = off  ({file}; default auto)\n    side in pixels" in output
    assert "VAL.flip = False  (command line; default False)\n" in output
    assert "VAL.batch_size = 1  (default)\n" in output and "TRAIN" not in output.splitlines()[0]
    words = ["config", "--only", "dataset.std", "MODEL.arch_encoder", "timm:vit_tiny_patch16_224"]
    pytest.importorskip("timm")
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "[0.5, 0.5, 0.5]  (from MODEL.arch_encoder; default [0.229, 0.224, 0.225])" in output
    assert main(["config", "--only", "nothing"]) == 2
    assert main(["config"]) == 0
    assert len(re.findall(r"^[A-Z]+(?:\.\w+)? = ", capsys.readouterr().out, re.M)) == len(SETTINGS)
