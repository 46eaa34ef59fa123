"""Training with torch.compile."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from processes import ROOT
from small_runs import CPU, Small

from mit_semseg.engine.training.build import build
from mit_semseg.losses import build_loss
from mit_semseg.models import DECODERS, SegmentationModule
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.compilation import compile_for_training, compiler_errors


def small():
    torch.manual_seed(0)
    return SegmentationModule(Small(), DECODERS.get("c1")((16,), 3), build_loss("nll", 3))


def test_compilation_needs_one_device(settings):
    cfg = settings(TRAIN__compile=True)
    for devices, world in (([CPU, CPU], 1), ([CPU], 2)):
        with pytest.raises(ValueError, match=r"with 2 devices.*set TRAIN\.compile False"):
            build(cfg, devices, 0, world)


@pytest.mark.parametrize(
    "message",
    [
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx",
        "Cannot find a working triton installation. Either the package is not installed or",
        "Compiler: cl is not found.",
    ],
)
def test_without_a_compiler_the_fix_is_named(message):
    fix = r"install a C\+\+ compiler.*TRAIN\.compile, .* False"
    with pytest.raises(ValueError, match=fix), compiler_errors():
        raise RuntimeError(f"backend='inductor' raised:\n{message}")
    with pytest.raises(RuntimeError, match="out of memory"), compiler_errors():
        raise RuntimeError("CUDA out of memory")


@pytest.mark.slow
def test_without_a_compiler_the_first_step_fails(tmp_path):
    code = """
import torch
from mit_semseg.models.compilation import compiler_errors
relu = torch.compile(torch.nn.ReLU().forward)
try:
    with compiler_errors():
        relu(torch.ones(2, 3, requires_grad=True) + 1)
except ValueError as error:
    print(error)
"""
    nowhere = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    words, options = [sys.executable, "-c", code], {"timeout": 240, "text": True, "check": True}
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, **options
    )
    assert "install a C++ compiler" in done.stdout


def test_only_training_is_compiled(monkeypatch):
    """Without code generation, for speed: what is entered, with which sizes and names."""
    seen = []

    def compile_nothing(function, **options):
        assert options == {"dynamic": True}

        def call(*args, **more):
            seen.append(function.__name__)
            return function(*args, **more)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    plain = small()
    other = copy.deepcopy(plain)
    compile_for_training(other)
    batch = {"img_data": torch.randn(1, 3, 16, 16), "seg_label": torch.zeros(1, 4, 4).long()}
    assert torch.equal(other(batch)[0], plain(batch)[0])
    assert seen == ["encode", "decode"]
    assert list(other.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(other)
    twin.decoder.conv_last.bias.data[0] += 5.0
    assert not torch.equal(twin(batch)[0], other(batch)[0])
    assert len(seen) == 3 * 2
    other.eval()(batch)
    other(batch, segSize=(8, 8))
    assert len(seen) == 3 * 2, "evaluation enters nothing that is compiled"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("again", [False, True])
def test_compiled_equals_plain(again):
    plain = small().double()
    other = copy.deepcopy(plain)
    if again:
        checkpoint_activations(other.encoder)
    compile_for_training(other)
    for height, width in ((32, 48), (64, 40)):
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        batch = {
            "img_data": images,
            "seg_label": torch.randint(-1, 3, (2, height // 4, width // 4)),
        }
        results = []
        for module in (plain, other):
            module.zero_grad()
            loss, accuracy = module(batch)
            loss.backward()
            results.append([loss, accuracy, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(other.state_dict()), dict(plain.state_dict()))
