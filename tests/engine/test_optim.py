"""Optimizers and running average, against plain ones and by hand."""

import copy

import pytest
import torch
from torch import nn

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


NAMES = ("SGD", "Adam", "AdamW")


def take_steps(batches, *runs):
    """Steps of several networks, each with its optimizers, on the same batches."""
    for x in batches:
        for net, *optimizers in runs:
            net.zero_grad()
            net(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_fused_steps_are_the_plain_ones(name):
    torch.manual_seed(0)
    ours = nn.Conv2d(3, 5, 3)
    plain, kind = copy.deepcopy(ours), getattr(torch.optim, name)
    options = {"momentum": 0.8} if name == "SGD" else {"betas": (0.8, 0.999)}
    groups = [{"params": [plain.weight], "weight_decay": 0.1}]
    groups += [{"params": [plain.bias], "weight_decay": 0.0}]
    optimizer = build_optimizer(name, (ours, 0.05), weight_decay=0.1, beta1=0.8)
    assert type(optimizer) is kind and optimizer.param_groups[0]["fused"] is True
    expected = kind(groups, lr=0.05, fused=False, **options)
    take_steps(torch.randn(5, 2, 3, 6, 6), (ours, optimizer), (plain, expected))
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_one_optimizer_is_those_of_its_parts(name):
    """Also when it resumes from their states, which is what states of runs held before."""
    torch.manual_seed(0)
    together = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    apart, resumed = copy.deepcopy(together), copy.deepcopy(together)

    def parts_of(net):
        return (net[:2], 0.05), (net[2], 0.01)

    whole = build_optimizer(name, *parts_of(together))
    parts = [build_optimizer(name, part) for part in parts_of(apart)]
    images = torch.randn(5, 2, 3, 6, 6)
    take_steps(images[:3], (together, whole), (apart, *parts))
    resumed.load_state_dict(apart.state_dict())
    again = build_optimizer(name, *parts_of(resumed))
    load_optimizer(again, joined_states([copy.deepcopy(part.state_dict()) for part in parts]))
    for optimizer, *rates in ((parts[0], 0.03), (parts[1], 0.02), (whole, 0.03, 0.02)):
        set_learning_rates(optimizer, *rates)
    set_learning_rates(again, 0.03, 0.02)
    take_steps(images[3:], (together, whole), (apart, *parts), (resumed, again))
    for key, value in apart.state_dict().items():
        assert torch.equal(together.state_dict()[key], value), key
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_momentum_takes_the_layout_of_its_parameter(name, layout):
    """Resumed in another layout, a run goes on as one that was never interrupted."""
    torch.manual_seed(0)
    images = torch.randn(6, 2, 3, 8, 8)
    before = torch.contiguous_format if layout == torch.channels_last else torch.channels_last
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (3, 2))).to(memory_format=before)
    optimizer = build_optimizer(name, (whole, 0.05))
    take_steps(images[:3], (whole, optimizer))
    resumed = copy.deepcopy(whole).to(memory_format=layout)
    other = build_optimizer(name, (resumed, 0.05))
    load_optimizer(other, copy.deepcopy(optimizer.state_dict()))
    assert all(p.is_contiguous(memory_format=layout) for p in resumed.parameters() if p.ndim == 4)
    for parameter, state in other.state.items():
        momentum = [value for value in state.values() if value.ndim]
        assert momentum and all(value.stride() == parameter.stride() for value in momentum)
    take_steps(images[3:], (whole, optimizer), (resumed, other))
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
