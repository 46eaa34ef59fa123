"""What the names of precisions mean on each device."""

import pytest
import torch

from mit_semseg import precision
from mit_semseg.arguments import PRECISIONS
from mit_semseg.precision import Precision, has_fast_bf16

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("device", "name", "dtype", "tf32"),
    [
        (CPU, "fp32", torch.float32, False),
        (CPU, "bf16", torch.bfloat16, False),
        (GPU, "fp32", torch.float32, False),
        (GPU, "tf32", torch.float32, True),
        (GPU, "bf16", torch.bfloat16, False),
        (GPU, "fp16", torch.float16, False),
    ],
)
def test_a_named_precision_is_what_it_says(monkeypatch, fast, device, name, dtype, tf32):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: fast)
    assert name in PRECISIONS
    assert Precision.of(name, device) == Precision(device, dtype, tf32)


@pytest.mark.parametrize("fast", [False, True])
def test_auto_takes_bf16_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: fast)
    for device in (CPU, GPU):
        slow = "fp32" if device is CPU else "tf32"
        assert Precision.of("auto", device) == Precision.of("bf16" if fast else slow, device)


def test_what_cannot_be_is_refused():
    for name in ("fp16", "tf32"):
        with pytest.raises(ValueError, match=f"VAL.p {name} needs a GPU; on the CPU use bf16 or"):
            Precision.of(name, CPU, "VAL.p")
    with pytest.raises(ValueError, match="precision is 'fp8'; give one of fp32, tf32, bf16, fp16"):
        Precision.of("fp8", CPU)


@pytest.mark.parametrize(
    ("capability", "fast"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_gpus_have_fast_bf16_from_ampere_on(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fast_bf16(GPU) is fast


@pytest.mark.parametrize("supported", [True, False, None])
def test_a_cpu_without_the_instructions_has_no_fast_bf16(monkeypatch, supported):
    name = "_is_avx512_bf16_supported"
    if supported is None:  # a torch that does not tell
        monkeypatch.delattr(torch.cpu, name, raising=False)
    else:
        monkeypatch.setattr(torch.cpu, name, lambda: supported, raising=False)
    assert has_fast_bf16(CPU) is bool(supported)


@pytest.mark.parametrize(("name", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_it(name, expected):
    a = torch.ones(2, 2)
    with Precision.of(name, CPU).autocast():
        assert (a @ a).dtype is expected
    assert (a @ a).dtype is torch.float32


def settings():
    """What torch says of TF32, by the names this release has."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        return [cudnn.conv.fp32_precision, matmul.fp32_precision]
    return [cudnn.allow_tf32, matmul.allow_tf32]


def test_products_follow_the_precision_and_the_setting_is_put_back():
    before = settings()
    with Precision.of("fp32", GPU).products():
        assert settings()[0] in ("ieee", False) and settings()[1] in ("ieee", False)
    assert settings() == before
    # Threads may overlap.
    first, second = (Precision.of(name, GPU).products() for name in ("fp32", "tf32"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings()[0] in ("tf32", True) and settings()[1] in ("tf32", True)
    second.__exit__(None, None, None)
    assert settings() == before


def test_other_ways_of_setting_it_still_work():
    before = torch.get_float32_matmul_precision()
    try:
        for name in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(name)
            with Precision.of("fp32", GPU).products():
                pass
            assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_fp32_is_true_float32():
    a = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1
    exact = a.double() @ a.double()
    weight, image = a.cuda()[:, :, None, None], a.cuda()[None, :, :, None]
    for name in ("fp32", "tf32"):
        with Precision.of(name, GPU).products():
            products = (a.cuda() @ a.cuda(), torch.nn.functional.conv2d(image, weight)[0, :, :, 0])
        for product in products:
            off = float((product.double().cpu() - exact).abs().max())
            assert (off < 1e-4) == (name == "fp32")
