"""overfit, profile and sweep on small models and rendered scenes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from mit_semseg.cli import main
from mit_semseg.config import dump_config, get_defaults, load_config
from mit_semseg.config.node import Config
from mit_semseg.demo import streets
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.scoring import SavedPredictions
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder
from mit_semseg.models.papers import PAPER_MODELS
from mit_semseg.tools import overfit, profile, sweep
from mit_semseg.tools.recipes import fingerprint

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streets.write(tmp_path_factory.mktemp("scenes"), 8, 2, size=(64, 96))


@pytest.fixture(scope="module")
def recipe(scenes: Path) -> Callable[..., Path]:
    def write(file: Path, decoder: str = "c1", **settings: object) -> Path:
        opts: list[object] = [
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


def config(file: Path) -> Config:
    return load_config(file)


# ------------------------------------------------------------------------------ overfit
def test_a_model_learns_one_image(
    tmp_path: Path,
    recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(overfit, "LEAST_SCORES", 4)
    file = recipe(tmp_path / "small.yaml", TRAIN__precision="fp32")
    out = tmp_path / "out"
    assert (
        main(["overfit", "--gpus", "cpu", "--side", "32", "--out", str(out), "--cfg", f"{file}"])
        == 0
    )
    (found,) = json.loads((out / "overfit.json").read_text())
    assert found["name"] == "small" and found["accuracy"] >= 0.98 and found["steps"] <= 400
    said = capsys.readouterr().out
    assert said.startswith("small: ") and f"Table and picture in {out}" in said
    assert "below" not in said
    assert "| small | " in (out / "overfit.md").read_text()
    assert (out / "overfit.png").stat().st_size > 1000


def test_statistics_follow_and_dropout_lets_pass() -> None:
    layers = [nn.BatchNorm2d(1, momentum=m) for m in (0.01, 0.3, None)]
    net = nn.Sequential(*layers, nn.Dropout(0.5), nn.Dropout2d(0.1))
    overfit.prepared(net)  # type: ignore[arg-type]
    assert [layer.momentum for layer in layers] == [0.1, 0.3, None]
    assert net[3].p == net[4].p == 0


def test_what_is_not_learned_is_said(
    tmp_path: Path, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path / "small.yaml")
    found = overfit.overfit(config(file), CPU, steps=1, side=64, progress=False)
    truth, prediction = found.sample.truth, found.sample.prediction
    assert found.accuracy < 0.98 and found.steps == 1
    assert found.accuracy == pytest.approx((truth == prediction)[truth >= 0].mean())
    assert found.sample.image.shape == (*truth.shape, 3)
    words = ["overfit", "--gpus", "cpu", "--side", "64", "--steps", "1", "--cfg", str(file)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "of rate 0.001, below 98 %" in capsys.readouterr().out


def test_models_that_have_learned_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overfit, "LEAST_SCORES", 4)
    monkeypatch.setattr(overfit, "RATES", (1e-3,))
    pairs = [("mobilenetv2dilated", "c1"), ("resnet18dilated", "c1")]
    monkeypatch.setattr(overfit, "every_model", lambda: pairs)
    words = ["overfit", "--gpus", "cpu", "--every", "--only", "mobilenetv2dilated + c1"]
    words += ["--out", str(tmp_path), "--steps", "1", "--side", "32"]
    assert main(words) == 1 == main(words), "what has not learned is run again"
    capsys.readouterr()
    monkeypatch.setattr(overfit, "TARGET", 0.0)
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("mobilenetv2dilated + c1: ")
    with monkeypatch.context() as patch:
        patch.delattr(overfit, "overfit")
        assert main(words) == 0 and capsys.readouterr().out == first
        with pytest.raises(NameError):  # asked for something else
            main([*words, "--side", "64"])
        with pytest.raises(NameError):
            main([*words, "TRAIN.loss", "focal"])


def test_a_rendered_scene_is_read_whatever_data_the_recipe_is_for(scenes: Path) -> None:
    plain = overfit.scene_config(load_config(None), "mobilenetv2dilated", "c1", scenes)
    for recipe in ("sunrgbd-resnet50dilated-ppm_deepsup-depth", "camvid-enet"):
        cfg = config(ROOT / "config" / f"{recipe}.yaml")
        strange = ["DATASET.label_map", "((0, 3),)", "DATASET.ignore_label", "(1, 2)"]
        strange += ["TRAIN.aux_weights", "(0.1, 0.2)"]
        cfg.merge_from_list([*strange, "DATASET.batching", "crop", "DATASET.crop_size", "(64, 64)"])
        found = overfit.scene_config(cfg, "mobilenetv2dilated", "c1", scenes)
        assert found.MODEL.in_channels == 3 and found.TRAIN.aux_weights == []
        batches = [overfit.one_image(one, 64, 8) for one in (plain, found)]
        for key in ("img_data", "seg_label"):
            assert torch.equal(*(batch[key] for batch in batches)), (recipe, key)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_picture_of_a_recipe_with_depth_is_its_image(
    tmp_path: Path, recipe: Callable[..., Path], scenes: Path, order: str
) -> None:
    record = json.loads((scenes / "training.odgt").read_text().splitlines()[0])
    image = cv2.imread(str(scenes / record["fpath_img"]))[..., ::-1]
    cv2.imwrite(str(tmp_path / "depth.png"), np.full(image.shape[:2], 3000, np.uint16))
    record["fpath_depth"] = str(tmp_path / "depth.png")
    (tmp_path / "list.odgt").write_text(json.dumps(record))
    settings = {"DATASET__list_train": str(tmp_path / "list.odgt"), "DATASET__depth": True}
    settings |= {"DATASET__color_order": order, "DATASET__mean": (0.4, 0.5, 0.6)}
    cfg = config(recipe(tmp_path / "deep.yaml", MODEL__in_channels=4, **settings))
    batch = overfit.one_image(cfg, 64, 8)
    assert batch["img_data"].shape == (1, 4, 64, 96) and batch["img_data"].is_floating_point()
    assert np.array_equal(overfit.picture(cfg, batch), image)


def test_every_registered_model_has_its_turn() -> None:
    pairs = overfit.every_model()
    assert {ENCODERS.get(encoder) for encoder, _ in pairs} == set(
        map(ENCODERS.get, ENCODERS.names())
    )
    assert {DECODERS.get(decoder) for _, decoder in pairs} == set(
        map(DECODERS.get, DECODERS.names())
    )
    assert len(set(pairs)) == len(pairs)
    assert {(model.encoder, model.decoder) for model in PAPER_MODELS} <= set(pairs)


def test_a_choice_needs_something_to_choose_from(
    tmp_path: Path, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path / "small.yaml")
    words = ["overfit", "--gpus", "cpu", "--out", str(tmp_path), "--cfg", str(file)]
    assert main([*words, "--only", "segnet"]) == 2
    assert "--only segnet chooses among all models: give --every, too" in capsys.readouterr().err


def test_settings_of_crops_are_left_out_without_a_warning(
    scenes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opts = ["DATASET.batching", "crop", "DATASET.crop_size", "(64, 64)", "DATASET.random_blur", "0"]
    opts += ["DATASET.random_rotation", "0"]
    cfg = overfit.scene_config(load_config(None), "mobilenetv2dilated", "c1", scenes)
    cfg.merge_from_list([*opts, "DATASET.scale_jitter", "(1.0, 1.0)"])
    overfit.one_image(cfg, 64, 8)
    assert caplog.text == ""


def test_recipes_are_told_apart_by_what_they_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(ROOT / "config/camvid-enet.yaml")
    before, other = fingerprint(cfg), load_config(ROOT / "config/camvid-enet.yaml")
    other.DIR = "elsewhere"
    assert fingerprint(other) == before
    other.TRAIN.seed += 1
    assert fingerprint(other) != before
    # A key that a later version brings.
    defaults = get_defaults()
    for tree in (cfg, defaults):
        tree.TRAIN.defrost()
        tree.TRAIN["something_new"] = 3
    monkeypatch.setattr("mit_semseg.tools.recipes.get_defaults", lambda: defaults)
    assert fingerprint(cfg) == before


# ------------------------------------------------------------------------------ profile
def test_operations_are_those_of_the_layers() -> None:
    """Against a count by hand of one convolution, and torchvision's of ResNet."""

    class OneConvolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)

        def logits(self, image: torch.Tensor) -> torch.Tensor:
            return self.conv(image)

    image = torch.zeros(1, 3, 16, 20)
    assert profile.operations(OneConvolution(), image) == 2 * 3 * 8 * 9 * 16 * 20  # type: ignore[arg-type]

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = ModelBuilder.build_encoder("torchvision_resnet50", weights="none")

        def logits(self, image: torch.Tensor) -> torch.Tensor:
            return self.encoder(image)

    # Its figure is in multiplications with additions, and has the classifier of 1000 classes.
    theirs = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"] * 1e9 - 2048 * 1000
    with torch.device("meta"):
        backbone, image = Backbone(), torch.zeros(1, 3, 224, 224)
    assert profile.operations(backbone, image) == pytest.approx(2 * theirs, rel=1e-3)  # type: ignore[arg-type]


def test_activations_are_what_backward_needs(recipe: Callable[..., Path], tmp_path: Path) -> None:
    cfg = config(recipe(tmp_path / "small.yaml"))
    module = ModelBuilder.from_config(cfg)
    small, large = (
        profile.activations(module, torch.zeros(1, 3, 64, width), cfg) for width in (64, 128)
    )
    assert 1.9 < large / small < 2.1
    # The input of every BatchNorm and the output of every convolution, at least.
    assert small > 4 * 32 * 32 * 32


def test_the_table_holds_every_recipe(
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profile, "LEAST_SECONDS", 0.0)
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


@pytest.mark.parametrize("size", [("0", "0"), ("64", "-1")])
def test_an_image_that_is_no_image_is_refused(
    capsys: pytest.CaptureFixture[str], size: tuple[str, str]
) -> None:
    recipe = str(ROOT / "config/camvid-enet.yaml")
    assert main(["profile", recipe, "--gpus", "cpu", "--size", *size]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --size {' '.join(size)}: ") and said.count("\n") == 1


def test_an_image_below_the_reach_of_a_network_is_one_line() -> None:
    message = r"^--size 2 1: small works with no such image \(.+\); give a larger one"
    with pytest.raises(ValueError, match=message) as caught, profile._reach("small", (2, 1)):
        nn.MaxPool2d(2)(torch.zeros(1, 3, 2, 1))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_measured_does_not_stop_the_others(
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def activations(module: nn.Module, image: torch.Tensor, cfg: Config) -> int:
        if cfg.MODEL.arch_decoder == "ppm":
            raise error
        return 7 << 20

    monkeypatch.setattr(profile, "activations", activations)
    monkeypatch.setattr(profile, "LEAST_SECONDS", 0.0)
    files = [str(recipe(tmp_path / f"{name}.yaml", name)) for name in ("ppm", "c1")]
    words = ["--gpus", "cpu", "--size", "64", "64"]
    error: Exception = torch.OutOfMemoryError("no memory\nfor this")
    assert main(["profile", *files, *words]) == 1
    assert "error: ppm is left out: no memory for this\n" in capsys.readouterr().err
    error = ValueError("too small")
    assert main(["profile", *files, *words]) == 1
    said = capsys.readouterr()
    assert (
        "error: ppm is left out: --size 64 64: ppm works with no such image (too small)" in said.err
    )
    assert "| c1 " in said.out and "| ppm " not in said.out
    assert main(["profile", files[0], *words]) == 2  # alone


def test_auxiliary_heads_are_counted(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "LEAST_SECONDS", 0.0)
    plain, deep = (
        profile.profile(config(recipe(tmp_path / f"{name}.yaml", name)), CPU, (64, 64))
        for name in ("c1", "c1_deepsup")
    )
    # The auxiliary head of c1_deepsup: a 3x3 convolution of 160 -> 80, BatchNorm, scores of 10.
    head = 160 * 80 * 9 + 2 * 80 + 80 * 10 + 10
    assert 1e6 * (deep.parameters - plain.parameters) == pytest.approx(head)
    assert deep.gflops == plain.gflops


def test_recipes_of_one_name_are_refused(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    files = [str(recipe(tmp_path / folder / "same.yaml")) for folder in ("", "other")]
    for command in ("profile", "sweep"):
        assert main([command, *files, "--gpus", "cpu", "--out", str(tmp_path / "out")]) == 2
        assert "two recipes are called same: " in capsys.readouterr().err


# ------------------------------------------------------------------------------ sweep
def test_a_queue_is_run_and_not_run_again(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = recipe(tmp_path / "good.yaml")
    broken = recipe(
        tmp_path / "broken.yaml",
        DATASET__root_dataset=str(tmp_path / "nowhere"),
        DATASET__list_train=str(tmp_path / "nowhere.odgt"),
    )
    words = ["sweep", str(broken), str(good), "--gpus", "cpu", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "broken: failed: train ended with 2: error: " in printed and "nowhere.odgt" in printed
    found = {
        x["recipe"]: x for x in json.loads((tmp_path / "out/sweep.json").read_text())["recipes"]
    }
    result = json.loads((tmp_path / "out/good/evaluation/eval.json").read_text())
    assert found[str(good)]["mean_iou"] == result["mean_iou"] and found[str(good)]["steps"] == 6
    assert (tmp_path / "out/sweep.png").is_file()
    with Image.open(tmp_path / "out/sweep_pictures.png") as sheet:  # 2 images: as they are, as
        assert sheet.height > 3 * sheet.width / 2 * 64 / 96  # they should be, and seen
    assert "| good | mobilenetv2dilated + c1 |" in (tmp_path / "out/sweep.md").read_text()
    before = (tmp_path / "out/good/metrics.jsonl").stat().st_mtime_ns
    assert main(["sweep", str(good), "--gpus", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/good/metrics.jsonl").stat().st_mtime_ns == before
    assert "(done before)" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out/sweep.json").read_text())["recipes"]
    assert [(Path(x["recipe"]).stem, x["state"]) for x in kept] == [
        ("good", "done"),
        ("broken", "failed"),  # not asked for this time
    ]
    assert main([*words, "--minutes", "1"]) == 2
    assert "give the same, or another --out" in capsys.readouterr().err


def test_steps_follow_from_the_pace(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path / "timed.yaml")
    queue = sweep.Sweep([file], tmp_path / "out", minutes=2)
    assert queue.configs["timed"] == config(file)
    (tmp_path / "out" / "timed").mkdir(parents=True)
    (tmp_path / "out" / "timed" / "pace.json").write_text('{"seconds_per_step": 0.5}')
    # 120 seconds, half a second each, in two epochs.
    overrides = queue._budget(queue.entries[0], config(file), "")
    assert overrides == ["TRAIN.epoch_iters", "120"]


def test_mistakes_are_found_before_anything_is_run(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    good = recipe(tmp_path / "good.yaml")
    (tmp_path / "other").mkdir()
    same = recipe(tmp_path / "other" / "good.yaml")
    with pytest.raises(ValueError, match="two recipes are called good"):
        sweep.Sweep([good, same], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        sweep.Sweep([good, tmp_path / "missing.yaml"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Stands for the commands: a training leaves its log, an evaluation what the test says.
COMMAND = """#!/bin/sh
command=$3; folder=$(echo "$*" | sed 's/.* DIR \\([^ ]*\\).*/\\1/'); mkdir -p $folder/evaluation
if [ $command = train ]; then
  echo '{"kind": "train", "step": 6, "epoch": 2, "seconds": 3.0}' > $folder/metrics.jsonl
  touch $folder/begun; exit
fi
"""
FIGURES = '{"mean_iou": 0.5, "pixel_accuracy": 0.75, "images": 2, "seconds": 1.0, "failed": []}'
SCORED = f"echo '{FIGURES}' > $folder/evaluation/eval.json\n"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    program = tmp_path / "python"

    def say(evaluation: str) -> None:
        program.write_text(COMMAND + evaluation)
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return say


def test_an_evaluation_without_figures_has_failed(
    recipe: Callable[..., Path], tmp_path: Path, commands: Callable[[str], None]
) -> None:
    file, out = recipe(tmp_path / "one.yaml"), tmp_path / "out"
    commands(SCORED + "exit 1")  # some images failed
    (entry,) = sweep.Sweep([file], out).run()
    assert (entry.state, entry.mean_iou) == ("done", 0.5)
    note = json.loads((out / "sweep.json").read_text())
    note["recipes"][0]["state"] = "waiting"
    (out / "sweep.json").write_text(json.dumps(note))
    commands("echo 'Traceback'; echo 'KeyError: 1'; exit 1")  # beside the figures of before
    (entry,) = sweep.Sweep([file], out).run()
    assert entry.state == "failed" and entry.error.startswith("eval ended with 1: KeyError: 1 (")


def test_what_one_recipe_raises_does_not_end_the_queue(
    recipe: Callable[..., Path], tmp_path: Path, commands: Callable[[str], None]
) -> None:
    files = [recipe(tmp_path / f"{name}.yaml") for name in ("odd", "good")]
    strange = "case $folder in */odd) echo '{}' > $folder/evaluation/eval.json; exit;; esac\n"
    commands(strange + SCORED)
    odd, good = sweep.Sweep(files, tmp_path / "out").run()
    assert (odd.state, odd.error) == ("failed", "KeyError: 'mean_iou'") and good.state == "done"


def test_an_edited_recipe_begins_anew(
    recipe: Callable[..., Path], tmp_path: Path, commands: Callable[[str], None]
) -> None:
    file, out = recipe(tmp_path / "one.yaml"), tmp_path / "out"
    commands(SCORED)
    sweep.Sweep([file], out).run()
    (out / "one" / "pace.json").write_text('{"seconds_per_step": 9}')
    assert sweep.Sweep([file], out).entries[0].state == "done"
    recipe(file, TRAIN__lr_encoder=0.5)
    queue = sweep.Sweep([file], out)
    assert queue.entries[0].state == "waiting"
    assert queue.run()[0].state == "done"
    assert (out / "one.1" / "pace.json").is_file() and not (out / "one" / "pace.json").exists()
    assert (out / "one" / "begun").is_file()


def test_pictures_are_of_one_data_set_and_fail_alone(
    recipe: Callable[..., Path],
    scenes: Path,
    tmp_path: Path,
    commands: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    other = streets.write(tmp_path / "other", 1, 2, size=(64, 80))
    lists = {"DATASET__list_val": "validation.odgt"}  # of one name in either folder
    files = [
        recipe(tmp_path / "first.yaml", **lists),
        recipe(tmp_path / "lost.yaml", **lists),
        recipe(tmp_path / "other.yaml", DATASET__root_dataset=str(other), **lists),
    ]
    commands(SCORED)
    out = tmp_path / "out"
    queue = sweep.Sweep(files, out)
    rows: list[str] = []
    monkeypatch.setattr(
        sweep, "image_grid", lambda tiles, *a, **k: rows.extend(name for name, _ in tiles)
    )
    for entry in queue.entries:
        entry.mean_iou = 0.5
        if entry.name != "lost":
            (out / entry.name / "evaluation/labels").mkdir(parents=True)
            for number in range(2):
                np.save(queue._kept(entry, 2).file(number), np.zeros((64, 96), np.int16))
    with caplog.at_level(logging.WARNING):
        queue._draw()
        queue._draw()
    assert rows == 2 * ["image", "", "truth", "", "first, mean IoU 50.00 %", ""]
    (said,) = [x.message for x in caplog.records]
    assert said.startswith("sweep_pictures.png is without lost: FileNotFoundError: ")
    monkeypatch.delattr(sweep, "image_grid")
    queue._draw()
    assert "sweep_pictures.png is not drawn: NameError" in caplog.text


def test_an_unreadable_image_is_left_out_of_the_pictures(
    recipe: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = streets.write(tmp_path / "data", 1, 3, size=(64, 96))
    (data / "images/validation/0001.png").write_bytes(b"no image")
    settings = {"root_dataset": data, "list_val": "validation.odgt"}
    settings = {f"DATASET__{key}": str(value) for key, value in settings.items()}
    queue = sweep.Sweep([recipe(tmp_path / "one.yaml", **settings)], tmp_path / "out")
    found = sweep.val_dataset(queue.configs["one"])
    assert list(queue._samples(found, [0, 1, 2])) == [0, 2]
    assert "0001.png" in caplog.text


def test_class_ids_that_are_kept_are_those_that_were_scored(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Two windows of 64 x 64 and both flips: their confusion matrix is that of `eval.json`."""
    settings = {"VAL__window": (64, 64), "VAL__flip": True, "DATASET__imgSizes": [64]}
    cfg = config(recipe(tmp_path / "one.yaml", **settings))
    torch.manual_seed(0)
    model = ModelBuilder.from_config(cfg)
    result = evaluate(cfg, [CPU], model=model, out_dir=tmp_path, keep=3, progress=False)
    data = sweep.val_dataset(cfg)
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


def test_overrides_may_follow_options(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(recipe(tmp_path / "one.yaml"))
    for words in (["--gpus", "cpu", "MODEL.fc_dim", "7"], ["MODEL.fc_dim", "7", "--gpus", "cpu"]):
        assert main(["profile", file, *words]) == 2
        assert "MODEL.fc_dim is 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["profile", file, "--gpus", "cpu", "--what", "7"])
    assert "unrecognized arguments: --what 7" in capsys.readouterr().err
