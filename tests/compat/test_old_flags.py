"""Flags of 2017 to 2019: the error says what each has become, and what to type."""

import re
import shlex
from pathlib import Path

import pytest

from mit_semseg.arguments import build_parser
from mit_semseg.cli import main, split_overrides
from mit_semseg.compat import flags, json_configs
from mit_semseg.compat.flags import replacement
from mit_semseg.config import load_config
from mit_semseg.config.options import SETTINGS

ADE20K = "data/ADEChallengeData2016"

# What was typed -> what is to be typed.
CASES = {
    "train --arch_encoder resnet18dilated --arch_decoder ppm_deepsup --fc_dim 512 --num_gpus 4": (
        "train --gpus 0-3 MODEL.arch_encoder resnet18dilated MODEL.arch_decoder ppm_deepsup "
        "MODEL.fc_dim 512"
    ),
    "train --num_gpus 1 --id mine": "train --gpus 0 DIR ckpt/mine",
    "train --id mine --ckpt ./runs --gpus 0-1": "train --gpus 0-1 DIR runs/mine",
    "train --ckpt /tmp/x": "train DIR /tmp/x/baseline",
    "train --list_train a.odgt --list_val b.odgt --root_dataset ./d/": (
        "train DATASET.list_train a.odgt DATASET.list_val b.odgt DATASET.root_dataset ./d/"
    ),
    "train --imgSize 300 375 450 --imgMaxSize 800 --padding_constant 32": (
        "train DATASET.imgSizes 300,375,450 DATASET.imgMaxSize 800 DATASET.padding_constant 32"
    ),
    "train --segm_downsampling_rate 4 --num_class 7 --segDepth 7": (
        "train DATASET.segm_downsampling_rate 4 DATASET.num_class 7"
    ),
    "train --batch_size_per_gpu 3 --num_epoch 5 --start_epoch 1 --epoch_iters 9 --optim SGD": (
        "train TRAIN.batch_size_per_gpu 3 TRAIN.num_epoch 5 TRAIN.start_epoch 0 "
        "TRAIN.epoch_iters 9 TRAIN.optim SGD"
    ),
    "train --start_epoch=4 --lr_encoder=2e-2 --lr_decoder 0.1 --lr_pow 0.9 --beta1 0.8": (
        "train TRAIN.start_epoch 3 TRAIN.lr_encoder 2e-2 TRAIN.lr_decoder 0.1 TRAIN.lr_pow 0.9 "
        "TRAIN.beta1 0.8"
    ),
    "train --weight_decay 1e-3 --deep_sup_scale 0.2 --workers 2 --seed 1 --disp_iter 5": (
        "train TRAIN.weight_decay 1e-3 TRAIN.deep_sup_scale 0.2 TRAIN.workers 2 TRAIN.seed 1 "
        "TRAIN.disp_iter 5"
    ),
    "train --fix_bn --flip 0 --eval_epoch 2": (
        "train TRAIN.fix_bn True DATASET.random_flip False TRAIN.eval_epochs 2"
    ),
    "train --fix_bn 0 --random_flip True": "train TRAIN.fix_bn False DATASET.random_flip True",
    "train --weights_encoder a.pth --weights_decoder b.pth": (
        "train MODEL.weights_encoder a.pth MODEL.weights_decoder b.pth"
    ),
    "train --segSize 384 --lr_step 20 --num_val 64 --vis ./vis --ckpt_epoch 5 --id x": (
        "train DIR ckpt/x"
    ),
    f"train --root_img ./{ADE20K}/images --root_seg ./{ADE20K}/annotations --list_train a.txt": (
        f"train DATASET.format ade20k DATASET.root_dataset {ADE20K}"
    ),
    f"train --root_img {ADE20K}/images": (
        f"train DATASET.format ade20k DATASET.root_dataset {ADE20K}"
    ),
    "eval --root_img d/photos --root_seg d/masks --list_val a.txt": (
        "eval DATASET.root_dataset d DATASET.list_train lists/training.odgt "
        "DATASET.list_val lists/validation.odgt"
    ),
    "eval --id a --suffix _epoch_20.pth --imgSize 450 --visualize --result ./r --gpu_id 2": (
        "eval --out ./r --gpus 2 VAL.checkpoint epoch_20.pth DATASET.imgSizes 450 "
        "VAL.visualize True DIR ckpt/a"
    ),
    "eval --devices gpu0-gpu1 --batch_size 1 --workers 3 --num_val 5": (
        "eval --workers 3 --gpus gpu0-gpu1 VAL.batch_size 1"
    ),
    "predict --test_img a.jpg --id b --suffix _best.pth --result .": (
        "predict --imgs a.jpg TEST.checkpoint best.pth TEST.result . DIR ckpt/b"
    ),
    "predict --test_imgs a.jpg b.jpg --model_path ckpt/m --gpu_id 1 --visualize 0": (
        "predict --imgs a.jpg b.jpg --gpu 1 DIR ckpt/m"
    ),
    "predict --test_imgs a.jpg --suffix _epoch_20.pth DIR ckpt/m TEST.result ./": (
        "predict --imgs a.jpg DIR ckpt/m TEST.result ./ TEST.checkpoint epoch_20.pth"
    ),
    "eval --logdir runs/a": "eval --cfg runs/a",
    "eval --logdir=runs/a -s": "eval --cfg runs/a VAL.visualize True",
    "train --apex --gpus 0": "train --gpus 0 --precision fp16",
    "train --apex False": "train --precision fp32",
    "train --model fcn32s --backbone vgg16 --dataset pascal_voc": (
        "train --cfg config/voc2012-vgg16-fcn32s.yaml"
    ),
    "eval --model psp --backbone resnet50 --dataset citys --workers 2": (
        "eval --workers 2 --cfg config/cityscapes-resnet50dilated-ppm_deepsup.yaml"
    ),
    "train --model danet --backbone resnet101 --dataset pascal_aug": (
        "train --cfg config/vocaug-resnet50dilated-ppm_deepsup.yaml "
        "MODEL.arch_encoder resnet101dilated MODEL.arch_decoder danet MODEL.fc_dim 2048 "
        "MODEL.weights_encoder '' MODEL.weights_decoder '' DIR ckpt/vocaug-resnet101dilated-danet"
    ),
    "train --cfg mine.yaml --id 'a b' TRAIN.num_epoch 3": (
        "train --cfg mine.yaml TRAIN.num_epoch 3 DIR 'ckpt/a b'"
    ),
}


def as_read(words):
    """The configuration that a command line asks for; an error when it cannot be read."""
    args, rest = build_parser().parse_known_args(words)
    if args.command == "predict":
        images, more = split_overrides([*args.imgs, *args.images, *rest])
    else:
        images, more = [], rest
    assert all("=" not in name for name in images)
    recipe = args.cfg if (args.cfg or "").startswith("config/") else None
    return load_config(recipe, [*more, *args.opts])


@pytest.mark.parametrize("typed", CASES)
def test_the_new_command_line_is_printed_and_can_be_parsed(typed):
    command, *words = shlex.split(typed)
    advice = replacement(command, words, f"mit-semseg {command}")
    printed = advice.partition("; run: ")[2].rpartition("&& ")[2]
    assert printed == f"mit-semseg {CASES[typed]}"
    as_read(shlex.split(printed)[1:])
    for word in words:
        name = word.partition("=")[0]
        if name in ("--model", "--backbone", "--dataset"):
            assert "--model, --backbone and --dataset by --cfg " in advice
        elif word.startswith("-") and word not in ("--gpus", "--cfg", "--workers"):
            assert f"{name} by " in advice


def test_lists_of_2017_are_made_first():
    advice = replacement("eval", ["--root_img", "d/photos", "--root_seg", "d/masks"], "x")
    made = advice.partition("; run: ")[2].partition(" && ")[0]
    assert made == "mit-semseg data make-odgt --images d/photos --labels d/masks --out lists"
    args = build_parser().parse_args(shlex.split(made)[1:])
    assert (args.images, args.labels, args.out) == ("d/photos", "d/masks", "lists")


def test_current_arguments_are_not_translated():
    today = (
        *("train --gpus 0-1 --cfg a.yaml TRAIN.workers 2", "eval --out x", "eval --workers 2"),
        *("predict --imgs a", "data check --id 3", "predict a --model b", "eval -s"),
    )
    for line in today:
        command, *words = line.split()
        assert replacement(command, words, "x") == ""


@pytest.mark.parametrize(
    ("script", "argv", "command"),
    [
        ("train.py", ["train"], "python train.py DIR ckpt/a"),
        ("eval.py", ["eval", "--single-process"], "python eval.py DIR ckpt/a"),
        ("/usr/bin/mit-semseg", ["train"], "mit-semseg train DIR ckpt/a"),
    ],
)
def test_the_command_prints_one_line(script, argv, command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--id", "a"])
    assert main([*argv, "--id", "a"]) == 2
    output = capsys.readouterr().err
    assert output == f"error: flags have been replaced: --id by DIR; run: {command}\n"


def test_the_page_names_every_flag_and_shows_what_is_said():
    page = (Path(__file__).resolve().parents[2] / "docs" / "published.md").read_text()
    known = {*flags._KEYS, *flags._OPTIONS, *flags._GONE, *flags._ZOO, "apex"}
    named = set(re.findall(r"`--?(\w+)`", page))
    assert known == named - {"gpus", "imgs", "out", "cfg", "precision"}
    example = re.search(r"^\$ (python train.py) (.*)\nerror: (.*)$", page, re.MULTILINE)
    assert example is not None
    program, words, expected = example.groups()
    assert replacement("train", words.split(), program) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_gpus", "needs a number, and was replaced: use --gpus with a number"),
        ("--num_gpus two", "needs a number"),
        ("--arch_encoder --gpus 0", "needs a value, and was replaced: use MODEL."),
    ],
)
def test_a_flag_without_its_value_is_named(words, message):
    output = replacement("train", words.split(), "python train.py")
    assert f"{words.split()[0]} {message}" in output


TEMPLATE = """{
  "name": "PSPNet", "n_gpu": 1, "use_synch_bn": true,
  "arch": {"type": "PSPNet", "args": {"backbone": "resnet50", "freeze_bn": false}},
  "train_loader": {"type": "VOC", "args": {"data_dir": "data", "batch_size": 8, "num_workers": 8}},
  "optimizer": {"type": "SGD", "differential_lr": true, "args": {"lr": 0.01, "momentum": 0.9}},
  "loss": "CrossEntropyLoss2d", "ignore_index": 255,
  "lr_scheduler": {"type": "Poly", "args": {}},
  "trainer": {"epochs": 80, "save_dir": "saved/", "monitor": "max Mean_IoU", "log_dir": "runs"}
}"""


@pytest.mark.parametrize("option", ["--config", "-c", "--cfg"])
def test_json_configurations_are_refused_with_our_keys(option, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(TEMPLATE)
    assert main(["train", option, str(file)]) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: {file} is a configuration of another toolkit; ")
    for part in (
        "DIR for name, trainer.save_dir",
        "DATASET.root_dataset for train_loader.args.data_dir",
        "TRAIN.batch_size_per_gpu for train_loader.args.batch_size",
        "TRAIN.lr_encoder and TRAIN.lr_decoder for optimizer.differential_lr, optimizer.args.lr",
        "TRAIN.num_epoch for trainer.epochs",
        "nothing for lr_scheduler.args, trainer.log_dir",
    ):
        assert part in output


def test_keys_for_json_configurations_exist():
    named = {
        key for text in json_configs._KEYS.values() for key in re.findall(r"[A-Z]+\.\w+", text)
    }
    assert named <= set(SETTINGS)


def test_a_json_configuration_that_cannot_be_read_is_named(tmp_path, capsys):
    assert main(["train", "--cfg", "none.json"]) == 2
    assert "none.json does not exist" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert main(["train", "--cfg", str(tmp_path / "bad.json")]) == 2
    assert "bad.json is neither YAML nor valid JSON" in capsys.readouterr().err
