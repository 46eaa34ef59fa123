"""What goes wrong in a training: non-finite numbers, bad files, loaders and replicas that die."""

import copy
import json
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.queues import Queue as MultiprocessingQueue
from pathlib import Path

import pytest
import torch
from small_runs import CPU, state_of, trainer_of, weights
from torch import nn

from mit_semseg.cli import main
from mit_semseg.config import dump_config
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.reading import READINGS
from mit_semseg.engine.train import train
from mit_semseg.engine.training.build import build
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.step import TrainStep
from mit_semseg.models import ModelBuilder, SegmentationModule

GPU = torch.device("cuda", 0)


# ------------------------------------------------------------------------------ non-finite numbers
def test_a_batch_with_a_non_finite_loss_is_named_and_saved_for_replay(settings):
    cfg = settings(TRAIN__lr_encoder=1e30, TRAIN__lr_decoder=1e30, TRAIN__epoch_iters=5)
    message = r"step \d .*img/part\d/\d\.png.*saved as .*nonfinite_step_\d\.pth.*TRAIN\.lr_encoder"
    with pytest.raises(FloatingPointError, match=message):
        train(cfg, [CPU], progress=False)
    (file,) = Path(cfg.DIR).glob("nonfinite_step_*.pth")
    saved = torch.load(file, weights_only=True)
    assert len(saved["files"]) == 2 and saved["batch"][0]["img_data"].dtype == torch.uint8
    module = ModelBuilder.from_config(cfg, inference=False)
    module.encoder.load_state_dict(saved["encoder"])
    module.decoder.load_state_dict(saved["decoder"])
    assert not torch.isfinite(module.train()(saved["batch"][0])[0])


def test_skipping_steps_has_an_end(settings, monkeypatch):
    forward = SegmentationModule.forward

    def poisoned(self, feed_dict, segSize=None):
        images = torch.full(feed_dict["img_data"].shape, torch.nan)
        return forward(self, {**feed_dict, "img_data": images}, segSize)

    monkeypatch.setattr(SegmentationModule, "forward", poisoned)
    cfg = settings(TRAIN__on_nan="skip", TRAIN__epoch_iters=30)
    with pytest.raises(FloatingPointError, match=r"step 21 is nan.*after 20 skipped steps"):
        train(cfg, [CPU], progress=False)
    assert len(list(Path(cfg.DIR).glob("nonfinite_*.pth"))) == 3


def test_non_finite_weights_replace_no_state(settings, monkeypatch):
    finish = TrainStep.finish

    def spoil(self, progress, **flags):
        done = finish(self, progress, **flags)
        if progress.step == 3:
            next(self.module.parameters()).data.fill_(torch.nan)
        return done

    monkeypatch.setattr(TrainStep, "finish", spoil)
    cfg = settings()
    with pytest.raises(FloatingPointError, match="non-finite weights after step 4"):
        train(cfg, [CPU], progress=False)
    assert [file.name for file in RunFolder(cfg.DIR).states()] == ["state_step_2.pth"]


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_non_finite_gradients_stop_or_are_skipped(settings, monkeypatch, on_nan):
    clip, calls = nn.utils.clip_grad_norm_, []

    def overflow(parameters, limit):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 2:
            parameters[0].grad.fill_(torch.inf)
        return clip(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", overflow)
    cfg = settings(TRAIN__clip_grad=1.0, TRAIN__on_nan=on_nan)
    if on_nan == "stop":
        with pytest.raises(FloatingPointError, match="the gradients of step 2 are non-finite"):
            train(cfg, [CPU], progress=False)
    else:
        train(cfg, [CPU], progress=False)
        assert all(torch.isfinite(x).all() for x in weights(cfg, "epoch_2.pth").values())


def with_infinite_gradients(trainer, half, steps):
    """fp16 needs a GPU; the handling of an overflow does not."""
    parameter = list(getattr(trainer.parts.step.module, half).parameters())[-1]
    parameter.register_hook(lambda g: g * torch.inf if trainer.progress.step < steps else g)
    trainer.parts.step.scaler = torch.amp.GradScaler("cpu")
    trainer.parts.state.register("scaler", trainer.parts.step.scaler)
    return trainer


@pytest.mark.parametrize(("half", "clip_grad"), [("encoder", 0.0), ("decoder", 1.0)])
def test_a_step_that_overflows_fp16_leaves_no_trace(settings, caplog, half, clip_grad):
    options = {"TRAIN__clip_grad": clip_grad, "TRAIN__ema": 0.9, "TRAIN__epoch_iters": 1}
    cfg = settings(**options, TRAIN__num_epoch=1)
    trainer = with_infinite_gradients(trainer_of(cfg), half, steps=1)
    module = trainer.parts.step.module
    before = copy.deepcopy(module.state_dict())
    trainer.fit()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    state = state_of(cfg)
    assert state["skipped"] == 1 and not state["optimizer"]["state"]
    assert state["average"]["n_averaged"] == 0
    (line,) = [x.message for x in caplog.records if "overflow" in x.message]
    assert line.startswith("the fp16 gradients of step 1 overflow at a loss scale of 65536: ")
    assert "(1 so far)" in line and "the scale is now 32768" in line
    (figures,) = (Path(cfg.DIR) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(figures)["skipped"] == 1

    # The next step is the first one of the optimizer.
    trainer = with_infinite_gradients(trainer_of(settings(**options), resume="auto"), half, 0)
    trainer.fit()
    progress, module = trainer.progress, trainer.parts.step.module
    assert (progress.skipped, progress.skipped_in_a_row, progress.step) == (1, 0, 2)
    moved = [float((p.detach() - before[n]).abs().max()) for n, p in module.named_parameters()]
    assert 0 < max(moved) < 1, "momentum of nothing is 0"


def test_overflowing_fp16_has_an_end(settings):
    cfg = settings(TRAIN__on_nan="skip", TRAIN__epoch_iters=9)
    trainer = with_infinite_gradients(trainer_of(cfg), "encoder", steps=9)
    trainer.progress.skipped_in_a_row = 18
    message = (
        r"^the fp16 gradients of step 3 overflow at a loss scale of 16384, after 20 "
        r"skipped steps; lower TRAIN\.lr_encoder .* or train with TRAIN\.precision bf16 or fp32$"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit()
    assert trainer.progress.skipped == 2


# ------------------------------------------------------------------------------ loading
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_stop_a_training_or_are_replaced(settings, caplog, workers):
    cfg = settings(TRAIN__workers=workers, DATASET__on_error="skip", TRAIN__class_weights="median")
    root = Path(cfg.DATASET.root_dataset)
    for bad in (root / "img" / "part0" / "2.png", root / "ann" / "part1" / "3.png"):
        bad.write_bytes(bad.read_bytes()[:60])
    assert train(cfg, [CPU], progress=False)["step"] == 4
    assert "img/part0/2.png" in caplog.text and "replaced by another sample" in caplog.text
    assert "skipped for TRAIN.class_weights" in caplog.text
    cfg.DATASET.on_error = "stop"
    with pytest.raises(ValueError, match=r"[23]\.png"):
        train(cfg, [CPU], progress=False)


def hurt(monkeypatch, how):
    """Call `how` in the loading process while it reads for the third sample."""
    item = TrainDataset.__getitem__

    def getitem(self, index):
        if index == 2:
            with READINGS.of("img/part0/7.png"):
                how()
        return item(self, index)

    monkeypatch.setattr(TrainDataset, "__getitem__", getitem)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (die, ChildProcessError, r"SIGKILL while reading img/part0/7\.png.*resume"),
        (lambda: time.sleep(60), TimeoutError, r"no batch for 1 s.*img/part0/7\.png"),
    ],
    ids=["dies", "hangs"],
)
def test_a_loader_that_dies_or_hangs_is_named(settings, monkeypatch, how, error, message):
    hurt(monkeypatch, how)
    began = time.monotonic()
    with pytest.raises(error, match=message):
        train(settings(TRAIN__workers=1, TRAIN__stall_seconds=1), [CPU], progress=False)
    assert time.monotonic() - began < 20
    assert not multiprocessing.active_children()


@pytest.mark.gpu
def test_a_loader_killed_under_pinned_memory_is_named(settings, monkeypatch):
    """Batches come through a thread that pins them, which must not hide the death."""
    hurt(monkeypatch, die)
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"died with signal SIGKILL .*resume auto"):
        train(settings(TRAIN__workers=1, TRAIN__epoch_iters=9), [GPU], progress=False)
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()


def test_a_loader_that_dies_while_it_sends_a_batch_is_named(settings, monkeypatch):
    """The half batch is noticed before the death."""
    get, here = MultiprocessingQueue.get, os.getpid()

    def half(self, *args, **options):
        if os.getpid() != here:
            return get(self, *args, **options)
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.3, worker.kill).start()
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(MultiprocessingQueue, "get", half)
    with pytest.raises(ChildProcessError, match="died with signal SIGKILL"):
        train(settings(TRAIN__workers=1), [CPU], progress=False)


def test_a_loader_names_the_files_that_are_read(settings, monkeypatch):
    loader = build(settings(), [CPU]).loader(first=0, micro_steps=4)
    heard, item = [], TrainDataset.__getitem__

    def getitem(self, index):
        heard.append(loader.files())
        with READINGS.of("a.png"):
            heard.append(loader.files())
        return item(self, index)

    monkeypatch.setattr(TrainDataset, "__getitem__", getitem)
    next(iter(loader))
    assert heard == [loader.data.files(0), ["a.png"]]
    assert loader.files() == [], "a batch is computed, and nothing is read"
    loader.close()


# ------------------------------------------------------------------------------ replicas
def test_an_exception_in_a_replica_ends_the_run_at_once(settings, monkeypatch):
    """The other replica waits for it in a synchronised layer, and batches are being loaded."""
    forward, began = SegmentationModule.forward, []

    def break_one(self, *args, **options):
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
    assert not left and caught.value.__traceback__ is not None


# ------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("device", ["cpu", pytest.param("0", marks=pytest.mark.gpu)])
def test_a_training_without_memory_ends_in_one_line(
    settings, tmp_path, monkeypatch, make_images, capfd, device
):
    def forward(self, *args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    network = {"MODEL__arch_encoder": "resnet18dilated", "MODEL__fc_dim": 512}
    size = {"TRAIN__batch_size_per_gpu": 8, "DATASET__imgSizes": [600]}
    cfg = settings(**network, **size, TRAIN__precision="fp32")
    if device == "cpu":  # what the allocator says, in the place of a step
        cfg.DATASET.imgSizes = [48]
        monkeypatch.setattr(SegmentationModule, "forward", forward)
    else:
        make_images(Path(cfg.DATASET.root_dataset), [(600, 800)] * 4)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((512 << 20) / total)
    dump_config(cfg, tmp_path / "job.yaml")
    code = main(["train", "--gpus", device, "--cfg", str(tmp_path / "job.yaml")])
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(1.0)
    output = capfd.readouterr().err
    (error,) = [line for line in output.splitlines() if "error:" in line]
    assert code == 2 and "Traceback" not in output
    assert error.startswith("error: CUDA out of memory. Tried to allocate")
    assert "lower TRAIN.batch_size_per_gpu (and raise TRAIN.accumulate)" in error
    assert "TRAIN.precision bf16" in error
