"""Replicas: scattering, gathering, gradients, and what happens when one of them fails."""

import os
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from mit_semseg.lib.nn import (
    DataParallelWithCallback,
    SynchronizedBatchNorm1d,
    UserScatteredDataParallel,
    async_copy_to,
    patch_replication_callback,
    user_scattered_collate,
)
from mit_semseg.lib.nn.replica_threads import _serve

Pair = namedtuple("Pair", "first second")


class Call(nn.Module):
    """Runs a function on (module, feed), with one parameter and one layer to synchronise."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.norm = SynchronizedBatchNorm1d(2)
        self.other = SynchronizedBatchNorm1d(2)

    def forward(self, feed, **kwargs):
        return self.function(self, feed, **kwargs)


def parallel(function, n=3, **options):
    return UserScatteredDataParallel(Call(function), device_ids=["cpu"] * n, **options)


def batches(n=3):
    return [{"x": torch.randn(i + 2, 2), "id": i} for i in range(n)]


# What goes in and comes out


def test_gathers_nested_outputs_of_different_sizes():
    def function(module, feed):
        x, i = feed["x"], feed["id"]
        return {
            "tensor": x * module.scale,
            "tuple": (x.sum(), [x[:, :1], i]),
            "pair": Pair(i / 2, None),
            "text": f"replica {i}",
        }

    feeds = batches()
    xs = [feed["x"] for feed in feeds]
    out = parallel(function)(feeds)
    assert torch.equal(out["tensor"], torch.cat(xs) * 2)
    assert isinstance(out["tuple"], tuple)
    assert torch.equal(out["tuple"][0], torch.stack([x.sum() for x in xs]))
    assert torch.equal(out["tuple"][1][0], torch.cat(xs)[:, :1])
    assert torch.equal(out["tuple"][1][1], torch.tensor([0, 1, 2]))
    assert torch.equal(out["pair"].first, torch.tensor([0.0, 0.5, 1.0]))
    assert out["pair"].second is None
    assert out["text"] == ["replica 0", "replica 1", "replica 2"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_inputs_than_devices_and_shape_of_scalars(n):
    out = parallel(lambda module, feed: feed["x"].mean())(batches(n))
    assert out.shape == (n,)


@pytest.mark.parametrize("inputs", [[], batches(4), batches(1)[0], torch.zeros(3, 2)])
def test_wrong_inputs_are_refused(inputs):
    with pytest.raises(ValueError, match="list of 1 to 3 elements"):
        parallel(lambda module, feed: 0)(inputs)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"shapes \[\(2, 3\), \(2, 4\)\]"),
        ([torch.zeros(2, 3), torch.zeros(2)], "cannot be concatenated"),
        ([{"a": 1}, {"b": 1}], "different keys"),
        ([(1, 2), (1,)], r"lists of lengths \[2, 1\]"),
        ([torch.zeros(2), "text"], "different types"),
    ],
)
def test_outputs_that_do_not_join_are_refused(outputs, message):
    model = parallel(lambda module, feed: outputs[feed["id"]], 2)
    with pytest.raises(ValueError, match=message):
        model(batches(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_ids": []}, "device_ids is empty"),
        ({"device_ids": ["cpu", 99]}, r"device_ids\[1\] = 99"),
        ({"device_ids": [-1]}, "CUDA index from 0"),
        ({"device_ids": ["gpu"]}, "'gpu'"),
        ({"device_ids": ["cpu"], "timeout": 0}, "timeout = 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UserScatteredDataParallel(nn.Identity(), **options)


def test_default_devices_and_state_dict_names():
    model = UserScatteredDataParallel(nn.Linear(2, 1))
    assert len(model.device_ids) == 1  # no GPU is seen here: the CPU
    assert list(model.state_dict()) == ["module.weight", "module.bias"]
    model = UserScatteredDataParallel(nn.Linear(2, 1, device="meta"), ["cpu", "cpu"])
    with pytest.raises(ValueError, match=r"module has tensors on meta.*module\.to\('cpu'\)"):
        model([torch.zeros(1, 2)] * 2)


def test_one_input_runs_the_module_itself_in_the_callers_thread():
    seen = []
    model = parallel(lambda module, feed: seen.append((module, threading.current_thread())))
    model(batches(1))
    assert seen == [(model.module, threading.current_thread())]


def test_keyword_arguments_reach_every_replica():
    model = parallel(lambda module, feed, size, shift: feed["x"].sum() * 0 + size[0] + shift)
    out = model(batches(), size=(5, 7), shift=torch.tensor(0.5))
    assert out.tolist() == [5.5, 5.5, 5.5]


def test_prepare_scatter_sees_the_whole_list_once():
    class Weighted(Call):
        def prepare_scatter(self, inputs):
            total = sum(len(feed["x"]) for feed in inputs)
            return [{**feed, "share": len(feed["x"]) / total} for feed in inputs]

    model = UserScatteredDataParallel(
        Weighted(lambda module, feed: feed["x"].mean() * feed["share"]), ["cpu"] * 3
    )
    for n in (1, 2, 3):
        feeds = batches(n)
        want = torch.cat([feed["x"] for feed in feeds]).mean()
        torch.testing.assert_close(model(feeds).sum(), want)


def test_collate_and_copy():
    feeds = batches()
    assert user_scattered_collate(feeds) is feeds
    nested = OrderedDict(a=[torch.ones(2), "text"], b=Pair(torch.zeros(1), None))
    for device in ("cpu", torch.device("cpu")):
        out = async_copy_to(nested, device)
        assert torch.equal(out["a"][0], torch.ones(2)) and out["a"][1] == "text"
        assert isinstance(out["b"], Pair) and out["b"].second is None
    assert async_copy_to(torch.ones(2), "meta").device.type == "meta"


# Replicas as copies of the module


class Zoo(nn.Module):
    """Parameters and buffers of every kind there is."""

    def __init__(self):
        super().__init__()
        self.items = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.named = nn.ParameterDict({"a": torch.randn(3)})
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.rnn = nn.GRU(3, 3, batch_first=True)
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.same = self.first
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.missing = None
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        assert len(list(self.parameters())) == 14 and self.tied.weight is self.first.weight
        self.seen += len(x)  # in place
        self.largest = x.detach().max()  # replaced
        x = x * sum(self.items) + self.named["a"] * self.frozen
        x = self.parametrised(self.same(self.tied(self.first(x))))
        return self.rnn(x[:, None])[0].sum()


def test_gradients_and_buffers_of_every_kind_of_module():
    torch.manual_seed(0)
    model = Zoo().double()
    xs = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 1, 3)]
    torch.stack([model(x) for x in xs]).sum().backward()
    want = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.seen.zero_()

    UserScatteredDataParallel(model, ["cpu"] * 3)(xs).sum().backward()
    got = [p.grad for p in model.parameters()]
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert model.seen == 2  # replica 0's
    assert model.largest == xs[0].max()
    assert all(p.is_leaf for p in model.parameters())


def test_modes_of_the_caller_hold_in_replicas():
    def modes(module, feed):
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            module.training,
            (feed["x"] @ feed["x"].T).flatten().sum().dtype == torch.bfloat16,
        )

    model = parallel(modes, 2)

    def seen():
        flags = model(batches(2))
        assert all(bool(flag[0]) == bool(flag[1]) for flag in flags)
        return [bool(flag[0]) for flag in flags]

    assert seen() == [True, False, False, True, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert seen() == [True, False, True, True, True]
    with torch.no_grad():
        assert seen() == [False, False, False, True, False]
    model.eval()
    with torch.inference_mode():
        assert seen() == [False, True, False, False, False]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_number_of_threads_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        out = parallel(lambda module, feed: torch.get_num_threads())(batches())
        assert out.tolist() == [2, 2, 2]
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


# The published callback


class Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = SynchronizedBatchNorm1d(2, affine=False)
        self.heard = []

    def __data_parallel_replicate__(self, ctx, copy_id):
        self.heard.append((ctx, copy_id))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("patch", [False, True])
def test_data_parallel_with_callback(patch):
    net = Listener()
    if patch:
        model = nn.DataParallel(net)
        patch_replication_callback(model)
    else:
        model = DataParallelWithCallback(net)
    model.device_ids = ["cpu", "cpu"]  # torch's own would take CUDA devices only
    replicas = model.replicate(net, model.device_ids)
    (ctx0, id0), (ctx1, id1) = net.heard
    assert ctx0 is ctx1 and (id0, id1) == (0, 1)
    xs = [torch.randn(3, 2), torch.randn(5, 2)]
    y = model.parallel_apply(replicas, [(x,) for x in xs], [{}, {}])
    want = nn.BatchNorm1d(2, affine=False)(torch.cat(xs))
    torch.testing.assert_close(torch.cat(y), want)


# Failures


def failure(function, n=3, hanging=0, **options):
    """The error of a forward pass, which comes soon and leaves no replica at work."""
    start = time.monotonic()
    with pytest.raises(BaseException) as caught:  # noqa: B017, PT011 - callers check it
        parallel(function, n, **options)(batches(n))
    assert time.monotonic() - start < 5
    assert len(busy_replicas()) == hanging
    return caught.value


def text_of(error):
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def busy_replicas():
    """Threads of replicas that run or free something, instead of waiting for the next pass."""
    frames = sys._current_frames()
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("replica-")
        and thread.ident in frames
        and _inside(frames[thread.ident]) is not _serve.__code__
    ]


def _inside(frame):
    """The innermost code that is not of the standard library."""
    while "threading" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


class SlowToFree:
    """What a replica's frame may hold: large tensors, which take their time to be freed."""

    def __del__(self):
        time.sleep(0.2)


class OwnError(Exception):
    """Takes two arguments, so it could not be rebuilt from a message."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("who", [0, 2])
def test_error_in_one_replica_reaches_the_caller(when, who):
    def breaks_here(module, feed):
        if feed["id"] == who:
            raise OwnError(7, "no such pixel")

    def function(module, feed):
        if when == "before":
            breaks_here(module, feed)
        y = module.norm(feed["x"])
        if when == "after":
            breaks_here(module, feed)
        return module.other(y)

    error = failure(function)
    assert isinstance(error, OwnError) and error.code == 7
    for words in ("breaks_here", "no such pixel", f"replica {who} of 3 on device cpu"):
        assert words in text_of(error)


@pytest.mark.parametrize("failing", [{1}, {0, 2}, {0, 1, 2}])
def test_threads_hold_nothing_when_an_error_is_raised(failing):
    def function(module, feed):
        held = SlowToFree()  # noqa: F841 - freed with the frame, when the replica has failed
        if feed["id"] in failing:
            raise KeyError(feed["id"])
        return module.norm(feed["x"])

    error = failure(function)
    assert isinstance(error, KeyError) and error.args[0] in failing


def test_error_waits_for_a_busy_replica():
    release = threading.Event()

    def function(module, feed):
        if feed["id"] == 1:
            threading.Timer(1.0, release.set).start()
            raise KeyError("gone")
        if feed["id"] == 2:
            release.wait(20)
        return module.norm(feed["x"])

    assert isinstance(failure(function), KeyError) and release.is_set()


def test_control_c_waits_for_the_replicas():
    def function(module, feed):
        held = SlowToFree()  # noqa: F841
        if feed["id"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return module.norm(feed["x"])

    assert isinstance(failure(function), KeyboardInterrupt)


def test_a_thread_that_cannot_start_releases_the_others(monkeypatch):
    start = threading.Thread.start

    def no_third(self):
        if self.name == "replica-2":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", no_third)
    error = failure(lambda module, feed: module.norm(feed["x"]))
    assert isinstance(error, RuntimeError) and "new thread" in str(error)


@pytest.mark.parametrize("who", [0, 1])
def test_replica_that_skips_a_layer_is_named(who):
    error = failure(lambda module, feed: feed["x"] if feed["id"] == who else module.norm(feed["x"]))
    assert isinstance(error, RuntimeError)
    assert f"replica {who} finished without reaching norm" in str(error)


def test_replicas_waiting_at_different_layers_are_named():
    def function(module, feed):
        layers = [module.norm, module.other][:: 1 if feed["id"] < 2 else -1]
        return layers[1](layers[0](feed["x"]))

    error = failure(function)
    assert isinstance(error, RuntimeError)
    assert "norm" in str(error) and "other" in str(error) and "waits at" in str(error)


def test_slow_replica_runs_into_the_timeout():
    release = threading.Event()

    def function(module, feed):
        if feed["id"] == 0:
            release.wait(20)
        return module.norm(feed["x"])

    error = failure(function, timeout=0.2, hanging=1)
    assert isinstance(error, TimeoutError)
    assert "waited 0.2 s at norm for replica 0" in str(error)
    # Nothing can end a thread that hangs: its replica is named.
    assert "replica 0 did not end within 0.2 s" in text_of(error)
    (hanging,) = busy_replicas()
    release.set()
    hanging.join(10)
    assert not hanging.is_alive(), "it is nobody's thread any more"


def test_scattered_replicas_need_no_patch():
    """The published training script patches them all the same."""
    net = Listener()
    model = UserScatteredDataParallel(net, device_ids=["cpu", "cpu"])
    patch_replication_callback(model)
    xs = [torch.randn(3, 2), torch.randn(5, 2)]
    want = nn.BatchNorm1d(2, affine=False)(torch.cat(xs))
    torch.testing.assert_close(model(xs), want)
    assert [copy_id for _, copy_id in net.heard] == [0, 1]  # once each
    with pytest.raises(ValueError, match="Linear"):
        patch_replication_callback(nn.Linear(1, 1))


def test_works_again_after_a_failure():
    broken = True

    def function(module, feed):
        if broken and feed["id"] == 1:
            raise OwnError(1, "once")
        return module.norm(feed["x"])

    model = parallel(function)
    with pytest.raises(OwnError):
        model(batches())
    broken = False
    assert model(batches()).shape == (9, 2)
    assert model.module.norm.num_batches_tracked == 1


def test_recomputation_in_backward_is_refused_instead_of_hanging():
    def function(module, feed):
        return torch.utils.checkpoint.checkpoint(
            module.norm, feed["x"] * module.scale, use_reentrant=False
        )

    loss = parallel(function, 2)(batches(2)).pow(2).sum()
    with pytest.raises(RuntimeError, match="norm was called after its replica had finished"):
        loss.backward()
