"""Synchronised batch normalisation reads nothing back to the host, on which a GPU would wait."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mit_semseg.lib.nn import (
    SynchronizedBatchNorm2d,
    UserScatteredDataParallel,
)

C = 3
# What reads a tensor's values in Python, or makes one on a device of values in Python.
READS = {
    *("item", "tolist", "cpu", "numpy", "new_tensor", "tensor", "as_tensor", "is_nonzero"),
    *("__bool__", "__float__", "__int__", "__index__", "__array__"),
}


class _Functions(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Reads by torch itself, such as of a tensor that is given where a number is expected."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Watched:
    """A context that notes the reads of its thread; modes are a thread's own."""

    def __init__(self, seen):
        self.modes = (_Functions(seen), _Operators(seen))

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class Net(nn.Module):
    """Watches the threads it is called in."""

    def __init__(self, seen, **options):
        super().__init__()
        self.seen = seen
        self.body = nn.Sequential(
            nn.Conv2d(2, C, 3),
            SynchronizedBatchNorm2d(C, **options),
            nn.ReLU(),
            nn.Conv2d(C, C, 1),
            SynchronizedBatchNorm2d(C, **options),
        )

    def forward(self, x):
        with Watched(self.seen):
            return self.body(x).square().mean()


OPTIONS = [{}, {"momentum": None}, {"eps_mode": "clamp"}, {"affine": False}]


@pytest.mark.parametrize("options", OPTIONS)
def test_replicas_do_not_synchronise_with_the_device(options):
    seen = []
    model = UserScatteredDataParallel(Net(seen, **options), ["cpu"] * 3)
    xs = [torch.randn(n, 2, 5, 4) for n in (2, 0, 3)]
    xs[1] = torch.randn(1, 2, 3, 3)
    for _ in range(2):
        loss = model(xs).mean()
        # On the CPU one thread, this one, computes the gradients of all replicas.
        with Watched(seen):
            loss.backward()
    assert seen == []


def test_the_check_detects_it():
    for read in (Tensor.tolist, Tensor.cpu, Tensor.nonzero, lambda x: float(x.sum())):
        seen = []
        with Watched(seen):
            read(torch.ones(2, C))
        assert seen


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen = []
    for options in OPTIONS:
        torch.manual_seed(0)
        net = Net(seen, **options)
        for x in (torch.randn(rank + 1, 2, 5, 4), torch.randn(1, 2, 4, 3)):
            loss = net(x)
            with Watched(seen):
                loss.backward()
    Path(folder, f"{rank}.txt").write_text(",".join(seen))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_processes_do_not_synchronise_with_the_device(tmp_path):
    start_ranks(one_rank, 2, str(tmp_path))
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]
