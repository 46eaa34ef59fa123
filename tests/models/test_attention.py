"""Attention in chunks against the plain formula, and its memory."""

import subprocess
import sys

import pytest
import torch

from mit_semseg.models import attention
from mit_semseg.models.attention import attend, attend_maps


def plain(q, k, v, scale):
    return torch.softmax(scale * torch.einsum("bnd,bmd->bnm", q, k), dim=2) @ v


def inputs(B=2, N=23, M=17):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, N, 5), (B, M, 5), (B, M, 7)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("weights", [1, 2 * 17 * 5, 1 << 22])  # 23 chunks, 5 uneven ones, one
def test_values_and_gradients_are_those_of_the_formula(weights, monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK_CPU", weights)
    ours = [x.clone().requires_grad_() for x in inputs()]
    theirs = [x.clone().requires_grad_() for x in inputs()]
    given, wanted = attend(*ours, scale=0.7), plain(*theirs, scale=0.7)
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-13)
    direction = torch.randn_like(wanted)
    given.backward(direction)
    wanted.backward(direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    x, y = (inputs()[0].requires_grad_() for _ in range(2))  # one tensor for all three
    attend(x, x, x).square().sum().backward()
    plain(y, y, y, 1.0).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)


def test_compilation_does_not_unroll_the_chunks(monkeypatch):
    """Otherwise each number of chunks would be another graph, compiled for its image size."""
    monkeypatch.setattr(attention, "_CHUNK_CPU", 256)
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(attend_maps, backend=backend, dynamic=True, fullgraph=True)
    for side in (6, 8, 10, 12):
        query = torch.randn(1, 4, side, side, requires_grad=True)
        value = torch.randn(1, 3, side, side)
        given, wanted = compiled(query, query, value), attend_maps(query, query, value)
        torch.testing.assert_close(given, wanted)
        (ours,), (theirs,) = (torch.autograd.grad(x.sum(), query) for x in (given, wanted))
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert graphs[0] < 60


def test_the_custom_operators_pass_opcheck():
    q, k, v = (x.requires_grad_() for x in inputs())
    torch.library.opcheck(torch.ops.mit_semseg.attention, (q, k, v))


def test_attention_of_a_pixel_by_hand():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, c, *side) for c, side in ((3, (4, 5)), (3, (2, 3)), (6, (2, 3))))
    given = attend_maps(q, k, v)
    assert given.shape == (2, 6, 4, 5)
    weights = torch.softmax((k[1] * q[1, :, 2, 3, None, None]).sum(0).flatten(), 0)
    torch.testing.assert_close(given[1, :, 2, 3], (v[1].flatten(1) * weights).sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_half_precision_do_not_overflow(dtype):
    q, k, v = ((x * factor).to(dtype) for x, factor in zip(inputs(), (300, 300, 1), strict=True))
    with torch.autocast("cpu", dtype=dtype):
        given = attend(q, k, v)
    assert given.dtype == dtype
    wanted = plain(q.double(), k.double(), v.double(), 1.0)
    torch.testing.assert_close(given.double(), wanted, rtol=1e-2, atol=1e-2)


# Prints the peak of the resident memory in MiB beyond what there was before, forward and backward.
# The child asks for its own high-water mark: what the parent held has no part in it.
MEASURE = """
import re, sys, torch
from mit_semseg.models.attention import attend

def high() -> float:
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def run(side: int) -> None:
    q, k, v = (torch.randn(1, side * side, c, requires_grad=True) for c in (4, 4, 8))
    attend(q, k, v).square().sum().backward()

run(16)  # what torch loads at first use
before = high()
run(int(sys.argv[1]))
print(high() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("side", [80, pytest.param(128, marks=pytest.mark.slow)])
def test_memory_stays_far_below_that_of_all_weights(side):
    """Weights among 128x128 pixels are 1 GiB in float32, and training would hold several."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(side)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 64  # 26 to 42 were seen; all weights are 156 or 1024
