"""Replicas: scattering, gathering, gradients, and what happens when one of them fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.norm = SynchronizedBatchNorm1d(2)
        self.other = SynchronizedBatchNorm1d(2)

    def forward(self, feed: Any, **kwargs: Any) -> Any:
        return self.function(self, feed, **kwargs)


def parallel(function: Any, n: int = 3, **options: Any) -> UserScatteredDataParallel:
    return UserScatteredDataParallel(Call(function), device_ids=["cpu"] * n, **options)


def batches(n: int = 3) -> list[dict[str, Any]]:
    return [{"x": torch.randn(i + 2, 2), "id": i} for i in range(n)]


# What goes in and comes out


def test_gathers_nested_outputs_of_different_sizes() -> None:
    def function(module: Call, feed: dict[str, Any]) -> dict[str, Any]:
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
def test_fewer_inputs_than_devices_and_shape_of_scalars(n: int) -> None:
    out = parallel(lambda module, feed: feed["x"].mean())(batches(n))
    assert out.shape == (n,)


@pytest.mark.parametrize("inputs", [[], batches(4), batches(1)[0], torch.zeros(3, 2)])
def test_wrong_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="list of 1 to 3 elements"):
        parallel(lambda module, feed: 0)(inputs)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"shapes \[\(2, 3\), \(2, 4\)\]"),
        ([torch.zeros(2, 3), torch.zeros(2)], "do not join"),
        ([{"a": 1}, {"b": 1}], "different keys"),
        ([(1, 2), (1,)], r"\[2, 1\] items"),
        ([torch.zeros(2), "text"], "different types"),
    ],
)
def test_outputs_that_do_not_join_are_refused(outputs: list[Any], message: str) -> None:
    model = parallel(lambda module, feed: outputs[feed["id"]], 2)
    with pytest.raises(ValueError, match=message):
        model(batches(2))


@pytest.mark.parametrize(
    ("device_ids", "message"),
    [
        ([], "device_ids is empty"),
        (["cpu", 99], r"device_ids\[1\] = 99"),
        ([-1], "CUDA index from 0"),
        (["gpu"], "'gpu'"),
    ],
)
def test_wrong_devices_are_refused(device_ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UserScatteredDataParallel(nn.Identity(), device_ids)


def test_default_devices_and_state_dict_names() -> None:
    model = UserScatteredDataParallel(nn.Linear(2, 1))
    assert len(model.device_ids) == 1  # no GPU is seen here: the CPU
    assert list(model.state_dict()) == ["module.weight", "module.bias"]


def test_module_elsewhere_than_first_device_is_refused() -> None:
    model = UserScatteredDataParallel(nn.Linear(2, 1, device="meta"), ["cpu", "cpu"])
    with pytest.raises(ValueError, match=r"module has tensors on meta.*module\.to\('cpu'\)"):
        model([torch.zeros(1, 2)] * 2)


def test_one_input_runs_the_module_itself_in_the_callers_thread() -> None:
    seen: list[Any] = []
    model = parallel(lambda module, feed: seen.append((module, threading.current_thread())))
    model(batches(1))
    assert seen == [(model.module, threading.current_thread())]


def test_keyword_arguments_reach_every_replica() -> None:
    model = parallel(lambda module, feed, size, shift: feed["x"].sum() * 0 + size[0] + shift)
    out = model(batches(), size=(5, 7), shift=torch.tensor(0.5))
    assert out.tolist() == [5.5, 5.5, 5.5]


def test_prepare_scatter_sees_the_whole_list_once() -> None:
    class Weighted(Call):
        def prepare_scatter(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            total = sum(len(feed["x"]) for feed in inputs)
            return [{**feed, "share": len(feed["x"]) / total} for feed in inputs]

    model = UserScatteredDataParallel(
        Weighted(lambda module, feed: feed["x"].mean() * feed["share"]), ["cpu"] * 3
    )
    for n in (1, 2, 3):
        feeds = batches(n)
        want = torch.cat([feed["x"] for feed in feeds]).mean()
        torch.testing.assert_close(model(feeds).sum(), want)


def test_collate_and_copy() -> None:
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

    def __init__(self) -> None:
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
        self.missing: nn.Module | None = None
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        assert len(list(self.parameters())) == 14 and self.tied.weight is self.first.weight
        self.seen += len(x)  # in place
        self.largest = x.detach().max()  # replaced
        x = x * sum(self.items) + self.named["a"] * self.frozen
        x = self.parametrised(self.same(self.tied(self.first(x))))
        return self.rnn(x[:, None])[0].sum()


def test_gradients_and_buffers_of_every_kind_of_module() -> None:
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


def test_modes_of_the_caller_hold_in_replicas() -> None:
    def modes(module: Call, feed: Any) -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            str(torch.get_autocast_dtype("cpu")),
            module.training,
            (feed["x"] @ feed["x"].T).flatten().sum().dtype == torch.bfloat16,
        )

    model = parallel(modes, 2)

    def seen() -> list[Any]:
        grad, inference, autocast, dtype, training, half = model(batches(2))
        assert dtype[0] == dtype[1]
        flags = (grad, inference, autocast, training, half)
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


def test_number_of_threads_is_restored() -> None:
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
    def __init__(self) -> None:
        super().__init__()
        self.inner = SynchronizedBatchNorm1d(2, affine=False)
        self.heard: list[tuple[Any, int]] = []

    def __data_parallel_replicate__(self, ctx: Any, copy_id: int) -> None:
        self.heard.append((ctx, copy_id))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("patch", [False, True])
def test_data_parallel_with_callback(patch: bool) -> None:
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


def test_scattered_replicas_need_no_patch() -> None:
    """The published training script gives them one."""
    net = Listener()
    model = UserScatteredDataParallel(net, device_ids=["cpu", "cpu"])
    patch_replication_callback(model)
    xs = [torch.randn(3, 2), torch.randn(5, 2)]
    want = nn.BatchNorm1d(2, affine=False)(torch.cat(xs))
    torch.testing.assert_close(model(xs), want)
    assert [copy_id for _, copy_id in net.heard] == [0, 1]  # once each


def test_patching_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear"):
        patch_replication_callback(nn.Linear(1, 1))


# Failures


def failure(function: Any, n: int = 3, **options: Any) -> tuple[BaseException, float]:
    """The error of a forward pass and the seconds it took to arrive."""
    start = time.monotonic()
    with pytest.raises(BaseException) as caught:  # noqa: B017, PT011 - callers check it
        parallel(function, n, **options)(batches(n))
    return caught.value, time.monotonic() - start


def busy_replicas() -> list[threading.Thread]:
    """Threads of replicas that run or free something, instead of waiting for the next pass."""
    frames = sys._current_frames()
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("replica-")
        and thread.ident in frames
        and _inside(frames[thread.ident]) is not _serve.__code__
    ]


def _inside(frame: Any) -> Any:
    """The innermost code that is not of the standard library."""
    while "threading" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


class SlowToFree:
    """What a replica's frame may hold: large tensors, which take their time to be freed."""

    def __del__(self) -> None:
        time.sleep(0.2)


class OwnError(Exception):
    """Takes two arguments, so it could not be rebuilt from a message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("who", [0, 2])
def test_error_in_one_replica_reaches_the_caller(when: str, who: int) -> None:
    def breaks_here(i: int) -> None:
        if i == who:
            raise OwnError(7, "no such pixel")

    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        if when == "before":
            breaks_here(feed["id"])
        y = module.norm(feed["x"])
        if when == "after":
            breaks_here(feed["id"])
        return module.other(y)

    error, seconds = failure(function)
    assert isinstance(error, OwnError) and error.code == 7
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert "breaks_here" in text and "no such pixel" in text
    assert f"replica {who} of 3 on device cpu" in text
    assert seconds < 5 and not busy_replicas()


@pytest.mark.parametrize("failing", [{1}, {0, 2}, {0, 1, 2}])
def test_nothing_is_left_to_free_when_an_error_arrives(failing: set[int]) -> None:
    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        held = SlowToFree()  # noqa: F841 - freed with the frame, when the replica has failed
        if feed["id"] in failing:
            raise KeyError(feed["id"])
        return module.norm(feed["x"])

    error, seconds = failure(function)
    assert not busy_replicas()
    assert isinstance(error, KeyError) and error.args[0] in failing
    assert seconds < 5


def test_error_waits_for_a_busy_replica() -> None:
    release = threading.Event()

    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        if feed["id"] == 1:
            threading.Timer(2.5, release.set).start()
            raise KeyError("gone")
        if feed["id"] == 2:
            release.wait(20)
        return module.norm(feed["x"])

    error, seconds = failure(function)
    assert not busy_replicas() and release.is_set()
    assert isinstance(error, KeyError) and seconds < 5


def test_control_c_waits_for_the_replicas() -> None:
    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        held = SlowToFree()  # noqa: F841
        if feed["id"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return module.norm(feed["x"])

    error, seconds = failure(function)
    assert not busy_replicas()
    assert isinstance(error, KeyboardInterrupt) and seconds < 5


def test_a_thread_that_cannot_start_releases_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def no_third(self: threading.Thread) -> None:
        if self.name == "replica-2":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", no_third)
    error, seconds = failure(lambda module, feed: module.norm(feed["x"]))
    assert not busy_replicas()
    assert isinstance(error, RuntimeError) and "new thread" in str(error) and seconds < 5


@pytest.mark.parametrize("who", [0, 1])
def test_replica_that_skips_a_layer_is_named(who: int) -> None:
    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        return feed["x"] if feed["id"] == who else module.norm(feed["x"])

    error, seconds = failure(function)
    assert isinstance(error, RuntimeError)
    assert f"replica {who} finished without reaching norm" in str(error)
    assert seconds < 5 and not busy_replicas()


def test_replicas_waiting_at_different_layers_are_named() -> None:
    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        first, second = (
            (module.norm, module.other) if feed["id"] < 2 else (module.other, module.norm)
        )
        return second(first(feed["x"]))

    error, seconds = failure(function)
    assert isinstance(error, RuntimeError)
    assert "norm" in str(error) and "other" in str(error) and "waits at" in str(error)
    assert seconds < 5 and not busy_replicas()


def test_slow_replica_runs_into_the_timeout() -> None:
    release = threading.Event()

    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        if feed["id"] == 0:
            release.wait(20)
        return module.norm(feed["x"])

    error, seconds = failure(function, timeout=0.2)
    assert isinstance(error, TimeoutError)
    assert "waited 0.2 s at norm for replica 0" in str(error)
    assert 0.2 <= seconds < 5
    # Nothing can end a thread that hangs: its replica is named.
    said = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert "replica 0 did not end within 0.2 s" in said
    (hanging,) = busy_replicas()
    release.set()
    hanging.join(10)
    assert not hanging.is_alive(), "it is nobody's thread any more"


def test_works_again_after_a_failure() -> None:
    broken = True

    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        if broken and feed["id"] == 1:
            raise OwnError(1, "once")
        return module.norm(feed["x"])

    model = parallel(function)
    with pytest.raises(OwnError):
        model(batches())
    broken = False
    assert model(batches()).shape == (9, 2)
    assert model.module.norm.num_batches_tracked == 1


def test_recomputation_in_backward_is_refused_instead_of_hanging() -> None:
    def function(module: Call, feed: dict[str, Any]) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            module.norm, feed["x"] * module.scale, use_reentrant=False
        )

    loss = parallel(function, 2)(batches(2)).pow(2).sum()
    with pytest.raises(RuntimeError, match="norm was called after its replica had finished"):
        loss.backward()


def test_wrong_timeout_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout = 0"):
        parallel(lambda module, feed: 0, timeout=0)
