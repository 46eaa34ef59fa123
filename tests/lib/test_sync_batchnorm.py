"""Synchronised batch normalisation against torch's layer on the concatenated batch."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mit_semseg.lib.nn import (
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    UserScatteredDataParallel,
)

C = 3
EPS = torch.finfo(torch.float32).eps
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


class Rows(nn.Module):
    """A layer on dict["x"], (N, C, ...), whose output is laid out as (values, C)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, feed):
        return rows(self.layer(feed["x"]))


def rows(x):
    return x.transpose(0, 1).reshape(x.shape[1], -1).T


def randomised(layer):
    """Float64, with parameters and running statistics unlike the initial ones."""
    layer = layer.double()
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 2.0)
    return layer


def check_equal_to_torch(layer, xs):
    """One training step on replicas against one of torch's layer on all their values."""
    ours = randomised(layer)
    theirs = nn.BatchNorm1d(
        C, ours.eps, ours.momentum, ours.affine, ours.track_running_stats
    ).double()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for x in xs:
        x.requires_grad_()

    model = UserScatteredDataParallel(Rows(ours), device_ids=["cpu"] * len(xs))
    for _ in range(2):  # twice: running statistics must build on themselves
        y = model([{"x": x} for x in xs])
        want_y = theirs(torch.cat([rows(x) for x in xs]))
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, [*xs, *ours.parameters()], g)
    want = torch.autograd.grad(want_y, [*xs, *theirs.parameters()], g)

    torch.testing.assert_close(y, want_y, **TOLERANCE)
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TOLERANCE)


SHAPES = {
    SynchronizedBatchNorm1d: [[(4, C), (1, C), (7, C)], [(2, C, 5), (3, C, 2), (1, C, 9)]],
    SynchronizedBatchNorm2d: [[(2, C, 4, 5), (1, C, 7, 3), (3, C, 1, 1)]],
    SynchronizedBatchNorm3d: [[(2, C, 2, 3, 4), (1, C, 1, 1, 1), (1, C, 3, 2, 1)]],
}
CASES = [(layer, shapes) for layer, lists in SHAPES.items() for shapes in lists]


@pytest.mark.parametrize(("layer", "shapes"), CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-2},
        {"affine": False},
        {"track_running_stats": False},
    ],
)
def test_equals_torch_on_concatenated_batch(layer, shapes, options):
    torch.manual_seed(0)
    # Means far from zero: E[x^2] - E[x]^2 would lose the digits that are checked here.
    xs = [torch.randn(shape, dtype=torch.float64) * 2 + 50 * i for i, shape in enumerate(shapes)]
    check_equal_to_torch(layer(C, **options), xs)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3
    ),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_torch_for_random_sizes(sizes, channels_last, seed):
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    xs = [
        torch.randn(n, C, h, w, dtype=torch.float64).to(memory_format=layout) for n, h, w in sizes
    ]
    xs.append(torch.randn(2, C, 8, 8, dtype=torch.float64)[:, :, ::2, 1::3])  # strided
    check_equal_to_torch(SynchronizedBatchNorm2d(C), xs)


def test_large_mean_in_float32():
    torch.manual_seed(0)
    xs = [torch.randn(2, C, 16, 16) + 4096 for _ in range(2)]
    layer = SynchronizedBatchNorm2d(C, momentum=1.0)
    UserScatteredDataParallel(Rows(layer), ["cpu", "cpu"])([{"x": x} for x in xs])
    want = torch.cat([rows(x) for x in xs]).double().var(0)
    torch.testing.assert_close(layer.running_var.double(), want, rtol=1e-4, atol=0)


class Net(nn.Module):
    """conv-bn-relu-conv-bn, and a loss whose sum over replicas is the loss of the union."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            norm(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, C, 3),
            norm(C),
        )

    def forward(self, feed):
        return (self.body(feed["x"]) * feed["w"]).sum()


@pytest.mark.parametrize("freeze", [False, True])
def test_nested_model_trains_as_one_process_on_the_union(freeze):
    torch.manual_seed(0)
    ours = Net(SynchronizedBatchNorm2d).double()
    theirs = Net(nn.BatchNorm2d).double()
    theirs.load_state_dict(ours.state_dict())
    for net in (ours, theirs):
        net.body[0].weight.requires_grad_(not freeze)
        net.body[4].bias.requires_grad_(not freeze)
    feeds = [
        {
            "x": torch.randn(n, 2, 9, 8, dtype=torch.float64),
            "w": torch.randn(n, C, 5, 4, dtype=torch.float64),
        }
        for n in (1, 3, 2)
    ]
    union = {key: torch.cat([feed[key] for feed in feeds]) for key in ("x", "w")}
    model = UserScatteredDataParallel(ours, ["cpu"] * 3)
    optimizers = [torch.optim.SGD(net.parameters(), 0.01, 0.9) for net in (ours, theirs)]
    for _ in range(3):
        losses = [model(feeds).sum(), theirs(union)]
        torch.testing.assert_close(losses[0], losses[1], **TOLERANCE)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TOLERANCE)


def test_loss_of_one_replica_still_reaches_the_others_inputs():
    torch.manual_seed(0)
    xs = [torch.randn(2, C, n, dtype=torch.float64, requires_grad=True) for n in (4, 6)]
    ours, theirs = (randomised(SynchronizedBatchNorm1d(C)), nn.BatchNorm1d(C).double())
    theirs.load_state_dict(ours.state_dict())
    y = UserScatteredDataParallel(Rows(ours), ["cpu"] * 2)([{"x": x} for x in xs])[:8]
    want_y = theirs(torch.cat([rows(x) for x in xs]))[:8]
    got = torch.autograd.grad(y.pow(3).sum(), xs)
    want = torch.autograd.grad(want_y.pow(3).sum(), xs)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_layer_called_twice_and_tied_layers():
    class Twice(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.a = norm(C)
            self.b = self.a

        def forward(self, feed):
            return self.b(self.a(feed["x"]).pow(2))

    torch.manual_seed(0)
    ours, theirs = Twice(SynchronizedBatchNorm1d).double(), Twice(nn.BatchNorm1d).double()
    xs = [torch.randn(n, C, dtype=torch.float64) for n in (3, 5)]
    y = UserScatteredDataParallel(ours, ["cpu"] * 2)([{"x": x} for x in xs])
    torch.testing.assert_close(y, theirs({"x": torch.cat(xs)}), **TOLERANCE)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TOLERANCE)
    assert ours.a.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_parameters", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_float32_statistics(dtype, half_parameters, autocast):
    torch.manual_seed(0)
    layer = SynchronizedBatchNorm2d(C, momentum=1.0)
    if half_parameters:
        layer.weight.data, layer.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)
    xs = [(torch.randn(2, C, n, n) + 8).to(dtype).requires_grad_() for n in (8, 12)]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y = UserScatteredDataParallel(Rows(layer), ["cpu"] * 2)([{"x": x} for x in xs])
    exact = nn.BatchNorm1d(C, momentum=1.0).double()
    want_xs = [x.detach().double().requires_grad_() for x in xs]
    want = exact(torch.cat([rows(x) for x in want_xs]))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=0, atol=0.03)
    torch.testing.assert_close(
        layer.running_mean.double(), exact.running_mean, rtol=16 * EPS, atol=0
    )
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=0)
    g = torch.randn_like(want)
    got_gx = torch.autograd.grad(y, [*xs, layer.weight], g.to(dtype))
    want_gx = torch.autograd.grad(want, [*want_xs, exact.weight], g)
    for a, b in zip(got_gx[:2], want_gx[:2], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.03)
    assert got_gx[2].dtype == layer.weight.dtype
    torch.testing.assert_close(got_gx[2].double(), want_gx[2], rtol=0.02, atol=0.5)


def test_weight_changed_before_backward_is_noticed():
    layer = SynchronizedBatchNorm1d(C)
    xs = [torch.randn(3, C, requires_grad=True) for _ in range(2)]
    y = UserScatteredDataParallel(Rows(layer), ["cpu"] * 2)([{"x": x} for x in xs])
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def published_clamp(x, weight, bias, eps):
    """max(var, eps) in plain differentiable torch; x is (values, C)."""
    var = x.var(0, unbiased=False)
    return (x - x.mean(0)) * var.clamp(min=eps).rsqrt() * weight + bias


def test_clamped_variance_as_published():
    torch.manual_seed(0)
    layer = randomised(SynchronizedBatchNorm1d(C, eps=0.05, eps_mode="clamp"))
    # Variances far below, around and above eps.
    spread = torch.tensor([1e-3, 0.2, 2.0], dtype=torch.float64)
    xs = [(torch.randn(n, C, dtype=torch.float64) * spread).requires_grad_() for n in (5, 8)]
    y = UserScatteredDataParallel(Rows(layer), ["cpu"] * 2)([{"x": x} for x in xs])
    want = published_clamp(torch.cat(xs), layer.weight, layer.bias, 0.05)
    torch.testing.assert_close(y, want, **TOLERANCE)
    g = torch.randn_like(y)
    targets = [*xs, layer.weight, layer.bias]
    torch.testing.assert_close(
        torch.autograd.grad(y, targets, g), torch.autograd.grad(want, targets, g), **TOLERANCE
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (SynchronizedBatchNorm1d, nn.BatchNorm1d, (4, C)),
        (SynchronizedBatchNorm2d, nn.BatchNorm2d, (2, C, 3, 3)),
        (SynchronizedBatchNorm3d, nn.BatchNorm3d, (2, C, 2, 2, 2)),
    ],
)
def test_is_torchs_layer_when_alone(ours, theirs, shape):
    a, b = ours(C), theirs(C)
    assert isinstance(a, theirs)
    assert a.momentum == b.momentum and a.eps == b.eps
    x = torch.randn(shape)
    for training in (True, False):
        a.train(training), b.train(training)
        assert torch.equal(a(x), b(x))
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers(), strict=True))


def test_eval_mode_in_replicas_uses_and_keeps_running_statistics():
    layer = randomised(SynchronizedBatchNorm1d(C)).eval()
    before = copy.deepcopy(dict(layer.state_dict()))
    xs = [torch.randn(n, C, dtype=torch.float64) for n in (1, 4)]
    y = UserScatteredDataParallel(Rows(layer), ["cpu"] * 2)([{"x": x} for x in xs])
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    want = (torch.cat(xs) - layer.running_mean) * scale + layer.bias
    torch.testing.assert_close(y, want, **TOLERANCE)
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_published_state_dicts_load():
    model = nn.Sequential(SynchronizedBatchNorm1d(C))
    published = {
        "0.weight": torch.ones(C),
        "0.bias": torch.zeros(C),
        "0.running_mean": torch.full((C,), 5.0),
        "0.running_var": torch.full((C,), 7.0),
        "0._tmp_running_mean": torch.full((C,), 1.0),
        "0._tmp_running_var": torch.full((C,), 1.0),
        "0._running_iter": torch.ones(1),
    }
    assert str(model.load_state_dict(published)) == "<All keys matched successfully>"
    assert len(published) == 7  # the caller's dict is not touched
    x = torch.tensor([[0.0, 1, 2], [4, 1, 0], [2, 1, 4]])
    UserScatteredDataParallel(Rows(model), ["cpu"] * 2)([{"x": x[:1]}, {"x": x[1:]}])
    # By hand: 0.9 * loaded + 0.1 * (mean; unbiased variance) of the union.
    np.testing.assert_allclose(model[0].running_mean, [4.7, 4.6, 4.7], rtol=8 * EPS)
    np.testing.assert_allclose(model[0].running_var, [6.7, 6.3, 6.7], rtol=8 * EPS)


def test_one_value_per_channel_raises_as_torch_does():
    layer = SynchronizedBatchNorm2d(C)
    model = UserScatteredDataParallel(Rows(layer), ["cpu"] * 2)
    feeds = [{"x": torch.randn(1, C, 1, 1)}, {"x": torch.randn(0, C, 1, 1)}]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(feeds)
    # Each replica alone would be too small; their union is not.
    y = model([{"x": torch.randn(1, C, 1, 1)}, {"x": torch.randn(1, C, 1, 1)}])
    assert y.shape == (2, C)


def test_mistakes_are_named():
    model = UserScatteredDataParallel(Rows(SynchronizedBatchNorm2d(C)), ["cpu"] * 2)
    good = torch.randn(1, C, 2, 2)
    with pytest.raises(ValueError, match="expected 4D input"):
        model([{"x": good}, {"x": good[0]}])
    with pytest.raises(ValueError, match="expected 3 channels"):
        model([{"x": good}, {"x": good[:, :2]}])
    with pytest.raises(ValueError, match="eps_mode = 'max'"):
        SynchronizedBatchNorm2d(C, eps_mode="max")
