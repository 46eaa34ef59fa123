"""overfit, profile, sweep and compare on small models and rendered scenes."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from every_model import every_model
from PIL import Image
from torch import nn

from mit_semseg.cli import main
from mit_semseg.config import Options, dump_config, load_config
from mit_semseg.demo import streets
from mit_semseg.engine.evaluate import evaluate, val_dataset
from mit_semseg.engine.scoring import SavedPredictions
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder
from mit_semseg.models.papers import PAPER_MODELS
from mit_semseg.tools import compare, overfit, profile, sweep

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return streets.write(tmp_path_factory.mktemp("scenes"), 8, 2, size=(64, 96))


@pytest.fixture(scope="module")
def recipe(scenes):
    def write(file, decoder="c1", **settings):
        opts = [
            *("DATASET.root_dataset", str(scenes), "DATASET.num_class", 10),
            *("DATASET.list_train", str(scenes / "training.odgt")),
            *("DATASET.list_val", str(scenes / "validation.odgt")),
            *("DATASET.classes", str(scenes / "classes.csv"), "DATASET.imgSizes", [64]),
            *("MODEL.arch_encoder", "mobilenetv2dilated", "MODEL.arch_decoder", decoder),
            *("MODEL.fc_dim", 320, "MODEL.weights_encoder", "none", "TRAIN.workers", 0),
            *("TRAIN.num_epoch", 2, "TRAIN.epoch_iters", 3, "TRAIN.disp_iter", 1),
        ]
        for key, value in settings.items():
            opts += [key.replace("__", "."), value]
        dump_config(load_config(None, opts), file)
        return file

    return write


# ------------------------------------------------------------------------------ overfit
def test_overfitting_one_image_is_judged(tmp_path, recipe, monkeypatch, capsys):
    monkeypatch.setattr(overfit, "MIN_LOGITS", 4)
    file, out = recipe(tmp_path / "small.yaml", TRAIN__precision="fp32"), tmp_path / "out"
    words = ["overfit", "--gpus", "cpu", "--side", "32", "--out", str(out), "--cfg", str(file)]
    assert main(words) == 0
    (found,) = json.loads((out / "overfit.json").read_text())
    assert found["name"] == "small" and found["accuracy"] >= 0.98 and found["steps"] <= 400
    output = capsys.readouterr().out
    assert output.startswith("small: ") and f"Results in {out}" in output
    assert "below" not in output and "| small | " in (out / "overfit.md").read_text()
    assert (out / "overfit.png").stat().st_size > 1000
    assert main([*words, "--steps", "1"]) == 1
    assert "%, below 98 %, after 1 step with learning rate 0.001, loss " in capsys.readouterr().out
    found = overfit.overfit(load_config(file), CPU, steps=1, side=64, progress=False)
    truth, prediction = found.sample.truth, found.sample.prediction
    assert found.accuracy < 0.98 and found.steps == 1
    assert found.accuracy == pytest.approx((truth == prediction)[truth >= 0].mean())
    assert found.sample.image.shape == (*truth.shape, 3)
    with pytest.raises(ValueError, match="--steps 0: give at least 1"):
        overfit.overfit(load_config(file), CPU, steps=0)


def test_overfitting_prepares_batchnorm_and_dropout():
    layers = [nn.BatchNorm2d(1, momentum=m) for m in (0.01, 0.3, None)]
    net = nn.Sequential(*layers, nn.Dropout(0.5), nn.Dropout2d(0.1))
    overfit.prepared(net)
    assert [layer.momentum for layer in layers] == [0.1, 0.3, None]
    assert net[3].p == net[4].p == 0


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_picture_of_a_recipe_with_depth_is_its_image(tmp_path, recipe, scenes, order):
    record = json.loads((scenes / "training.odgt").read_text().splitlines()[0])
    image = cv2.imread(str(scenes / record["fpath_img"]))[..., ::-1]
    cv2.imwrite(str(tmp_path / "depth.png"), np.full(image.shape[:2], 3000, np.uint16))
    record["fpath_depth"] = str(tmp_path / "depth.png")
    (tmp_path / "list.odgt").write_text(json.dumps(record))
    settings = {"DATASET__list_train": str(tmp_path / "list.odgt"), "DATASET__depth": True}
    settings |= {"DATASET__color_order": order, "DATASET__mean": (0.4, 0.5, 0.6)}
    cfg = load_config(recipe(tmp_path / "deep.yaml", MODEL__in_channels=4, **settings))
    options = Options.read(cfg)
    batch = overfit.one_image(options, 64, 8)
    assert batch["img_data"].shape == (1, 4, 64, 96) and batch["img_data"].is_floating_point()
    shown = overfit.one_image(options, 64, 8, depth=False)["img_data"]
    assert np.array_equal(shown[0].permute(1, 2, 0).numpy(), image)


def test_every_registered_model_is_overfitted():
    pairs = every_model()
    for registry, names in zip((ENCODERS, DECODERS), zip(*pairs)):
        assert set(map(registry.get, names)) == set(map(registry.get, registry.names()))
    assert len(set(pairs)) == len(pairs)
    assert {(model.encoder, model.decoder) for model in PAPER_MODELS} <= set(pairs)


def test_the_image_is_overfitted_without_augmentation(recipe, tmp_path):
    mixed = {"DATASET__cutmix": 1.0, "DATASET__classmix": 1.0, "DATASET__color_jitter": 0.5}
    settings = {**mixed, "DATASET__transform": "no_such_module:function"}
    plain, augmented = (
        overfit.one_image(Options.read(load_config(recipe(tmp_path / "one.yaml", **more))), 64, 8)
        for more in ({}, settings)
    )
    assert all(torch.equal(augmented[key], plain[key]) for key in ("img_data", "seg_label"))


def test_settings_of_crops_are_left_out_without_a_warning(recipe, tmp_path, caplog):
    cfg = load_config(recipe(tmp_path / "crops.yaml"))
    opts = ["DATASET.batching", "crop", "DATASET.crop_size", "(64, 64)", "DATASET.random_blur", "0"]
    opts += ["DATASET.random_rotation", "0", "DATASET.scale_jitter", "(1.0, 1.0)"]
    cfg.merge_from_list(opts)
    overfit.one_image(Options.read(cfg), 64, 8)
    assert caplog.text == ""


# ------------------------------------------------------------------------------ profile
def test_operations_are_those_of_the_layers():
    """Against a count by hand of one convolution, and torchvision's of ResNet."""
    conv, image = nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 16, 20)
    conv.logits = conv.forward
    assert profile.operations(conv, image) == 2 * 3 * 8 * 9 * 16 * 20
    # Its figure is in multiplications with additions, and has the classifier of 1000 classes.
    theirs = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"] * 1e9 - 2048 * 1000
    with torch.device("meta"):
        backbone = ModelBuilder.build_encoder("torchvision_resnet50", weights="none")
        backbone.logits, image = backbone.forward, torch.zeros(1, 3, 224, 224)
    assert profile.operations(backbone, image) == pytest.approx(2 * theirs, rel=1e-3)


def test_activations_are_what_backward_needs(recipe, tmp_path):
    cfg = load_config(recipe(tmp_path / "small.yaml"))
    module = ModelBuilder.from_config(cfg)
    small, large = (
        profile.activations(module, torch.zeros(1, 3, 64, width), cfg) for width in (64, 128)
    )
    assert 1.9 < large / small < 2.1
    # The input of every BatchNorm and the output of every convolution, at least.
    assert small > 4 * 32 * 32 * 32


def test_activations_are_counted_without_computing_them(recipe, tmp_path):
    """On torch's meta device, against the tensors of a training step on the CPU."""
    cfg = load_config(recipe(tmp_path / "small.yaml", "c1_deepsup"))
    counted = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            module = ModelBuilder.from_config(cfg).to(device)
        image = torch.zeros(1, 3, 64, 96, device=device)
        counted.append((profile.operations(module, image), profile.activations(module, image, cfg)))
    assert counted[0] == counted[1]


def test_models_of_papers_are_profiled_by_one_word(capsys, monkeypatch):
    monkeypatch.setattr(profile, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(profile, "PAPER_MODELS", [m for m in PAPER_MODELS if m.name == "ENet"])
    monkeypatch.setattr(profile, "LIBRARY_MODELS", ())
    assert main(["profile", "papers", "--gpus", "cpu", "--size", "64", "96"]) == 0
    printed = capsys.readouterr().out
    assert "| enet + enet " in printed and "images/s of CPU time" in printed


def test_the_table_holds_every_recipe(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "MIN_SECONDS", 0.0)
    files = [recipe(tmp_path / f"{name}.yaml", name) for name in ("c1", "ppm")]
    words = ["profile", *map(str, files), "--gpus", "cpu", "--size", "64", "96"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "One image of 96x64" in printed and "| c1 " in printed and "| ppm " in printed
    found = json.loads((tmp_path / "out" / "profile.json").read_text())["recipes"]
    parameters = sum(
        p.numel() for p in torchvision.models.mobilenet_v2().features[:-1].parameters()
    )
    decoder = sum(p.numel() for p in DECODERS.get("c1")((320,), num_class=10).parameters())
    assert found[0]["parameters"] == pytest.approx((parameters + decoder) / 1e6)
    assert found[1]["gflops"] > found[0]["gflops"] and found[0]["images_per_second"] > 0


def test_an_image_too_small_for_the_network_is_one_line():
    message = r"^--size 2 1 does not work with small \(.+\); give a larger size"
    with pytest.raises(ValueError, match=message) as caught, profile._reach("small", (2, 1)):
        nn.MaxPool2d(2)(torch.zeros(1, 3, 2, 1))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_measured_does_not_stop_the_others(
    recipe, tmp_path, capsys, monkeypatch
):
    def activations(module, image, cfg):
        if cfg.MODEL.arch_decoder == "ppm":
            raise error
        return 7 << 20

    monkeypatch.setattr(profile, "activations", activations)
    monkeypatch.setattr(profile, "MIN_SECONDS", 0.0)
    files = [str(recipe(tmp_path / f"{name}.yaml", name)) for name in ("ppm", "c1")]
    words = ["--gpus", "cpu", "--size", "64", "64"]
    error = torch.cuda.OutOfMemoryError("no memory\nfor this")
    assert main(["profile", *files, *words]) == 1
    assert "error: ppm is skipped: no memory for this\n" in capsys.readouterr().err
    error = ValueError("too small")
    assert main(["profile", *files, *words]) == 1
    output = capsys.readouterr()
    assert "error: ppm is skipped: --size 64 64 does not work with ppm (too small)" in output.err
    assert "| c1 " in output.out and "| ppm " not in output.out
    assert main(["profile", files[0], *words]) == 2  # alone


def test_auxiliary_heads_are_counted(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "MIN_SECONDS", 0.0)
    plain, deep = (
        profile.profile(load_config(recipe(tmp_path / f"{name}.yaml", name)), CPU, (64, 64))
        for name in ("c1", "c1_deepsup")
    )
    # The auxiliary head of c1_deepsup: a 3x3 convolution of 160 -> 80, BatchNorm, scores of 10.
    head = 160 * 80 * 9 + 2 * 80 + 80 * 10 + 10
    assert 1e6 * (deep.parameters - plain.parameters) == pytest.approx(head)
    assert deep.gflops == plain.gflops


# ------------------------------------------------------------------------------ sweep
def test_a_queue_is_run_and_not_run_again(recipe, tmp_path, capsys):
    good, out = recipe(tmp_path / "good.yaml"), tmp_path / "out"
    assert main(["sweep", str(good), "--gpus", "cpu", "--out", str(out)]) == 0
    (found,) = json.loads((out / "sweep.json").read_text())["evaluations"]
    result = json.loads((out / "good/evaluation/eval.json").read_text())
    assert found["name"] == "good" and found["mean_iou"] == result["mean_iou"]
    assert found["steps"] == 6 and found["train_minutes"] > 0
    assert "| good | mobilenetv2dilated + c1 | " in (out / "sweep.md").read_text()
    assert (out / "sweep.png").is_file()
    with Image.open(out / "sweep_pictures.png") as sheet:  # 2 images: as they are, as
        assert sheet.height > 3 * sheet.width / 2 * 64 / 96  # they should be, and seen
    before = (out / "good/metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["sweep", str(good), "--gpus", "cpu", "--out", str(out)]) == 0
    assert (out / "good/metrics.jsonl").stat().st_mtime_ns == before
    assert "1/1 good: mean IoU " in capsys.readouterr().out
    compared = ["--out", str(tmp_path / "compared")]
    assert main(["compare", str(out / "good/evaluation"), *compared]) == 0
    assert main(["compare", str(out), *compared]) == 2
    output = capsys.readouterr()
    assert "| good | mobilenetv2dilated + c1 | " in output.out
    assert f"{out}/eval.json is missing; run mit-semseg eval" in output.err
    assert (tmp_path / "compared/compare_pictures.png").is_file()


# Stands for Python: a training of 16 steps leaves its figures, an evaluation what the test says.
COMMAND = """#!/bin/sh
command=$3; folder=$(echo "$*" | sed 's/.*--cfg \\([^ ]*\\)\\.yaml.*/\\1/')
mkdir -p $folder/evaluation; echo "$*" >> $folder.said
if [ $command = train ]; then
  case $folder in */broken) echo 'error: nowhere.odgt does not exist'; exit 2;; esac
  for step in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
    echo '{"kind": "train", "epoch": 2, "step": '$step', "seconds": '$step'}'
  done >> $folder/metrics.jsonl; exit
fi
"""
FIGURES = '{"mean_iou": 0.5, "pixel_accuracy": 0.75, "images": 2, "seconds": 1.0, "failed": []}'
SCORED = f"echo '{FIGURES}' > $folder/evaluation/eval.json\n"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    program = tmp_path / "python"

    def say(evaluation):
        program.write_text(COMMAND + evaluation)
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return say


def test_minutes_determine_the_number_of_steps(recipe, tmp_path, commands):
    commands(SCORED)
    file, out = recipe(tmp_path / "timed.yaml"), tmp_path / "out"
    for _ in range(2):
        assert sweep.run([file], out, minutes=2) == {}
        # 120 seconds, one a step, in two epochs.
        assert load_config(out / "timed.yaml").TRAIN.epoch_iters == 60
    assert (out / "timed.pace.said").read_text().count("train") == 1
    assert "train" in (out / "timed.said").read_text()


def test_keys_are_varied_in_every_combination(recipe, tmp_path, commands):
    commands(SCORED)
    file, out = str(recipe(tmp_path / "one.yaml")), tmp_path / "out"
    vary = ["--vary", "TRAIN.lr_encoder=0.1,0.2", "--vary", "DATASET.imgSizes=(32,64),[48]"]
    assert main(["sweep", file, "--out", str(out), *vary, "TRAIN.seed", "7"]) == 0
    found = {x.stem: load_config(x) for x in out.glob("*.yaml")}
    assert len(found) == len(json.loads((out / "sweep.json").read_text())["evaluations"]) == 4
    cfg = found["one,lr_encoder=0.2,imgSizes=(32,64)"]
    assert (cfg.TRAIN.lr_encoder, cfg.TRAIN.seed) == (0.2, 7)
    assert list(cfg.DATASET.imgSizes) == [32, 64]


def test_mistakes_are_found_before_anything_is_run(recipe, tmp_path):
    good = recipe(tmp_path / "good.yaml")
    (tmp_path / "other").mkdir()
    same = recipe(tmp_path / "other" / "good.yaml")
    for recipes, settings, message in (
        ([good, same], {}, "two recipes are called good"),
        ([good, tmp_path / "missing.yaml"], {}, r"missing\.yaml"),
        ([good], {"minutes": -1}, "--minutes -1: give 0 or more"),
        ([good], {"vary": ["TRAIN.seed"]}, "--vary TRAIN.seed: give KEY=value,value"),
        ([good], {"vary": ["TRAIN.sed=1"]}, "TRAIN.seed"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            sweep.run(recipes, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_recipes_that_fail_are_told_and_the_others_run(recipe, tmp_path, commands, capsys):
    names = ("broken", "odd", "silent", "partly", "good")
    files, out = [str(recipe(tmp_path / f"{name}.yaml")) for name in names], tmp_path / "out"
    strange = "case $folder in */odd) echo '{}' > $folder/evaluation/eval.json; exit;; esac\n"
    broken = "case $folder in */silent) echo 'Traceback'; echo 'KeyError: 1'; exit 1;; esac\n"
    some = "case $folder in */partly) " + SCORED.strip() + "; exit 1;; esac\n"
    commands(strange + broken + some + SCORED)
    assert main(["sweep", *files, "--gpus", "cpu", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "broken: failed: train ended with 2: error: nowhere.odgt does not exist" in printed
    written = json.loads((out / "sweep.json").read_text())
    failed = written["failed"]
    assert list(failed) == ["broken", "odd", "silent"]
    assert "odd/evaluation/eval.json is not an evaluation: KeyError: 'mean_iou'" in failed["odd"]
    assert failed["silent"].startswith("eval ended with 1: KeyError: 1 (")
    assert [x["name"] for x in written["evaluations"]] == ["partly", "good"]
    assert "| broken | failed: " in (out / "sweep.md").read_text()


def test_an_edited_recipe_is_trained_again(recipe, tmp_path, commands):
    file, out = recipe(tmp_path / "one.yaml"), tmp_path / "out"

    def trained():
        output = (out / "one.said").read_text().splitlines()
        return ["--resume auto" in line for line in output if " train " in line]

    commands("exit 1")
    assert list(sweep.run([file], out)) == ["one"] and trained() == [False]
    commands(SCORED)
    for _ in range(2):  # the second time nothing is left to do
        assert not sweep.run([file], out)
        assert trained() == [False, True]
    recipe(file, TRAIN__lr_encoder=0.5)
    commands("exit 1")  # beside the figures of before
    assert list(sweep.run([file], out)) == ["one"] and trained() == [False, True, False]


def test_a_signal_is_passed_on_and_ends_the_queue(recipe, tmp_path, commands):
    files, out = [recipe(tmp_path / f"{x}.yaml") for x in "ab"], tmp_path / "out"
    commands("trap 'echo told; exit 0' TERM; echo ready; sleep 60 & wait")

    def stop():
        while "ready" not in (out / "a.log").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    out.mkdir()
    (out / "a.log").touch()
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(files, out)
    assert "told" in (out / "a.log").read_text() and not (out / "b.said").exists()
    assert signal.getsignal(signal.SIGTERM) == before


# ------------------------------------------------------------------------------ compare
def test_pictures_are_of_one_data_set(recipe, scenes, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = streets.write(tmp_path / "other", 1, 2, size=(64, 80))
    lists = {"DATASET__list_val": "validation.odgt"}  # of one name in either folder
    places = []
    for name, mean_iou, settings in (
        ("plain", 0.4, lists),
        ("best", 0.5, lists),
        ("other", 0.3, {**lists, "DATASET__root_dataset": str(other)}),
        ("absent", None, lists),
    ):
        folder = tmp_path / name / "result_eval"
        folder.mkdir(parents=True)
        recipe(folder.parent / "config.yaml", **settings)
        figures = {"mean_iou": mean_iou, "pixel_accuracy": 0.5, "images": 2, "seconds": 4}
        (folder / "eval.json").write_text(json.dumps(figures))
        if name != "absent":
            (folder / "labels").mkdir()
            for number in range(2):
                np.save(folder / f"labels/{number}.npy", np.zeros((64, 96), np.int16))
        places.append(folder)
    rows = []
    monkeypatch.setattr(
        compare, "image_grid", lambda tiles, *a, **k: rows.extend(name for name, _ in tiles)
    )
    found = compare.compare([*places[:3], places[3] / "eval.json"], tmp_path / "out")
    assert [x.name for x in found] == ["best", "plain", "other", "absent"]
    table = (tmp_path / "out/compare.md").read_text().splitlines()
    assert (
        table[2]
        == "| best | mobilenetv2dilated + c1 | 50.00 % | 50.00 % | 0.50 | 2.04 | 17.2 |  |  |"
    )
    shown = ["image", "ground truth", "best, mean IoU 50.00 %", "plain, mean IoU 40.00 %"]
    assert rows == [x for row in shown for x in (row, "")]
    (scenes / "validation.odgt").rename(scenes / "moved.odgt")
    try:
        compare.compare(places[:1], tmp_path / "out")
    finally:
        (scenes / "moved.odgt").rename(scenes / "validation.odgt")
    assert "compare_pictures.png is not drawn: FileNotFoundError: " in caplog.text


def test_saved_predictions_reproduce_the_scores(recipe, tmp_path):
    """Two windows of 64 x 64 and both flips: their confusion matrix is that of `eval.json`."""
    settings = {"VAL__window": (64, 64), "VAL__flip": True, "DATASET__imgSizes": [64]}
    cfg = load_config(recipe(tmp_path / "one.yaml", **settings))
    torch.manual_seed(0)
    model = ModelBuilder.from_config(cfg)
    result = evaluate(cfg, [CPU], model=model, out_dir=tmp_path, keep=3, progress=False)
    data = val_dataset(cfg)
    kept = SavedPredictions.evenly(tmp_path / "labels", 3, len(data))
    assert kept.numbers == (0, 1) and len(list(kept.folder.iterdir())) == 2
    truth, labels = (
        np.concatenate([x.ravel() for x in parts])
        for parts in (
            [data[n]["seg_label"].numpy() for n in kept.numbers],
            [np.load(kept.file(n)) for n in kept.numbers],
        )
    )
    assert (truth == labels)[truth >= 0].mean() == pytest.approx(result["pixel_accuracy"])
    assert SavedPredictions.evenly(tmp_path, 3, 100).numbers == (16, 50, 83)


def test_mistakes_are_one_line(recipe, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    files = [str(recipe(tmp_path / folder / "same.yaml")) for folder in ("", "other")]
    cpu, out = ["--gpus", "cpu"], ["--out", str(tmp_path / "out")]
    for words, message in (
        (["profile", files[0], *cpu, "--size", "0", "0"], "error: --size 0 0: "),
        (["profile", files[0], *cpu, "--size", "64", "-1"], "error: --size 64 -1: "),
        (["profile", *files, *cpu, *out], "two recipes are called same: "),
        (["sweep", *files, *cpu, *out], "two recipes are called same: "),
        # Overrides may follow options, and come before them.
        (["profile", files[0], *cpu, "MODEL.fc_dim", "7"], "MODEL.fc_dim is 7"),
        (["profile", files[0], "MODEL.fc_dim", "7", *cpu], "MODEL.fc_dim is 7"),
    ):
        assert main(words) == 2
        output = capsys.readouterr().err
        assert message in output and output.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["profile", files[0], *cpu, "--what", "7"])
    assert "unrecognized arguments: --what 7" in capsys.readouterr().err
