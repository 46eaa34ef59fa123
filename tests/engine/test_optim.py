"""Optimizers, schedule, running average and class weights by hand numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mit_semseg.config import load_config
from mit_semseg.engine.balance import frequency_weights
from mit_semseg.engine.optim import (
    build_optimizer,
    moving_average,
    parameter_groups,
    poly_factor,
)


def test_only_convolution_and_linear_weights_decay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.PReLU())
    decayed, plain = parameter_groups(net, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(net[0].weight), id(net[2].weight)}
    assert len(plain["params"]) == 5
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.parameters()))


def test_poly_schedule() -> None:
    assert poly_factor(0, 100, 0.9) == 1.0
    assert poly_factor(50, 100, 0.9) == pytest.approx(0.5**0.9)
    assert poly_factor(0, 100, 0.9, warmup=10) == pytest.approx(0.1)
    assert poly_factor(9, 100, 0.9, warmup=10) == pytest.approx(0.91**0.9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)],
)
def test_optim_is_honoured(name: str, kind: type) -> None:
    cfg = load_config(None, ["TRAIN.optim", name, "TRAIN.beta1", "0.8"])
    optimizer = build_optimizer(cfg, nn.Conv2d(1, 1, 1), 0.5)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.5
    first = optimizer.param_groups[0]
    assert first["momentum"] == 0.8 if name == "SGD" else first["betas"][0] == 0.8
    assert first["fused"] is True


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_steps_are_the_plain_ones(name: str) -> None:
    cfg = load_config(None, ["TRAIN.optim", name, "TRAIN.weight_decay", "0.1"])
    torch.manual_seed(0)
    ours, plain = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
    plain.load_state_dict(ours.state_dict())
    kind = getattr(torch.optim, name)
    options = {"momentum": 0.9} if name == "SGD" else {"betas": (0.9, 0.999)}
    groups = [
        {"params": [plain.weight], "weight_decay": 0.1},
        {"params": [plain.bias], "weight_decay": 0.0},
    ]
    optimizers = build_optimizer(cfg, ours, 0.05), kind(groups, lr=0.05, fused=False, **options)
    for _ in range(5):
        x = torch.randn(2, 3, 6, 6)
        for net, optimizer in zip((ours, plain), optimizers):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


def test_moving_average_by_hand() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.register_buffer("count", torch.zeros((), dtype=torch.int64))
    net.weight.data.fill_(1.0)
    average = moving_average(net, 0.9)
    average.update_parameters(net)  # the first update copies
    net.weight.data.fill_(2.0)
    net.count.fill_(7)
    average.update_parameters(net)  # decay (1 + 1) / (10 + 1)
    assert average.module.weight.item() == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    assert average.module.count.item() == 7
    for _ in range(200):
        average.update_parameters(net)
    before = average.module.weight.item()
    net.weight.data.fill_(3.0)
    average.update_parameters(net)  # by now the decay is 0.9
    assert average.module.weight.item() == pytest.approx(0.9 * before + 0.1 * 3)


def test_median_frequency_weights_by_hand() -> None:
    pixels, images = np.array([80.0, 10.0, 0.0, 30.0]), np.array([100.0, 100.0, 0.0, 100.0])
    # Frequencies 0.8, 0.1, 0.3 have the median 0.3; the class that never occurs gets 1.
    expected = torch.tensor([0.3 / 0.8, 3.0, 1.0, 1.0])
    torch.testing.assert_close(frequency_weights(pixels, images, 1.0), expected)
    torch.testing.assert_close(frequency_weights(pixels, images, 0.5), expected.sqrt())
