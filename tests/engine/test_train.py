"""Training: it learns, it computes the same in every way, and it refuses what it cannot use."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from reads import gpu_waits, reads_of
from small_runs import CPU, DROPOUT, trainer_of, weights

from mit_semseg.engine.train import train
from mit_semseg.engine.training import metrics_log
from mit_semseg.engine.training.build import build
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.loader import RankSampler
from mit_semseg.engine.training.trainer import Trainer
from mit_semseg.models import ModelBuilder
from mit_semseg.visualize import charts

GPU = torch.device("cuda", 0)


def test_learns_and_leaves_a_whole_folder(settings, monkeypatch):
    monkeypatch.setattr(metrics_log, "curves", charts.curves)
    cfg = settings(
        TRAIN__num_epoch=8,
        TRAIN__epoch_iters=5,
        TRAIN__optim="AdamW",
        TRAIN__lr_encoder=0.02,
        TRAIN__lr_decoder=0.02,
        TRAIN__eval_epochs=4,
        TRAIN__keep=2,
    )
    result = train(cfg, [CPU], progress=False)
    losses = result["history"]["train"]["loss"]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    # Chance is 0.14 on four classes; the images are their masks in grey with noise.
    assert result["best_mean_iou"] > 0.5
    folder = RunFolder(cfg.DIR)
    assert folder.names() == ["epoch_7.pth", "epoch_8.pth", "best.pth"]
    assert folder.config().TRAIN.optim == "AdamW" and len(folder.classes().names) == 4
    names = {p.name for p in folder.path.iterdir()}
    assert {"history_epoch_8.pth", "state_step_40.pth", "metrics.jsonl"} <= names
    assert {name for name in names if name.startswith(".")} == {".lock"}, "no temporary file stays"
    Image.open(folder.path / "curves.png").verify()
    lines = [json.loads(x) for x in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines if x["kind"] == "val"] == [4, 8]
    assert len([x for x in lines if x["kind"] == "train"]) == 40
    history = torch.load(folder.path / "history_epoch_8.pth", weights_only=True)
    assert history["train"]["loss"] == losses  # the published layout


def test_a_validation_that_predicts_one_class_warns(settings, tmp_path, caplog):
    plain = settings(TRAIN__num_epoch=1, TRAIN__eval_epochs=1, TRAIN__lr_decoder=0)
    decoder = ModelBuilder.from_config(plain).decoder
    decoder.conv_last.bias.data[2] = 1e4
    torch.save(decoder.state_dict(), tmp_path / "decoder.pth")
    plain.MODEL.weights_decoder = str(tmp_path / "decoder.pth")
    train(plain, [CPU], progress=False)
    (output,) = [x.getMessage() for x in caplog.records if "predicted" in x.getMessage()]
    assert output.startswith("epoch 1: all pixels of all images are predicted as class 2: check")


def test_memory_is_free_after_training(settings, monkeypatch):
    living = []
    fit = Trainer.fit

    def watched(self):
        living.extend([weakref.ref(self), weakref.ref(self.parts.step.module)])
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", watched)
    gc.collect()
    gc.disable()  # it must go without the collector, whose next full pass may be hours away
    try:
        train(settings(TRAIN__eval_epochs=1, TRAIN__workers=1), [CPU], progress=False)
        assert [one() for one in living] == [None, None]
    finally:
        gc.enable()


# ------------------------------------------------------------------------------ equal trainings
FIXED = {"TRAIN__fix_bn": True}


@pytest.mark.parametrize(
    ("common", "one", "other", "devices", "rel"),
    [
        # All four images in each step, by two replicas of two.
        ({}, {"TRAIN__batch_size_per_gpu": 4}, {}, 2, 1e-3),
        # BatchNorm sees smaller batches, so it is fixed; labels are all valid, so means agree.
        (FIXED, {"TRAIN__batch_size_per_gpu": 4}, {"TRAIN__accumulate": 2}, 1, 1e-4),
        ({}, {"TRAIN__precision": "fp32"}, {"TRAIN__precision": "bf16"}, 1, 0.05),
    ],
    ids=["replicas", "accumulation", "bfloat16"],
)
def test_trainings_have_equal_losses(settings, common, one, other, devices, rel):
    first, second = settings("one", **common, **one), settings("other", **common, **other)
    expected = train(first, [CPU], progress=False)["history"]["train"]["loss"]
    losses = train(second, [CPU] * devices, progress=False)["history"]["train"]["loss"]
    assert losses == pytest.approx(expected, rel=rel)
    assert losses[1] < 0.99 * losses[0], "the second step must see what the first learnt"
    means = [v for k, v in weights(second, "epoch_2.pth").items() if k.endswith("running_mean")]
    assert means and all((not mean.any()) == bool(common) for mean in means)


@pytest.mark.parametrize("devices", [1, 2])
def test_activation_checkpointing_trains_the_same(settings, devices):
    runs = []
    for again in (False, True):
        cfg = settings(
            str(again),
            TRAIN__activation_checkpointing=again,
            TRAIN__ema=0.9,
            TRAIN__precision="bf16",
        )
        train(cfg, [CPU] * devices, progress=False)
        runs.append(weights(cfg, "epoch_2.pth"))
    limits = {"rtol": 0, "atol": 0} if devices == 1 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(runs[1], runs[0], **limits)  # replicas add up in any order
    counts = [int(v) for k, v in runs[1].items() if k.endswith("num_batches_tracked")]
    assert set(counts) == {4}


def test_auto_epoch_is_one_pass(settings):
    cfg = settings(TRAIN__epoch_iters="auto")
    assert [build(cfg, [CPU] * n).progress.epoch_iters for n in (1, 2)] == [2, 1]


def test_rank_sampler_partitions_the_stream():
    def taken(devices, rank, world):
        return list(RankSampler(world * devices, 2, devices, rank, world))

    assert taken(2, 0, 1) == [2, 3, 4, 5]
    assert (taken(1, 0, 2), taken(1, 1, 2)) == ([2, 4], [3, 5])
    everything = [i for rank in range(3) for i in taken(2, rank, 3)]
    assert sorted(everything) == list(range(6, 18))


# ------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TRAIN__start_epoch": 3}, r"start_epoch 3 is greater than TRAIN\.num_epoch 2"),
        ({"DATASET__num_class": 3}, r"\.png: label 3 is outside 0\.\.2"),
        ({"DATASET__list_val": "odd.odgt", "TRAIN__eval_epochs": 1}, r"odd_mask\.png: label 77"),
    ],
)
def test_refused_before_the_first_step(settings, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("odd.png")
    Image.new("L", (8, 8), 77).save("odd_mask.png")
    record = {"fpath_img": str(tmp_path / "odd.png"), "fpath_segm": str(tmp_path / "odd_mask.png")}
    Path("odd.odgt").write_text(json.dumps(record))
    cfg = settings(**changes)
    with pytest.raises(ValueError, match=message):
        train(cfg, [CPU], progress=False)
    assert not list(Path(cfg.DIR).glob("*.pth"))


# ------------------------------------------------------------------------------ waiting
def counted(monkeypatch, watch):
    """What `watch(module)` finds in every step of the trainings that follow."""
    take_step, found = Trainer._step, []

    def step(self, *args):
        with watch(self.parts.step.module) as reads:
            result = take_step(self, *args)
        found.append(reads)
        return result

    monkeypatch.setattr(Trainer, "_step", step)
    return found


WAITING = {"TRAIN__ema": 0.9, "TRAIN__clip_grad": 1.0, "TRAIN__accumulate": 2, "TRAIN__workers": 1}


def test_a_step_waits_once(settings, monkeypatch):
    """`test_step.py` says when; here it is that nothing around the step waits, either."""
    found = counted(monkeypatch, lambda module: reads_of(module, monkeypatch))
    train(settings(**DROPOUT, **WAITING), [CPU], progress=False)
    assert [reads.found for reads in found] == [["tolist"]] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("encoder", "decoder", "fc_dim"),
    [("resnet18dilated", "ppm_deepsup", 512), ("mobilenetv2dilated", "c1_deepsup", 320)],
)
def test_a_gpu_is_waited_for_once_a_step(
    settings, monkeypatch, precision, encoder, decoder, fc_dim
):
    changes = {"MODEL__arch_encoder": encoder, "MODEL__arch_decoder": decoder}
    changes |= {"MODEL__fc_dim": fc_dim, "TRAIN__precision": precision, "TRAIN__epoch_iters": 4}
    found = counted(monkeypatch, lambda module: gpu_waits())
    train(settings(**WAITING, **changes), [GPU], progress=False)
    # The first steps may set up libraries.
    assert [len(waits) for waits in found[2:]] == [1] * (len(found) - 2), found


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["SGD", "AdamW"])
@pytest.mark.parametrize("layouts", [(True, False), (False, True)])
@pytest.mark.parametrize("devices", [(CPU, GPU), (GPU, CPU), (GPU, GPU)])
def test_a_run_resumes_on_another_device_and_in_another_layout(settings, devices, layouts, optim):
    first, second = (
        settings(name, **DROPOUT, TRAIN__ema=0.9, TRAIN__optim=optim, TRAIN__channels_last=layout)
        for layout, name in zip(layouts, ("first", "second"))
    )
    train(first, [devices[0]], progress=False)
    file = f"{first.DIR}/state_step_2.pth"
    saved = torch.load(file, map_location="cpu", weights_only=True)
    trainer = trainer_of(second, [devices[1]], resume=file)
    trainer.resume()
    step = trainer.parts.step
    for name in ("encoder", "decoder", "average"):
        part = step.average if name == "average" else getattr(step.module, name)
        for key, value in part.state_dict().items():
            assert torch.equal(value.cpu(), saved[name][key]), key
    parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in step.optimizer.state[parameter].items():
            assert torch.equal(value.cpu(), saved["optimizer"]["state"][number][name].cpu())
            if value.shape == parameter.shape:
                assert value.device == parameter.device and value.stride() == parameter.stride()
    assert train(second, [devices[1]], resume=file, progress=False)["step"] == 4
    assert all(torch.isfinite(x).all() for x in weights(second, "epoch_2.pth").values())
