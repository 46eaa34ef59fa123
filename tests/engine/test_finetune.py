"""Schedules, frozen parts, layer-wise learning rates and early stopping."""

import logging

import pytest
import torch
from small_runs import CPU, weights
from torch import nn

from mit_semseg.config import TrainOptions
from mit_semseg.engine.train import train
from mit_semseg.engine.training import trainer
from mit_semseg.engine.training.build import build
from mit_semseg.engine.training.finetune import layer_scales
from mit_semseg.engine.training.schedule import learning_rate_factor
from mit_semseg.models import ENCODERS

STEPS, EPOCHS = 60, 12
lr_scheduler = torch.optim.lr_scheduler
SCHEDULES = {
    "poly": ({}, lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=0.9)),
    "constant": ({"lr_pow": 0}, lambda o: lr_scheduler.ConstantLR(o, factor=1)),
    "cosine": ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    "one_cycle": (
        {"schedule": "one_cycle"},
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=STEPS),
    ),
    "one_cycle, warm-up": (
        {"schedule": "one_cycle", "warmup_iters": 6},
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=STEPS, pct_start=0.1),
    ),
    "multi_step": (
        {"schedule": "multi_step", "milestones": (4, 10), "gamma": 0.5},
        lambda o: lr_scheduler.MultiStepLR(o, [20, 50], gamma=0.5),
    ),
    "multi_step, warm-up": (
        {"schedule": "multi_step", "milestones": (6,), "warmup_iters": 10},
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=9),
                lr_scheduler.MultiStepLR(o, [21], gamma=0.1),
            ],
            [9],
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(name):
    settings, make = SCHEDULES[name]
    options = TrainOptions(num_epoch=EPOCHS, **settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    for step in range(STEPS):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_factor(options, step, STEPS) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_layer_decay_counts_blocks_from_the_deepest():
    encoder = ENCODERS.get("resnet18")()
    scales = layer_scales(encoder, 0.5)
    found = {name: scales[p] for name, p in encoder.named_parameters()}
    assert len(found) == len(scales)
    assert found["conv1.weight"] == 0.5**8  # eight blocks follow
    for stage in range(4):
        for block in range(2):
            factor = 0.5 ** (7 - 2 * stage - block)
            names = [n for n in found if n.startswith(f"layer{stage + 1}.{block}.")]
            assert names and {found[name] for name in names} == {factor}


def test_layer_decay_of_a_transformer_is_timms():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    optim = pytest.importorskip("timm.optim")
    net = timm.create_model("test_vit", num_classes=0)
    expected = {
        parameter: group["lr_scale"]
        for group in optim.param_groups_layer_decay(net, layer_decay=0.7)
        for parameter in group["params"]
    }
    given = layer_scales(net, 0.7)
    assert given.keys() == expected.keys()
    assert all(given[p] == pytest.approx(expected[p]) for p in given)


def test_learning_rates_of_layers_follow_the_schedule(settings):
    encoder = {"MODEL__arch_encoder": "resnet18", "MODEL__fc_dim": 512}
    rates = {"TRAIN__lr_encoder": 0.4, "TRAIN__lr_decoder": 0.3}
    cfg = settings(TRAIN__layer_decay=0.5, **encoder, **rates)
    parts = build(cfg, [CPU])
    run = trainer.Trainer(parts)
    parts.progress.step = 2  # of 4
    run._set_rates()
    half = 0.5**0.9
    groups = parts.step.optimizer.param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    scales = layer_scales(parts.step.module.encoder, 0.5)
    assert len({*scales.values()}) > 2
    for p in parts.step.module.encoder.parameters():
        assert rates[p] == pytest.approx(0.4 * half * scales[p])
    assert {rates[p] for p in parts.step.module.decoder.parameters()} == {0.3 * half}


@pytest.mark.parametrize("devices", [1, 2])
def test_frozen_parts_stay_as_they_were(settings, devices):
    cfg = settings(TRAIN__freeze=("encoder",), TRAIN__ema=0.5, TRAIN__eval_epochs=1)
    before = build(cfg, [CPU]).step.module
    state = {k: v.clone() for k, v in before.state_dict().items()}
    train(cfg, [CPU] * devices, progress=False)
    for key, value in weights(cfg, "epoch_2.pth").items():
        # The decoder of this test has no running statistics.
        assert torch.equal(value, state[key]) == key.startswith("encoder."), key


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("encodr",), r"TRAIN.freeze has 'encodr', .*did you mean 'encoder'"),
        (("encoder", "decoder"), r"TRAIN.freeze \['encoder', 'decoder'\] freezes all parameters"),
    ],
)
def test_what_cannot_be_frozen_is_refused(settings, names, message):
    with pytest.raises(ValueError, match=message):
        build(settings(TRAIN__freeze=names), [CPU])


def test_training_stops_early(settings, caplog):
    """At a learning rate of 0 no validation is better than the first."""
    changes = {"TRAIN__num_epoch": 9, "TRAIN__epoch_iters": 1, "TRAIN__eval_epochs": 1}
    rates = {"TRAIN__lr_encoder": 0, "TRAIN__lr_decoder": 0, "TRAIN__fix_bn": True}
    cfg = settings(TRAIN__patience=2, **changes, **rates)
    with caplog.at_level(logging.INFO):
        result = train(cfg, [CPU], progress=False)
    assert result["history"]["val"]["epoch"] == [1, 2, 3] and result["stopped"] == ""
    assert "stopped early after epoch 3 of 9: no better mean IoU in 2 validations" in caplog.text
    assert result["checkpoint"] == "best.pth"
    again = train(cfg, [CPU], progress=False, resume="auto")
    assert again["step"] == 3
    more = settings(TRAIN__patience=4, **changes, **rates)
    assert train(more, [CPU], progress=False, resume="auto")["step"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "multi_step"}, "multi_step needs milestones"),
        ({"milestones": (3,)}, "the other schedules have none"),
        ({"layer_decay": 0}, r"TRAIN.layer_decay is 0.*in \(0, 1\]"),
        ({"patience": 2, "eval_epochs": 0}, "set TRAIN.eval_epochs 1 or TRAIN.patience 0"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**settings)
