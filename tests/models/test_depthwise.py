"""DepthwiseConv2d against nn.Conv2d, whose parameters and results it shares."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mit_semseg.models.depthwise import DepthwiseConv2d, contiguous_conv2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding", "size"),
    [
        (3, 1, 1, 1, (13, 17)),
        (3, 1, 2, 2, (13, 17)),
        (3, 1, 4, 4, (14, 9)),
        (3, 1, 3, 1, (13, 17)),
        (3, 1, 2, 0, (12, 11)),
        (3, 2, 1, 1, (13, 16)),
        (3, 2, 1, 1, (12, 15)),
        (5, 1, 1, 2, (13, 17)),
        (5, 2, 1, 2, (12, 15)),
        (5, 2, 1, 0, (12, 15)),
        (5, 1, 2, 4, (13, 17)),
        (7, 1, 1, 3, (13, 17)),
        (4, 2, 1, 1, (13, 16)),
        ((1, 11), 1, 1, (0, 5), (13, 17)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(dtype, kernel, stride, dilation, padding, size, bias):
    torch.manual_seed(0)
    options = {"groups": 6, "bias": bias}
    ours = DepthwiseConv2d(6, 6, kernel, stride, padding, dilation, **options).to(dtype)
    # The oracle computes in float64 from the same (rounded) values.
    oracle = nn.Conv2d(6, 6, kernel, stride, padding, dilation, **options).double()
    oracle.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
    x = torch.randn(2, 6, *size, dtype=dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    expected = oracle(x64)
    grad = torch.randn_like(expected).to(dtype)
    expected.backward(grad.double())
    got = ours(x)
    got.backward(grad)
    relative = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    pairs = [(got, expected), (x.grad, x64.grad), (ours.weight.grad, oracle.weight.grad)]
    if bias:
        pairs.append((ours.bias.grad, oracle.bias.grad))
    for have, want in pairs:
        assert have.dtype == dtype
        torch.testing.assert_close(
            have.double(), want, rtol=relative, atol=relative * want.abs().max().item()
        )


def test_autocast_keeps_float32_gradients():
    conv = DepthwiseConv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(torch.randn(1, 4, 9, 9))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"padding": "same"}, (1, 4, 8, 8)),
        ({"padding": 3}, (1, 4, 8, 8)),  # wider than the filter reaches
        ({"padding": 1, "padding_mode": "reflect"}, (1, 4, 8, 8)),
        ({"padding": 1}, (4, 8, 8)),
    ],
)
def test_other_options_are_computed_by_torch(options, shape):
    ours = DepthwiseConv2d(4, 4, 3, groups=4, bias=False, **options)
    oracle = nn.Conv2d(4, 4, 3, groups=4, bias=False, **options)
    oracle.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(ours(x), oracle(x))
    ours(x).square().sum().backward()
    oracle(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, oracle.weight.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_planar_form_is_torchs(layout):
    """What a GPU computes dilated layers by."""
    torch.manual_seed(0)
    conv = DepthwiseConv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False).double()
    conv.to(memory_format=layout)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64).contiguous(memory_format=layout)
    x.requires_grad_()
    given, wanted = contiguous_conv2d(conv, x), F.conv2d(x, conv.weight, None, 1, 2, 2, 6)
    assert given.is_contiguous(memory_format=layout)
    torch.testing.assert_close(given, wanted)
    towards = torch.randn_like(wanted)
    inputs = [x, conv.weight]
    mine, its = (torch.autograd.grad(y, inputs, towards) for y in (given, wanted))
    torch.testing.assert_close(mine, its)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_dilated_layers_faster_than_cudnn(dtype):
    conv = DepthwiseConv2d(384, 384, 3, padding=2, dilation=2, groups=384, bias=False)
    conv.to("cuda", dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(1, 384, 64, 84, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    milliseconds = []
    for run in (conv, lambda x: F.conv2d(x, conv.weight, None, 1, 2, 2, 384)) * 2:
        run(x)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            run(x)
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(end) / 20)
    print(f"{dtype}: planar {milliseconds[2]:.3f} ms, channels last {milliseconds[3]:.3f} ms")
    assert milliseconds[2] < milliseconds[3]
