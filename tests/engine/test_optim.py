"""Optimizers, running average and class weights by hand numbers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mit_semseg.engine.training.balance import frequency_weights
from mit_semseg.engine.training.optim import (
    MovingAverage,
    build_optimizer,
    joined_states,
    load_optimizer,
    parameter_groups,
    set_learning_rates,
)


def test_only_convolution_and_linear_weights_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.PReLU())
    decayed, plain = parameter_groups(net, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(net[0].weight), id(net[2].weight)}
    assert len(plain["params"]) == 5
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)],
)
def test_optim_is_honoured(name, kind):
    optimizer = build_optimizer(name, (nn.Conv2d(1, 1, 1), 0.5), beta1=0.8)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.5
    first = optimizer.param_groups[0]
    assert first["momentum"] == 0.8 if name == "SGD" else first["betas"][0] == 0.8
    assert first["fused"] is True


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_steps_are_the_plain_ones(name):
    torch.manual_seed(0)
    ours, plain = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
    plain.load_state_dict(ours.state_dict())
    kind = getattr(torch.optim, name)
    options = {"momentum": 0.9} if name == "SGD" else {"betas": (0.9, 0.999)}
    groups = [
        {"params": [plain.weight], "weight_decay": 0.1},
        {"params": [plain.bias], "weight_decay": 0.0},
    ]
    optimizers = (
        build_optimizer(name, (ours, 0.05), weight_decay=0.1),
        kind(groups, lr=0.05, fused=False, **options),
    )
    for _ in range(5):
        x = torch.randn(2, 3, 6, 6)
        for net, optimizer in zip((ours, plain), optimizers):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_one_optimizer_is_those_of_its_parts(name):
    """Also when it resumes from their states, which is what states of runs held before."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    rates = 0.05, 0.01  # of the first two layers, and of the last one

    def halves(net):
        return net[:2], net[2]

    def one(net):
        return build_optimizer(name, *zip(halves(net), rates, strict=True))

    def step(net, x, *optimizers):
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    together, apart, resumed = nets
    whole = one(together)
    parts = [build_optimizer(name, part) for part in zip(halves(apart), rates, strict=True)]
    images = torch.randn(5, 2, 3, 6, 6)
    for x in images[:3]:
        step(together, x, whole)
        step(apart, x, *parts)
    resumed.load_state_dict(apart.state_dict())
    again = one(resumed)
    load_optimizer(again, joined_states([copy.deepcopy(part.state_dict()) for part in parts]))
    for part, rate in zip(parts, (0.03, 0.02), strict=True):
        set_learning_rates(part, rate)
    for optimizer in (whole, again):
        set_learning_rates(optimizer, 0.03, 0.02)
    for x in images[3:]:
        step(together, x, whole)
        step(apart, x, *parts)
        step(resumed, x, again)
    for key, value in apart.state_dict().items():
        assert torch.equal(together.state_dict()[key], value), key
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_momentum_takes_the_layout_of_its_parameter(name, layout):
    """Resumed in another layout, a run goes on as one that was never interrupted."""
    torch.manual_seed(0)
    images = torch.randn(6, 2, 3, 8, 8)
    before = torch.contiguous_format if layout == torch.channels_last else torch.channels_last
    nets = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (3, 2))) for _ in range(2)]
    whole, resumed = (
        net.to(memory_format=form) for net, form in zip(nets, (before, layout), strict=True)
    )

    def steps(net, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    optimizer = build_optimizer(name, (whole, 0.05))
    steps(whole, optimizer, images[:3])
    resumed.load_state_dict(whole.state_dict())
    other = build_optimizer(name, (resumed, 0.05))
    load_optimizer(other, copy.deepcopy(optimizer.state_dict()))
    assert all(p.is_contiguous(memory_format=layout) for p in resumed.parameters() if p.ndim == 4)
    for parameter, state in other.state.items():
        momentum = [value for value in state.values() if value.ndim]
        assert momentum and all(value.stride() == parameter.stride() for value in momentum)
    steps(whole, optimizer, images[3:])
    steps(resumed, other, images[3:])
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_averages_and_clipping_across_layouts(layout):
    before = torch.contiguous_format if layout == torch.channels_last else torch.channels_last
    net = nn.Conv2d(3, 8, 3, bias=False).to(memory_format=before)
    average = MovingAverage(net, 0.9)
    average.update()
    old, new = net.weight.detach().clone(), torch.randn(8, 3, 3, 3)
    net.to(memory_format=layout).load_state_dict({"weight": new})
    average.update()  # decay (1 + 1) / (10 + 1)
    assert average.module.weight.stride() != net.weight.stride()
    torch.testing.assert_close(average.module.weight.data, 2 / 11 * old + 9 / 11 * new)

    net.weight.grad, average.module.weight.grad = new.clone(memory_format=layout), old
    norm = torch.cat([old.flatten(), new.flatten()]).norm()
    both = [net.weight, average.module.weight]
    torch.testing.assert_close(nn.utils.clip_grad_norm_(both, norm.item() / 2), norm)
    torch.testing.assert_close(net.weight.grad, new / 2)


def test_moving_average_by_hand():
    net = nn.Linear(1, 1, bias=False)
    net.register_buffer("count", torch.zeros((), dtype=torch.int64))
    net.weight.data.fill_(1.0)
    average = MovingAverage(net, 0.9)
    average.update()  # the first update copies
    net.weight.data.fill_(2.0)
    net.count.fill_(7)
    average.update()  # decay (1 + 1) / (10 + 1)
    assert average.module.weight.item() == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    assert average.module.count.item() == 7
    for _ in range(200):
        average.update()
    before = average.module.weight.item()
    net.weight.data.fill_(3.0)
    average.update()  # by now the decay is 0.9
    assert average.module.weight.item() == pytest.approx(0.9 * before + 0.1 * 3)


def test_median_frequency_weights_by_hand():
    pixels, images = np.array([80.0, 10.0, 0.0, 30.0]), np.array([100.0, 100.0, 0.0, 100.0])
    # Frequencies 0.8, 0.1, 0.3 have the median 0.3; the class that never occurs gets 1.
    expected = torch.tensor([0.3 / 0.8, 3.0, 1.0, 1.0])
    torch.testing.assert_close(frequency_weights(pixels, images, 1.0), expected)
    torch.testing.assert_close(frequency_weights(pixels, images, 0.5), expected.sqrt())
