"""Training: it learns, resumes identically, adds replicas up, and names what it cannot use."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue as MultiprocessingQueue
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reads import gpu_waits, reads_of
from torch import nn

from mit_semseg.cli import main
from mit_semseg.config import dump_config, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.reading import READINGS
from mit_semseg.engine.train import train
from mit_semseg.engine.training.build import build
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.loader import RankSampler
from mit_semseg.engine.training.optim import parameter_groups
from mit_semseg.engine.training.state import Progress
from mit_semseg.engine.training.step import StepResult, TrainStep
from mit_semseg.engine.training.trainer import Trainer
from mit_semseg.losses import build_loss
from mit_semseg.models import Decoder, Encoder, ModelBuilder, SegmentationModule
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.compilation import compile_for_training, compiler_errors
from mit_semseg.models.encoders.resnet import BasicBlock

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
# A third of a million weights instead of twelve million, where files are written and read many
# times; and it has dropout, so that random numbers must line up, too.
ENET = {
    "MODEL__arch_encoder": "enet",
    "MODEL__arch_decoder": "enet",
    "MODEL__fc_dim": 128,
    "DATASET__segm_downsampling_rate": 1,
}


@pytest.fixture
def settings(tmp_path: Path, make_images: Callable[..., None]) -> Callable[..., Config]:
    """`settings(SECTION__key=value)` -> a small job on four images of four classes."""
    root = tmp_path / "data"
    make_images(root, [(48, 64), (48, 64), (48, 64), (48, 64)])

    def build(**changes: Any) -> Config:
        base: dict[str, Any] = {
            "DIR": str(tmp_path / "model"),
            "DATASET__root_dataset": str(root),
            "DATASET__list_train": str(root / "val.odgt"),
            "DATASET__list_val": str(root / "val.odgt"),
            "DATASET__num_class": 4,
            # Masks hold 0..3; 4 never occurs, so that a class is absent.
            "DATASET__label_offset": 0,
            "DATASET__imgSizes": [48],
            "DATASET__segm_downsampling_rate": 4,
            "DATASET__random_flip": False,
            "MODEL__arch_encoder": "resnet18dilated",
            "MODEL__arch_decoder": "c1",
            "MODEL__fc_dim": 512,
            "MODEL__weights_encoder": "none",
            "TRAIN__num_epoch": 2,
            "TRAIN__epoch_iters": 2,
            "TRAIN__batch_size_per_gpu": 2,
            "TRAIN__workers": 0,
            "TRAIN__eval_epochs": 0,
            "TRAIN__disp_iter": 1,
        }
        opts: list[Any] = []
        for key, value in {**base, **changes}.items():
            opts += [key.replace("__", "."), value]
        return load_config(None, opts)

    return build


def trainer_of(
    cfg: Config, devices: Sequence[torch.device] = (CPU,), resume: str = "", job: str = ""
) -> Trainer:
    return Trainer(build(cfg, devices, progress=False, resume=resume, job=job))


def weights(cfg: Config, checkpoint: str) -> dict[str, torch.Tensor]:
    files = RunFolder(cfg.DIR).files(checkpoint)
    return {
        f"{file.name[:7]}.{key}": value
        for file in files
        for key, value in torch.load(file, weights_only=True).items()
    }


def test_a_validation_of_one_class_is_pointed_out(
    settings: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = settings(
        TRAIN__num_epoch=1,
        TRAIN__epoch_iters=1,
        TRAIN__eval_epochs=1,
        TRAIN__lr_encoder=0,
        TRAIN__lr_decoder=0,
        MODEL__weights_decoder=str(tmp_path / "decoder.pth"),
    )
    plain = cfg.clone()
    plain.MODEL.weights_decoder = ""
    decoder = ModelBuilder.from_config(plain).decoder
    last = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        last.bias[2] = 1e4
    torch.save(decoder.state_dict(), tmp_path / "decoder.pth")
    train(cfg, [CPU], progress=False)
    said = [record.getMessage() for record in caplog.records if "predicted" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("epoch 1: every pixel of all images is predicted as class 2: look at")


def test_learns_and_leaves_a_whole_folder(settings: Callable[..., Config]) -> None:
    cfg = settings(
        TRAIN__num_epoch=8,
        TRAIN__epoch_iters=5,
        TRAIN__optim="AdamW",
        TRAIN__lr_encoder=0.002,
        TRAIN__lr_decoder=0.002,
        TRAIN__eval_epochs=4,
        TRAIN__keep=2,
    )
    result = train(cfg, [CPU], progress=False)
    losses = result["history"]["train"]["loss"]
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]
    # Chance is 0.14 on four classes; the images are their masks in grey with noise.
    assert result["best_mean_iou"] > 0.5
    folder = RunFolder(cfg.DIR)
    assert folder.names() == ["epoch_7.pth", "epoch_8.pth", "best.pth"]
    assert folder.config().TRAIN.optim == "AdamW"
    assert len(folder.classes().names) == 4
    names = {p.name for p in folder.path.iterdir()}
    assert {"history_epoch_8.pth", "state_step_40.pth", "metrics.jsonl", "curves.png"} <= names
    assert {name for name in names if name.startswith(".")} == {".lock"}, "no temporary file stays"
    Image.open(folder.path / "curves.png").verify()
    lines = [json.loads(x) for x in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines if x["kind"] == "val"] == [4, 8]
    assert len([x for x in lines if x["kind"] == "train"]) == 40
    history = torch.load(folder.path / "history_epoch_8.pth", weights_only=True)
    assert history["train"]["loss"] == losses  # the published layout


def test_the_memory_of_a_training_is_free_when_it_ends(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[weakref.ref[Trainer]] = []
    networks: list[weakref.ref[nn.Module]] = []
    fit = Trainer.fit

    def watched(self: Trainer) -> dict[str, Any]:
        trainers.append(weakref.ref(self))
        networks.append(weakref.ref(self.parts.step.module))
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", watched)
    gc.collect()
    gc.disable()  # it must go without the collector, whose next full pass may be hours away
    try:
        train(settings(**ENET, TRAIN__eval_epochs=1, TRAIN__workers=1), [CPU], progress=False)
        assert [trainer() for trainer in trainers] == [None]
        assert [network() for network in networks] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_is_identical(settings: Callable[..., Config], ema: float) -> None:
    common = {**ENET, "TRAIN__ema": ema, "TRAIN__num_epoch": 3}
    whole = settings(**common, DIR=settings().DIR + "_whole")
    train(whole, [CPU], progress=False)

    cut = settings(**common, DIR=settings().DIR + "_cut")
    trainer = trainer_of(cut)
    finish = trainer._finish_epoch

    def stop_after_two(epoch: int) -> None:
        finish(epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    trainer._finish_epoch = stop_after_two  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    train(cut, [CPU], resume=True, progress=False)

    expected, got = weights(whole, "epoch_3.pth"), weights(cut, "epoch_3.pth")
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key
    metrics = [(Path(c.DIR) / "metrics.jsonl").read_text() for c in (whole, cut)]
    first, second = ([json.loads(x) for x in text.splitlines()] for text in metrics)
    assert [x["step"] for x in second] == [x["step"] for x in first] == [1, 2, 3, 4, 5, 6]
    assert [x["loss"] for x in second] == [x["loss"] for x in first]


def test_start_epoch_without_state_says_so(
    settings: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    cfg = settings(TRAIN__num_epoch=1)
    train(cfg, [CPU], progress=False)
    (Path(cfg.DIR) / "state_step_2.pth").unlink()
    caplog.set_level("INFO", logger="mit_semseg")
    train(settings(TRAIN__num_epoch=2, TRAIN__start_epoch=1), [CPU], progress=False)
    assert "momentum starts afresh" in caplog.text


def test_weights_alone_start_the_average_too(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__num_epoch=1)
    train(cfg, [CPU], progress=False)
    (Path(cfg.DIR) / "state_step_2.pth").unlink()
    trainer = trainer_of(settings(TRAIN__num_epoch=2, TRAIN__ema=0.9), resume="auto")
    trainer.resume()
    step = trainer.parts.step
    for averaged, own in zip(step.evaluated.parameters(), step.module.parameters()):
        assert averaged is not own
        torch.testing.assert_close(averaged, own)


def test_start_epoch_behind_the_end_is_refused(settings: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"start_epoch 3 lies behind TRAIN\.num_epoch 2"):
        train(settings(TRAIN__start_epoch=3), [CPU], progress=False)


def test_bad_validation_mask_stops_before_the_first_step(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = settings(TRAIN__eval_epochs=1)
    image, mask = tmp_path / "odd.png", tmp_path / "odd_mask.png"
    Image.new("RGB", (8, 8)).save(image)
    Image.new("L", (8, 8), 77).save(mask)
    listing = tmp_path / "odd.odgt"
    listing.write_text(json.dumps({"fpath_img": str(image), "fpath_segm": str(mask)}))
    cfg.DATASET.list_val = str(listing)
    with pytest.raises(ValueError, match=r"odd_mask\.png: label 77"):
        train(cfg, [CPU], progress=False)
    assert not Path(cfg.DIR).exists()


def test_two_replicas_train_like_one_process(settings: Callable[..., Config]) -> None:
    # All four images in each step; two replicas of two must give the step of one process of four.
    # A small learning rate: rounding grows with every step of a network trained from scratch.
    rates = {"TRAIN__lr_encoder": 0.001, "TRAIN__lr_decoder": 0.001}
    one = settings(DIR=settings().DIR + "1", TRAIN__batch_size_per_gpu=4, **rates)
    two = settings(DIR=settings().DIR + "2", TRAIN__batch_size_per_gpu=2, **rates)
    losses = [
        train(cfg, devices, progress=False)["history"]["train"]["loss"]
        for cfg, devices in ((one, [CPU]), (two, [CPU, CPU]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][1] < 0.99 * losses[0][0], "the second step must see what the first learnt"


def test_accumulated_batches_train_like_one(settings: Callable[..., Config]) -> None:
    # BatchNorm sees smaller batches, so it is fixed; labels are all valid, so means agree.
    one = settings(DIR=settings().DIR + "1", TRAIN__batch_size_per_gpu=4, TRAIN__fix_bn=True)
    four = settings(
        DIR=settings().DIR + "4",
        TRAIN__batch_size_per_gpu=1,
        TRAIN__accumulate=4,
        TRAIN__fix_bn=True,
    )
    losses = [train(cfg, [CPU], progress=False)["history"]["train"]["loss"] for cfg in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_fixed_batchnorm_keeps_its_statistics(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__fix_bn=True, TRAIN__num_epoch=1)
    train(cfg, [CPU], progress=False)
    after = weights(cfg, "epoch_1.pth")
    means = [value for key, value in after.items() if key.endswith("running_mean")]
    assert means and all(torch.equal(m, torch.zeros_like(m)) for m in means)


def test_auto_epoch_is_one_pass(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__epoch_iters="auto")
    assert build(cfg, [CPU]).progress.epoch_iters == 2
    assert build(cfg, [CPU] * 2).progress.epoch_iters == 1


def test_non_finite_loss_names_the_files(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__lr_encoder=1e30, TRAIN__lr_decoder=1e30, TRAIN__epoch_iters=5)
    with pytest.raises(FloatingPointError, match=r"img/part\d/\d\.png.*TRAIN\.lr_encoder"):
        train(cfg, [CPU], progress=False)


def test_bad_label_stops_before_the_first_step(settings: Callable[..., Config]) -> None:
    cfg = settings(DATASET__num_class=3)
    with pytest.raises(ValueError, match=r"\.png: label 3 is outside 0\.\.2"):
        train(cfg, [CPU], progress=False)
    assert not Path(cfg.DIR).exists()


def test_bfloat16_agrees_with_float32(settings: Callable[..., Config]) -> None:
    losses = [
        train(settings(DIR=settings().DIR + name, TRAIN__precision=name), [CPU], progress=False)[
            "history"
        ]["train"]["loss"]
        for name in ("fp32", "bf16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("devices", [1, 2])
def test_recomputation_trains_the_same(settings: Callable[..., Config], devices: int) -> None:
    runs = []
    for again in (False, True):
        cfg = settings(
            DIR=settings().DIR + str(again),
            TRAIN__activation_checkpointing=again,
            TRAIN__ema=0.9,
            TRAIN__precision="bf16",
        )
        train(cfg, [CPU] * devices, progress=False)
        runs.append(weights(cfg, "epoch_2.pth"))
    assert list(runs[0]) == list(runs[1])
    for key, value in runs[0].items():
        if devices == 1:
            assert torch.equal(value, runs[1][key])
        else:  # replicas add up in any order
            torch.testing.assert_close(value, runs[1][key], rtol=0.02, atol=0.02)
    counts = [int(v) for k, v in runs[1].items() if k.endswith("num_batches_tracked")]
    assert set(counts) == {4}


def test_compilation_needs_one_device(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__compile=True)
    for devices, world in (([CPU, CPU], 1), ([CPU], 2)):
        with pytest.raises(ValueError, match=r"with 2 devices.*set TRAIN\.compile False"):
            build(cfg, devices, 0, world)


@pytest.mark.parametrize(
    "said",
    [
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx",
        "Cannot find a working triton installation. Either the package is not installed or",
        "Compiler: cl is not found.",
    ],
)
def test_without_a_compiler_the_fix_is_named(said: str) -> None:
    fix = r"install a C\+\+ compiler.*TRAIN\.compile, .* False"
    with pytest.raises(ValueError, match=fix), compiler_errors():
        raise RuntimeError(f"backend='inductor' raised:\n{said}")
    with pytest.raises(RuntimeError, match="out of memory"), compiler_errors():
        raise RuntimeError("CUDA out of memory")


@pytest.mark.slow
def test_torch_says_so_at_the_first_step(tmp_path: Path) -> None:
    code = """
import torch
from mit_semseg.models.compilation import compiled_function, compiler_errors
relu = compiled_function(torch.nn.ReLU().forward)
try:
    with compiler_errors():
        relu(torch.ones(2, 3, requires_grad=True) + 1)
except ValueError as error:
    print(error)
"""
    nowhere = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        timeout=240,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "install a C++ compiler" in done.stdout


class OneHead(Decoder):
    """Small enough to compile in seconds."""

    def __init__(self) -> None:
        super().__init__((4,), 3)
        self.norm, self.conv_last = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def logits(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (self.conv_last(self.norm(features[-1]).relu()),)


class OneConv(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.stage = nn.Sequential(BasicBlock(4, 4))

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.stage(self.conv(images))]


def test_compilation_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without code generation, for speed: what is entered, with which sizes and names.
    seen: list[str] = []

    def compile_nothing(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"dynamic": True}

        def call(*args: Any, **more: Any) -> Any:
            seen.append(function.__name__)
            return function(*args, **more)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    plain = SegmentationModule(OneConv(), OneHead(), build_loss("nll", 3))
    other = copy.deepcopy(plain)
    compile_for_training(other)
    batch = {"img_data": torch.randn(1, 3, 8, 8), "seg_label": torch.zeros(1, 4, 4).long()}
    assert torch.equal(other(batch)[0], plain(batch)[0])
    assert seen == ["encode", "decode"]
    assert list(other.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(other)
    twin.decoder.conv_last.bias.data[0] += 5.0
    assert not torch.equal(twin(batch)[0], other(batch)[0])
    assert len(seen) == 3 * 2
    other.eval()(batch)
    other(batch, segSize=(8, 8))
    assert len(seen) == 3 * 2, "evaluation enters nothing that is compiled"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("again", [False, True])
def test_compiled_equals_plain(again: bool) -> None:
    torch.manual_seed(0)
    plain = SegmentationModule(OneConv(), OneHead(), build_loss("nll", 3)).double()
    other = copy.deepcopy(plain)
    if again:
        checkpoint_activations(other.encoder)
    compile_for_training(other)
    for height, width in ((32, 48), (64, 40)):
        batch = {
            "img_data": torch.randn(2, 3, height, width, dtype=torch.float64),
            "seg_label": torch.randint(-1, 3, (2, height // 8, width // 8)),
        }
        results = []
        for module in (plain, other):
            module.zero_grad()
            loss, accuracy = module(batch)
            loss.backward()
            results.append([loss, accuracy, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(other.state_dict()), dict(plain.state_dict()))


def test_ranks_and_devices_share_one_stream() -> None:
    def taken(devices: int, rank: int, world: int) -> list[int]:
        return list(RankSampler(world * devices, 2, devices, rank, world))

    assert taken(2, 0, 1) == [2, 3, 4, 5]
    assert taken(1, 0, 2) == [2, 4]
    assert taken(1, 1, 2) == [3, 5]
    everything = [i for rank in range(3) for i in taken(2, rank, 3)]
    assert sorted(everything) == list(range(6, 18))


@pytest.mark.slow  # ranks of train.py --gpus: tests/engine/test_parallel.py
@pytest.mark.parametrize(("accumulate", "again"), [(1, False), (2, True)])
def test_torchrun_ranks_train_like_replicas(
    settings: Callable[..., Config], accumulate: int, again: bool
) -> None:
    rates = {"TRAIN__lr_encoder": 0.001, "TRAIN__lr_decoder": 0.001}
    rates["TRAIN__accumulate"] = accumulate
    replicas = settings(DIR=settings().DIR + "_replicas", **rates)
    expected = train(replicas, [CPU, CPU], progress=False)["history"]["train"]["loss"]
    cfg = settings(DIR=settings().DIR + "_ranks", TRAIN__activation_checkpointing=again, **rates)
    file = Path(cfg.DATASET.root_dataset) / "job.yaml"
    dump_config(cfg, file)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(20000 + os.getpid() % 20000)]
    subprocess.run(
        [*command, str(ROOT / "train.py"), "--gpus", "cpu", "--cfg", str(file)],
        check=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    history = torch.load(Path(cfg.DIR) / "history_epoch_2.pth", weights_only=True)
    assert history["train"]["loss"] == pytest.approx(expected, rel=5e-3)


def test_an_earlier_run_is_set_aside(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__num_epoch=2)
    train(cfg, [CPU], progress=False)
    before = (Path(cfg.DIR) / "encoder_epoch_2.pth").read_bytes()
    (Path(cfg.DIR) / "result_eval").mkdir()
    train(settings(TRAIN__num_epoch=1), [CPU], progress=False)
    assert RunFolder(cfg.DIR).names() == ["epoch_1.pth"]
    aside = RunFolder(Path(cfg.DIR) / "earlier_1")
    assert aside.names() == ["epoch_1.pth", "epoch_2.pth"]
    assert (aside.path / "encoder_epoch_2.pth").read_bytes() == before
    assert aside.config().TRAIN.num_epoch == 2
    # What an evaluation of it found is none of the new run's.
    assert (aside.path / "result_eval").is_dir() and not (Path(cfg.DIR) / "result_eval").exists()


def test_a_half_written_last_line_does_not_stop_a_resumed_run(
    settings: Callable[..., Config],
) -> None:
    cfg = settings(TRAIN__num_epoch=1)
    train(cfg, [CPU], progress=False)
    with (Path(cfg.DIR) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    result = train(settings(TRAIN__num_epoch=2), [CPU], resume=True, progress=False)
    assert len(result["history"]["train"]["loss"]) == 2
    lines = (Path(cfg.DIR) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 1, 2, 2]


# ------------------------------------------------------------------------------ survival
def state_of(cfg: Config) -> dict[str, Any]:
    found = RunFolder(cfg.DIR).newest_state()
    assert found is not None
    return found[1]


def assert_same_weights(one: Config, other: Config, checkpoint: str) -> None:
    expected, got = weights(one, checkpoint), weights(other, checkpoint)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


def signal_after(steps: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in the middle of a step."""
    take_step, add = Trainer._step, TrainStep.add
    running: list[Trainer] = []

    def remember(self: Trainer, *args: Any) -> Any:
        running[:] = [self]
        return take_step(self, *args)

    def and_signal(self: TrainStep, batch: list[dict[str, Any]]) -> None:
        if running[0].progress.step == steps and not running[0].parts.supervisor.asked:
            os.kill(os.getpid(), number)
        add(self, batch)

    monkeypatch.setattr(Trainer, "_step", remember)
    monkeypatch.setattr(TrainStep, "add", and_signal)


@pytest.mark.parametrize(
    ("number", "steps", "accumulate"),
    # In the first step, before the end of an epoch, and at the end of the last one.
    [(signal.SIGTERM, 0, 2), (signal.SIGINT, 2, 1), (signal.SIGTERM, 3, 1)],
)
def test_a_signal_ends_the_step_and_nothing_is_lost(
    settings: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    steps: int,
    accumulate: int,
) -> None:
    common = {**ENET, "TRAIN__accumulate": accumulate, "TRAIN__eval_epochs": 1}
    whole = settings(**common, DIR=settings().DIR + "_whole")
    train(whole, [CPU], progress=False)
    cut = settings(**common, DIR=settings().DIR + "_cut")
    with monkeypatch.context() as patch:
        signal_after(steps, number, patch)
        result = train(cut, [CPU], progress=False)
    assert (result["stopped"], result["step"], result["steps"]) == (number.name, steps + 1, 4)
    assert state_of(cut)["step"] == steps + 1
    result = train(cut, [CPU], resume="auto", progress=False)
    assert result["stopped"] == ""
    assert_same_weights(whole, cut, "epoch_2.pth")
    assert_same_weights(whole, cut, "best.pth")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_stop_says_how_to_go_on(
    settings: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    cfg = settings(**ENET)
    file = tmp_path / "job.yaml"
    dump_config(cfg, file)
    words = ["train", "--gpus", "cpu", "--cfg", str(file)]
    monkeypatch.setattr(sys, "argv", ["bin/mit-semseg", *words])
    signal_after(2, number, monkeypatch)
    assert main(words) == 0
    said = capfd.readouterr()
    assert f"Stopped by {number.name} after step 3 of 4" in said.out
    assert f"\n  mit-semseg train --resume auto --gpus cpu --cfg {file}\n" in said.out
    assert "Traceback" not in said.err and state_of(cfg)["step"] == 3
    assert main([*words, "--resume", "auto"]) == 0
    said = capfd.readouterr()
    assert f"resuming from {cfg.DIR}/state_step_3.pth" in said.out
    assert "Training done: " in said.out


def with_scaler(trainer: Trainer, scaler: torch.amp.GradScaler) -> Trainer:
    """fp16 needs a GPU; the scaling of its loss does not."""
    trainer.parts.step.scaler = scaler
    trainer.parts.state.register("scaler", scaler)
    return trainer


def test_a_state_holds_the_loss_scaling(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 needs a GPU; what is saved of its scaling does not."""

    def trainer(resume: str) -> Trainer:
        one = trainer_of(settings(**ENET), resume=resume)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        return with_scaler(one, scaler)

    cut, resumed = trainer(""), trainer("auto")
    signal_after(2, signal.SIGTERM, monkeypatch)
    cut.fit()
    resumed.resume()
    assert resumed.progress.step == 3
    scalers = [one.parts.step.scaler for one in (cut, resumed)]
    assert scalers[0].get_scale() == 2048.0, "it has grown after two of the three steps"
    assert scalers[1].state_dict() == scalers[0].state_dict()
    assert scalers[1].state_dict()["_growth_tracker"] == 1


def test_states_are_written_by_time(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__epoch_iters=4, TRAIN__num_epoch=1, TRAIN__checkpoint_minutes=1e-9)
    train(cfg, [CPU], progress=False)
    names = [file.name for file in RunFolder(cfg.DIR).states()]
    assert names == ["state_step_4.pth", "state_step_3.pth"]
    state = state_of(cfg)
    expected = {"encoder", "decoder", "optimizer", "scaler", "random", "position", "history"}
    assert expected | {"step", "best", "config", "max_iters"} <= state.keys()
    described = (ROOT / "docs" / "design_notes.md").read_text(encoding="utf-8")
    assert [key for key in state if f"`{key}`" not in described] == []
    assert set(state["random"][0]) == {"torch", "cuda", "numpy", "python"}


def test_resume_takes_a_file_or_a_folder(settings: Callable[..., Config], tmp_path: Path) -> None:
    source = settings(**ENET, TRAIN__num_epoch=3, DIR=str(tmp_path / "source"))
    train(source, [CPU], progress=False)
    two = tmp_path / "source" / "state_step_4.pth"
    for name, resume in (("file", str(two)), ("folder", str(two.parent))):
        cfg = settings(**ENET, TRAIN__num_epoch=3, DIR=str(tmp_path / name))
        result = train(cfg, [CPU], resume=resume, progress=False)
        assert_same_weights(source, cfg, "epoch_3.pth")
        assert len(result["history"]["train"]["loss"]) == 3
    for resume in ("nowhere", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"--resume .*state_step_N\.pth"):
            train(settings(DIR=str(tmp_path / "other")), [CPU], resume=resume, progress=False)
    assert train(settings(DIR=str(tmp_path / "new")), [CPU], resume="auto", progress=False)["step"]


def test_a_run_that_goes_back_keeps_what_it_leaves(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__num_epoch=3)
    train(cfg, [CPU], progress=False)
    folder = RunFolder(cfg.DIR)
    before = weights(cfg, "epoch_3.pth")
    train(settings(TRAIN__num_epoch=2, TRAIN__start_epoch=2), [CPU], progress=False)
    assert folder.names() == ["epoch_1.pth", "epoch_2.pth"]
    aside = settings(DIR=str(folder.path / "earlier_1"))
    assert all(torch.equal(v, before[k]) for k, v in weights(aside, "epoch_3.pth").items())
    # Told to resume, a run is not thrown back by a start_epoch of its configuration.
    train(settings(TRAIN__num_epoch=3, TRAIN__start_epoch=2), [CPU], resume=True, progress=False)
    result = train(
        settings(TRAIN__num_epoch=3, TRAIN__start_epoch=1), [CPU], resume=True, progress=False
    )
    assert result["step"] == 6 and not (folder.path / "earlier_2").exists()


def test_other_devices_go_on_at_the_same_place_of_the_data(
    settings: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    cfg = settings(TRAIN__epoch_iters="auto", TRAIN__num_epoch=1)
    train(cfg, [CPU], progress=False)  # 2 steps, each a batch of 2 of the 4 images
    more = settings(TRAIN__epoch_iters="auto", TRAIN__num_epoch=2, TRAIN__lr_encoder=0.01)
    trainer = trainer_of(more, [CPU, CPU], resume="auto")
    assert trainer.progress.epoch_iters == 1
    caplog.set_level("INFO", logger="mit_semseg")
    trainer.resume()
    assert (trainer.progress.step, trainer.progress.position) == (1, 2)
    assert "TRAIN.lr_encoder was 0.02, and is 0.01 now" in caplog.text
    assert "TRAIN.workers" not in caplog.text


def test_an_epoch_of_another_length_keeps_the_place(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = settings(TRAIN__epoch_iters=8, TRAIN__checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        signal_after(6, signal.SIGTERM, patch)
        train(long, [CPU], progress=False)
    folder = RunFolder(long.DIR)
    short = settings(TRAIN__epoch_iters=2)
    for _ in range(2):  # also when it is killed before it writes a state of its own
        trainer = trainer_of(short, resume="auto")
        trainer.resume()
        # 7 of 8 steps; what is left of the epoch is 1 of 2, not none.
        assert (trainer.progress.step, trainer.progress.position) == (1, 7)
        assert [file.name for file in folder.states()] == ["state_step_1.pth"]
    result = train(short, [CPU], resume="auto", progress=False)
    assert result["history"]["train"]["epoch"] == [1, 2]
    with pytest.raises(ValueError, match=r"in epoch 2, and TRAIN\.num_epoch is 1"):
        train(settings(TRAIN__epoch_iters=2, TRAIN__num_epoch=1), [CPU], resume="auto")


def test_resumed_optimizers_follow_the_configuration(
    settings: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    train(settings(), [CPU], progress=False)
    cfg = settings(TRAIN__num_epoch=3, TRAIN__weight_decay=0.5, TRAIN__beta1=0.5)
    trainer = trainer_of(cfg, resume="auto")
    trainer.resume()
    optimizer = trainer.parts.step.optimizer
    decayed, plain = optimizer.param_groups[:2]
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["momentum"]) == (0.5, 0.0, 0.5)
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    result = train(settings(TRAIN__num_epoch=3, TRAIN__optim="AdamW"), [CPU], resume="auto")
    assert result["step"] == 6 and "momentum starts afresh" in caplog.text


def test_a_state_with_two_optimizers_is_resumed_exactly(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    """Before, encoder and decoder had one each."""
    whole = settings(**ENET, TRAIN__lr_decoder=0.005, DIR=str(tmp_path / "whole"))
    train(whole, [CPU], progress=False)
    file = tmp_path / "whole" / "state_step_2.pth"
    state = torch.load(file, weights_only=True)
    trainer = trainer_of(settings(**ENET, DIR=str(tmp_path / "other")), resume=str(file))
    trainer.resume()
    state["optimizers"] = []
    step = trainer.parts.step
    for half in (step.module.encoder, step.module.decoder):
        of_half = torch.optim.SGD(parameter_groups(half, 1e-4), lr=0.02, momentum=0.9)
        of_half.state.update({p: step.optimizer.state[p] for p in half.parameters()})
        state["optimizers"].append(of_half.state_dict())
    del state["optimizer"], state["skipped"]
    old = tmp_path / "old.pth"
    torch.save(state, old)
    resumed = settings(**ENET, TRAIN__lr_decoder=0.005)
    train(resumed, [CPU], resume=str(old), progress=False)
    assert_same_weights(whole, resumed, "epoch_2.pth")


def test_a_run_resumed_in_another_layout_goes_on_alike(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**ENET, "TRAIN__ema": 0.9}
    whole = settings(**options, TRAIN__channels_last=False, DIR=str(tmp_path / "whole"))
    train(whole, [CPU], progress=False)
    state = str(tmp_path / "whole" / "state_step_2.pth")
    resumed = settings(**options, TRAIN__channels_last=True)
    train(resumed, [CPU], resume=state, progress=False)
    # Convolutions of other layouts round differently, and BatchNorm of a few values enlarges that.
    expected, got = weights(whole, "epoch_2.pth"), weights(resumed, "epoch_2.pth")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_best_weights_stay_those_of_the_history(settings: Callable[..., Config]) -> None:
    cfg = settings(TRAIN__num_epoch=4, TRAIN__eval_epochs=1)
    scores = train(cfg, [CPU], progress=False)["history"]["val"]["mean_iou"]
    folder = RunFolder(cfg.DIR)
    best = 1 + scores.index(max(scores))
    back = settings(TRAIN__num_epoch=4, TRAIN__eval_epochs=1, TRAIN__start_epoch=best - 1 or 1)
    trainer_of(back).resume()
    aside = folder.path / "earlier_1"
    assert (aside / "metrics.jsonl").is_file()
    if best > 1:
        assert (aside / "encoder_best.pth").is_file()
        earlier = 1 + scores.index(max(scores[: best - 1]))
        assert_same_weights(settings(DIR=str(folder.path)), cfg, f"epoch_{earlier}.pth")
        old = torch.load(folder.path / "encoder_best.pth", weights_only=True)
        new = torch.load(folder.path / f"encoder_epoch_{earlier}.pth", weights_only=True)
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_resumed_run_needs_no_initial_weights(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    train(settings(TRAIN__num_epoch=1), [CPU], progress=False)
    source = tmp_path / "backbone.pth"
    shutil.copyfile(Path(settings().DIR) / "encoder_epoch_1.pth", source)
    begun = settings(TRAIN__num_epoch=1, MODEL__weights_encoder=str(source))
    train(begun, [CPU], progress=False)
    source.unlink()
    more = settings(TRAIN__num_epoch=2, MODEL__weights_encoder=str(source))
    assert train(more, [CPU], resume="auto", progress=False)["step"] == 4
    with pytest.raises(FileNotFoundError, match=r"backbone\.pth"):
        train(more, [CPU], progress=False)


def test_weights_that_are_not_finite_replace_no_state(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = TrainStep.finish

    def spoil(self: TrainStep, progress: Progress, **flags: bool) -> StepResult:
        done = finish(self, progress, **flags)
        if progress.step == 3:
            with torch.no_grad():
                next(self.module.parameters()).fill_(torch.nan)
        return done

    monkeypatch.setattr(TrainStep, "finish", spoil)
    cfg = settings()
    with pytest.raises(FloatingPointError, match="after step 4 the weights are not finite"):
        train(cfg, [CPU], progress=False)
    assert [file.name for file in RunFolder(cfg.DIR).states()] == ["state_step_2.pth"]


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_gradients_that_are_not_finite_spoil_nothing(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, on_nan: str
) -> None:
    clip = nn.utils.clip_grad_norm_
    calls = []

    def overflow(parameters: Any, limit: float) -> torch.Tensor:
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 2:
            parameters[0].grad.fill_(torch.inf)
        return clip(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", overflow)
    cfg = settings(TRAIN__clip_grad=1.0, TRAIN__on_nan=on_nan)
    if on_nan == "stop":
        with pytest.raises(FloatingPointError, match="the gradients of step 2 are not finite"):
            train(cfg, [CPU], progress=False)
        return
    train(cfg, [CPU], progress=False)
    assert all(torch.isfinite(x).all() for x in weights(cfg, "epoch_2.pth").values())


def with_infinite_gradients(trainer: Trainer, half: str, steps: int) -> Trainer:
    """fp16 needs a GPU; what happens when it cannot hold the gradients of one half does not."""
    parameter = list(getattr(trainer.parts.step.module, half).parameters())[-1]
    parameter.register_hook(lambda g: g * torch.inf if trainer.progress.step < steps else g)
    return with_scaler(trainer, torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_step_that_fp16_cannot_hold_leaves_no_trace(
    settings: Callable[..., Config], caplog: pytest.LogCaptureFixture, half: str, clip_grad: float
) -> None:
    options: dict[str, Any] = {"TRAIN__clip_grad": clip_grad, "TRAIN__ema": 0.9}
    cfg = settings(**ENET, **options, TRAIN__epoch_iters=1, TRAIN__num_epoch=1)
    trainer = with_infinite_gradients(trainer_of(cfg), half, steps=1)
    module = trainer.parts.step.module
    before = copy.deepcopy(module.state_dict())
    trainer.fit()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    state = state_of(cfg)
    assert state["skipped"] == 1 and not state["optimizer"]["state"]
    assert state["average"]["n_averaged"] == 0
    (line,) = [x.message for x in caplog.records if "cannot hold" in x.message]
    assert line.startswith("fp16 cannot hold the gradients of step 1 at a loss scale of 65536: ")
    assert "(1 so far)" in line and "the scale is 32768 now" in line
    (figures,) = (Path(cfg.DIR) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(figures)["skipped"] == 1

    # The next step is the first one of the optimizer.
    more = settings(**ENET, **options, TRAIN__epoch_iters=1, TRAIN__num_epoch=2)
    trainer = with_infinite_gradients(trainer_of(more, resume="auto"), half, steps=0)
    trainer.fit()
    progress, module = trainer.progress, trainer.parts.step.module
    assert (progress.skipped, progress.skipped_in_a_row, progress.step) == (1, 0, 2)
    moved = [float((p.detach() - before[n]).abs().max()) for n, p in module.named_parameters()]
    assert 0 < max(moved) < 1, "momentum of nothing is 0"


def test_fp16_that_never_holds_the_gradients_has_an_end(settings: Callable[..., Config]) -> None:
    cfg = settings(**ENET, TRAIN__on_nan="skip", TRAIN__epoch_iters=9)
    trainer = with_infinite_gradients(trainer_of(cfg), "encoder", steps=9)
    trainer.progress.skipped_in_a_row = 18
    with pytest.raises(
        FloatingPointError,
        match=r"^fp16 cannot hold the gradients of step 3 at a loss scale of 16384, after 20 "
        r"skipped steps; lower TRAIN\.lr_encoder .* or train with TRAIN\.precision bf16 or fp32$",
    ):
        trainer.fit()
    assert trainer.progress.skipped == 2


def test_a_job_that_comes_back_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings()
    start = settings(DIR=settings().DIR + "_start", TRAIN__num_epoch=1)
    train(start, [CPU], progress=False)
    first = str(Path(start.DIR) / "state_step_2.pth")
    with monkeypatch.context() as patch:
        signal_after(2, signal.SIGTERM, patch)
        train(cfg, [CPU], resume=first, job="job 7", progress=False)
    assert state_of(cfg)["step"] == 3
    # Restarted with the same command it is not thrown back to where the command says.
    trainer = trainer_of(cfg, resume=first, job="job 7")
    trainer.resume()
    assert trainer.progress.step == 3
    trainer.fit()
    other = trainer_of(cfg, job="job 7")  # completed: a new one starts anew
    other.resume()
    assert other.progress.step == 0 and (Path(cfg.DIR) / "earlier_1").is_dir()


def test_a_state_of_another_network_is_refused(settings: Callable[..., Config]) -> None:
    train(settings(TRAIN__num_epoch=1), [CPU], progress=False)
    other = settings(MODEL__arch_decoder="ppm_deepsup")
    with pytest.raises(ValueError, match=r"state_step_2\.pth does not fit this run"):
        train(other, [CPU], resume="auto", progress=False)


def test_a_batch_without_a_finite_loss_is_saved_for_replay(
    settings: Callable[..., Config],
) -> None:
    cfg = settings(TRAIN__lr_encoder=1e30, TRAIN__lr_decoder=1e30, TRAIN__epoch_iters=5)
    with pytest.raises(FloatingPointError, match=r"step \d .*saved as .*nonfinite_step_\d\.pth"):
        train(cfg, [CPU], progress=False)
    (file,) = Path(cfg.DIR).glob("nonfinite_step_*.pth")
    saved = torch.load(file, weights_only=True)
    assert len(saved["files"]) == 2 and saved["batch"][0]["img_data"].dtype == torch.uint8
    module = ModelBuilder.from_config(cfg, inference=False)
    module.encoder.load_state_dict(saved["encoder"])
    module.decoder.load_state_dict(saved["decoder"])
    assert not torch.isfinite(module.train()(saved["batch"][0])[0])


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the network see NaN at these steps, which also gets into its running statistics."""
    forward = SegmentationModule.forward
    seen = []

    def forward_some(self: SegmentationModule, feed_dict: Any, segSize: Any = None) -> Any:
        seen.append(1)
        if len(seen) - 1 in steps:
            images = torch.full(feed_dict["img_data"].shape, torch.nan)
            feed_dict = {"img_data": images, "seg_label": feed_dict["seg_label"]}
        return forward(self, feed_dict, segSize)

    monkeypatch.setattr(SegmentationModule, "forward", forward_some)


def test_a_skipped_step_leaves_no_trace(
    settings: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    common = {**ENET, "TRAIN__epoch_iters": 3, "TRAIN__num_epoch": 1}
    cfg = settings(**common, TRAIN__on_nan="skip")
    poison(monkeypatch, {2})
    train(cfg, [CPU], progress=False)
    assert "the loss of step 3 is nan" in caplog.text and "the step is skipped" in caplog.text
    monkeypatch.undo()
    # The first two steps of the same schedule, and nothing else.
    short = settings(**common, DIR=settings().DIR + "_short")
    with monkeypatch.context() as patch:
        signal_after(1, signal.SIGTERM, patch)
        train(short, [CPU], progress=False)
    skipped, never = state_of(cfg), state_of(short)
    for key in ("encoder", "decoder"):
        for name, tensor in never[key].items():
            assert torch.equal(tensor, skipped[key][name]), name


def test_skipping_has_an_end(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(TRAIN__on_nan="skip", TRAIN__epoch_iters=30)
    poison(monkeypatch, set(range(100)))
    with pytest.raises(FloatingPointError, match=r"step 21 is nan.*after 20 skipped steps"):
        train(cfg, [CPU], progress=False)
    assert len(list(Path(cfg.DIR).glob("nonfinite_*.pth"))) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_stop_a_training_or_are_replaced(
    settings: Callable[..., Config], caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    cfg = settings(TRAIN__workers=workers, DATASET__on_error="skip", TRAIN__class_weights="median")
    root = Path(cfg.DATASET.root_dataset)
    for bad in (root / "img" / "part0" / "2.png", root / "ann" / "part1" / "3.png"):
        bad.write_bytes(bad.read_bytes()[:60])
    result = train(cfg, [CPU], progress=False)
    assert result["step"] == 4
    assert "img/part0/2.png" in caplog.text and "another sample taken instead" in caplog.text
    assert "not counted for TRAIN.class_weights" in caplog.text
    cfg.DATASET.on_error = "stop"
    with pytest.raises(ValueError, match=r"[23]\.png"):
        train(cfg, [CPU], progress=False)


def test_a_loader_that_dies_while_it_hands_over_a_batch_is_named(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half batch is noticed before the death."""
    get, here = MultiprocessingQueue.get, os.getpid()

    def half(self: MultiprocessingQueue, *args: Any, **options: Any) -> Any:
        if os.getpid() != here:
            return get(self, *args, **options)
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.3, worker.kill).start()
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(MultiprocessingQueue, "get", half)
    with pytest.raises(ChildProcessError, match="ended with signal SIGKILL"):
        train(settings(TRAIN__workers=1), [CPU], progress=False)


def test_a_loader_that_dies_or_hangs_is_named(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    item = TrainDataset.__getitem__

    def hurt(how: Callable[[], None]) -> None:
        def getitem(self: TrainDataset, index: int) -> dict[str, Any]:
            if index == 2:
                with READINGS.of("img/part0/7.png"):
                    how()
            return item(self, index)

        monkeypatch.setattr(TrainDataset, "__getitem__", getitem)

    hurt(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match=r"SIGKILL while reading img/part0/7\.png.*resume"):
        train(settings(TRAIN__workers=1), [CPU], progress=False)
    hurt(lambda: time.sleep(60))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no batch for 1 s.*img/part0/7\.png"):
        train(settings(TRAIN__workers=1, TRAIN__stall_seconds=1), [CPU], progress=False)
    assert time.monotonic() - began < 20
    assert not multiprocessing.active_children()


def test_an_exception_in_a_replica_ends_the_run_at_once(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other replica waits for it in a synchronised layer, and batches are being loaded."""
    forward = SegmentationModule.forward
    began: list[float] = []

    def break_one(self: SegmentationModule, *args: Any, **options: Any) -> Any:
        if threading.current_thread().name == "replica-1":
            began.append(time.monotonic())
            if len(began) == 2:
                raise OSError("no such pixel")
        return forward(self, *args, **options)

    monkeypatch.setattr(SegmentationModule, "forward", break_one)
    cfg = settings(TRAIN__workers=1, TRAIN__epoch_iters=20, TRAIN__stall_seconds=30)
    # What was caught is kept: a traceback must not keep processes alive.
    with pytest.raises(OSError, match="^no such pixel") as caught:
        train(cfg, [CPU, CPU], progress=False)
    assert len(began) == 2 and time.monotonic() - began[1] < 10
    left = multiprocessing.active_children()
    for process in left:  # which would keep the tests from ending
        process.kill()
    assert not left
    assert caught.value.__traceback__ is not None


def test_a_loader_names_the_batch_that_is_waited_for(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build(settings(), [CPU]).loader(first=0, micro_steps=4)
    heard: list[list[str]] = []
    item = TrainDataset.__getitem__

    def getitem(self: TrainDataset, index: int) -> dict[str, Any]:
        heard.append(loader.files())
        with READINGS.of("a.png"):
            heard.append(loader.files())
        return item(self, index)

    monkeypatch.setattr(TrainDataset, "__getitem__", getitem)
    next(iter(loader))
    assert heard == [loader.data.files(0), ["a.png"]]
    assert loader.files() == [], "a batch is computed, and nothing is read"
    loader.close()


# ------------------------------------------------------------------------------ waiting
def test_a_step_of_a_run_waits_once(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_step.py` says when; here it is that nothing around the step waits, either."""
    options = {"TRAIN__ema": 0.9, "TRAIN__clip_grad": 1.0, "TRAIN__accumulate": 2}
    take_step = Trainer._step
    found: list[list[str]] = []

    def counted(self: Trainer, *args: Any) -> StepResult:
        with reads_of(self.parts.step.module, monkeypatch) as reads:
            result = take_step(self, *args)
        found.append(reads.found)
        return result

    monkeypatch.setattr(Trainer, "_step", counted)
    # Samples are made in another process.
    train(settings(**ENET, **options, TRAIN__workers=1), [CPU], progress=False)
    assert found == [["tolist"]] * 4


# ------------------------------------------------------------------------------ on a GPU
GPU = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("encoder", "decoder", "fc_dim"),
    [("resnet18dilated", "ppm_deepsup", 512), ("mobilenetv2dilated", "c1_deepsup", 320)],
)
def test_a_gpu_is_waited_for_once_a_step(
    settings: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    encoder: str,
    decoder: str,
    fc_dim: int,
) -> None:
    network = {"arch_encoder": encoder, "arch_decoder": decoder, "fc_dim": fc_dim}
    options = {"ema": 0.9, "clip_grad": 1.0, "accumulate": 2, "precision": precision}
    changes = {f"MODEL__{key}": value for key, value in network.items()}
    changes |= {f"TRAIN__{key}": value for key, value in options.items()}
    take_step = Trainer._step
    found: list[list[str]] = []

    def counted(self: Trainer, *args: Any) -> StepResult:
        with gpu_waits() as said:
            result = take_step(self, *args)
        found.append(said)
        return result

    monkeypatch.setattr(Trainer, "_step", counted)
    train(settings(**changes, TRAIN__epoch_iters=4, TRAIN__workers=1), [GPU], progress=False)
    # The first steps may set up libraries.
    assert [len(said) for said in found[2:]] == [1] * (len(found) - 2), found


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["SGD", "AdamW"])
@pytest.mark.parametrize("layouts", [(True, False), (False, True)])
@pytest.mark.parametrize("devices", [(CPU, GPU), (GPU, CPU), (GPU, GPU)])
def test_a_run_resumes_on_another_device_and_in_another_layout(
    settings: Callable[..., Config],
    tmp_path: Path,
    devices: tuple[torch.device, torch.device],
    layouts: tuple[bool, bool],
    optim: str,
) -> None:
    options: dict[str, Any] = {**ENET, "TRAIN__ema": 0.9, "TRAIN__optim": optim}
    first, second = (
        settings(**options, TRAIN__channels_last=layout, DIR=str(tmp_path / name))
        for layout, name in zip(layouts, ("first", "second"))
    )
    train(first, [devices[0]], progress=False)
    file = str(tmp_path / "first" / "state_step_2.pth")
    saved = torch.load(file, map_location="cpu", weights_only=True)
    trainer = trainer_of(second, [devices[1]], resume=file)
    trainer.resume()
    step = trainer.parts.step
    assert step.average is not None
    for half in ("encoder", "decoder"):
        for key, value in getattr(step.module, half).state_dict().items():
            assert torch.equal(value.cpu(), saved[half][key]), key
    for key, value in step.average.state_dict().items():
        assert torch.equal(value.cpu(), saved["average"][key]), key
    parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in step.optimizer.state[parameter].items():
            assert torch.equal(value.cpu(), saved["optimizer"]["state"][number][name].cpu())
            if value.shape == parameter.shape:
                assert value.device == parameter.device and value.stride() == parameter.stride()
    assert train(second, [devices[1]], resume=file, progress=False)["step"] == 4
    assert all(torch.isfinite(x).all() for x in weights(second, "epoch_2.pth").values())


@pytest.mark.gpu
def test_a_loader_that_is_killed_under_pinned_memory_is_named(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches come through a thread that pins them, which must not hide the death."""
    item = TrainDataset.__getitem__

    def die(self: TrainDataset, index: int) -> dict[str, Any]:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, index)

    monkeypatch.setattr(TrainDataset, "__getitem__", die)
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"ended with signal SIGKILL .*resume auto"):
        train(settings(TRAIN__workers=1, TRAIN__epoch_iters=9), [GPU], progress=False)
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()
