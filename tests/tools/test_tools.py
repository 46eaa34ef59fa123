"""overfit, profile and sweep on small models and rendered scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from mit_semseg.cli import main
from mit_semseg.config import dump_config, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import streets
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder
from mit_semseg.tools import overfit, profile, sweep

CPU = torch.device("cpu")


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
def test_a_model_learns_one_image(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    file = recipe(tmp_path / "small.yaml", TRAIN__precision="fp32")
    out = tmp_path / "out"
    assert (
        main(["overfit", "--gpus", "cpu", "--side", "64", "--out", str(out), "--cfg", f"{file}"])
        == 0
    )
    (found,) = json.loads((out / "overfit.json").read_text())
    assert found["name"] == "small" and found["accuracy"] >= 0.98 and found["steps"] <= 400
    assert "| small | " in (out / "overfit.md").read_text()
    assert (out / "overfit.png").stat().st_size > 1000


def test_what_is_not_learned_is_said(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    file = recipe(tmp_path / "small.yaml")
    found = overfit.overfit(config(file), CPU, steps=1, side=64, progress=False)
    truth, prediction = found.sample.truth, found.sample.prediction
    assert found.accuracy < 0.98 and found.steps == 1
    assert found.accuracy == pytest.approx((truth == prediction)[truth >= 0].mean())
    assert found.sample.image.shape == (*truth.shape, 3)
    assert (
        main(
            [
                "overfit",
                "--gpus",
                "cpu",
                "--side",
                "64",
                "--steps",
                "1",
                "--out",
                str(tmp_path / "out"),
                "--cfg",
                str(file),
            ]
        )
        == 1
    )


def test_models_that_have_learned_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["overfit", "--gpus", "cpu", "--every", "--only", "mobilenetv2dilated + c1"]
    words += ["--out", str(tmp_path), "--steps", "2"]
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


def test_every_registered_model_has_its_turn() -> None:
    pairs = overfit.every_model()
    assert {ENCODERS.get(encoder) for encoder, _ in pairs} == set(
        map(ENCODERS.get, ENCODERS.names())
    )
    assert {DECODERS.get(decoder) for _, decoder in pairs} == set(
        map(DECODERS.get, DECODERS.names())
    )
    assert len(set(pairs)) == len(pairs)


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
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert main([*words, "--minutes", "1"]) == 2
    assert "give the same, or another --out" in capsys.readouterr().err


def test_steps_follow_from_the_pace(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path / "timed.yaml")
    queue = sweep.Sweep([file], tmp_path / "out", minutes=2)
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
