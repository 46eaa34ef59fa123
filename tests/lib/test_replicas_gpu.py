"""Replicas and synchronised batch normalisation on a GPU."""

import copy
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mit_semseg.config import load_config
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel
from mit_semseg.models import ModelBuilder

pytestmark = pytest.mark.gpu

C = 6
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def rows(x):
    return x.transpose(0, 1).reshape(x.shape[1], -1).T


class Rows(nn.Module):
    """A layer whose outputs of any size are joined as (values, C)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return rows(self.layer(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}])
@pytest.mark.parametrize(
    "sizes", [[(2, 4, 5), (3, 6, 2)], [(2, 4, 5), (0, 3, 3), (1, 1, 1)]], ids=["two", "three"]
)
def test_replicas_on_one_gpu_equal_batch_norm_on_the_union(sizes, options, layout):
    torch.manual_seed(0)
    ours = SynchronizedBatchNorm2d(C, device="cuda", dtype=torch.float64, **options)
    theirs = nn.BatchNorm1d(C, device="cuda", dtype=torch.float64, **options)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    xs = [
        (torch.randn(n, C, h, w, device="cuda", dtype=torch.float64) * 2 + 50 * i)
        .to(memory_format=layout)
        .requires_grad_()
        for i, (n, h, w) in enumerate(sizes)
    ]
    model = UserScatteredDataParallel(Rows(ours), ["cuda:0"] * len(xs))
    for _ in range(2):
        y = model(xs)
        want_y = theirs(torch.cat([rows(x) for x in xs]))
    g = torch.randn_like(y)
    got = torch.autograd.grad(y, [*xs, *ours.parameters()], g)
    want = torch.autograd.grad(want_y, [*xs, *theirs.parameters()], g)
    torch.testing.assert_close(y, want_y, **EXACT)
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **EXACT)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        SynchronizedBatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1),
        SynchronizedBatchNorm2d(16, momentum=None),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@contextmanager
def refused_waits():
    """Whatever makes the host wait for the GPU raises, in every thread."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_check_for_synchronisation_detects_one():
    x = torch.ones(1, device="cuda")
    with refused_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_pass_never_waits_for_the_gpu(autocast):
    model = UserScatteredDataParallel(network().cuda(), ["cuda:0", "cuda:0"])
    xs = [torch.randn(2, 3, size, 24, device="cuda") for size in (32, 40)]

    def step():
        half = torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext()
        with half:
            loss = model(xs).float().square().mean()
        loss.backward()

    step()  # libraries may wait when they are first used
    with refused_waits():
        step()
        step()


def test_labels_on_the_gpu_are_counted_without_synchronisation():
    module = segmentation().cuda()
    batches = [{"seg_label": torch.randint(-1, 5, (2, 4, size), device="cuda")} for size in (5, 7)]
    with refused_waits():
        weighed = module.prepare_scatter(batches)
    valid = [int((batch["seg_label"] >= 0).sum()) for batch in batches]
    shares = torch.stack([batch["acc_weight"].cpu() for batch in weighed])
    want = 2 * torch.tensor(valid, dtype=torch.float64) / sum(valid)
    torch.testing.assert_close(shares, want)


def segmentation(encoder="resnet18dilated", width=512):
    opts = [
        *("MODEL.arch_encoder", encoder, "MODEL.arch_decoder", "ppm_deepsup"),
        *("MODEL.fc_dim", width, "MODEL.weights_encoder", "none", "DATASET.num_class", 5),
    ]
    return ModelBuilder.from_config(load_config(None, opts), inference=False)


def resident():
    """Bytes of host memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_passes_leave_host_memory_as_it_is():
    model = UserScatteredDataParallel(network().cuda(), ["cuda:0", "cuda:0"])
    xs = [torch.randn(2, 3, size, 24, device="cuda") for size in (32, 40)]

    def passes(count):
        for _ in range(count):
            model(xs).mean().backward()
        torch.cuda.synchronize()

    passes(20)
    before = resident()
    passes(50)
    assert resident() - before < 8 << 20


def seconds(function):
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def test_two_replicas_cost_little_more_than_two_networks():
    module = segmentation("resnet50dilated", 2048).cuda().train()
    model = UserScatteredDataParallel(module, ["cuda:0", "cuda:0"])
    batches = [
        {
            "img_data": torch.randn(2, 3, 448, 608, device="cuda"),
            "seg_label": torch.randint(-1, 5, (2, 56, 76), device="cuda"),
        }
        for _ in range(2)
    ]
    found = {"one": [], "two": []}
    with torch.autocast("cuda", torch.bfloat16):
        for turn in range(25):
            times = {
                "one": seconds(lambda: [module(batch) for batch in batches]),
                "two": seconds(lambda: model(batches)),
            }
            if turn >= 5:
                for name, each in times.items():
                    found[name].append(each)
    one, two = median(found["one"]), median(found["two"])
    print(f"two single passes {1e3 * one:.1f} ms, two replicas {1e3 * two:.1f} ms")
    assert two <= 1.2 * one


# ------------------------------------------------------------------------------ processes
SIZES = [(2, 4, 5), (1, 7, 3)]


def feed(rank):
    n, h, w = SIZES[rank]
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(n, C, h, w, generator=generator, dtype=torch.float64) + 10 * rank
    return x.cuda(), torch.randn(n, C, h, w, generator=generator, dtype=torch.float64).cuda()


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, g = feed(rank)
    x.requires_grad_()
    layer = SynchronizedBatchNorm2d(C, device="cuda", dtype=torch.float64)
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], g)
    found = {"y": rows(y.detach()), "grads": grads, "state": layer.state_dict()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_on_one_gpu_equal_one(tmp_path):
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    got = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    xs, gs = zip(*map(feed, range(2)), strict=True)
    for x in xs:
        x.requires_grad_()
    layer = nn.BatchNorm1d(C, device="cuda", dtype=torch.float64)
    y = layer(torch.cat([rows(x) for x in xs]))
    want = torch.autograd.grad(y, [*xs, *layer.parameters()], torch.cat([rows(g) for g in gs]))
    torch.testing.assert_close(torch.cat([rank["y"] for rank in got]), y, **EXACT)
    for rank in range(2):
        torch.testing.assert_close(got[rank]["grads"][0], want[rank], **EXACT)
        torch.testing.assert_close(dict(got[rank]["state"]), dict(layer.state_dict()), **EXACT)
    for i in (1, 2):  # each process has its share of the parameters' gradients
        torch.testing.assert_close(sum(rank["grads"][i] for rank in got), want[1 + i], **EXACT)
