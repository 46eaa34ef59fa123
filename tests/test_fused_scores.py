"""The Triton kernels against the published procedure, and what happens where they do not work.

Without a GPU they run in triton's interpreter, which takes tensors of the CPU. It does not
compile, so that is done apart: for a GPU that need not be there.
"""

import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_scores import published, random_logits

from mit_semseg import scores

ROOT = Path(__file__).resolve().parents[1]


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------ the kernels
INTERPRETED = """
import json, sys
sys.path.insert(0, "tests")
import torch
import triton.runtime.interpreter as interpreter
from mit_semseg import fused_scores, scores
from test_scores import published, random_logits

# Triton's interpreter before 3.8 reads a scalar by int(array of one element): NumPy 2.5 refuses it.
patch = interpreter._patch_lang_tensor

def patched(tensor, *scope):
    patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())

interpreter._patch_lang_tensor = patched

def gap(logits, size):
    labels = fused_scores.class_map(logits, size)
    reference = published(logits, size)
    assert labels.dtype == torch.int64 and labels.shape == (reference.shape[0], *size)
    return float((reference.amax(1) - reference.gather(1, labels[:, None])[:, 0]).max())

result = {}
result["one scale"] = gap(random_logits((1, 19, 5, 7)), (13, 23))
several = [(2, 9, 5, 7), (2, 9, 8, 3), (2, 9, 1, 2)]
result["several scales, two samples"] = gap(random_logits(*several), (9, 17))
for dtype in (torch.bfloat16, torch.float16):
    result[str(dtype)] = gap(random_logits(*several[:2], dtype=dtype), (9, 11))
mixed = random_logits((1, 5, 4, 4), (1, 5, 3, 3))
mixed[1] = mixed[1].bfloat16()
result["mixed dtypes"] = gap(mixed, (7, 11))
result["one class"] = gap(random_logits((1, 1, 4, 4), (1, 1, 2, 3)), (9, 7))
result["eight classes"] = gap(random_logits((1, 8, 4, 4), (1, 8, 2, 3)), (9, 7))
result["one pixel"] = gap(random_logits((1, 5, 4, 4), (1, 5, 2, 3)), (1, 1))
result["smaller than the logits"] = gap(random_logits((1, 5, 24, 34), (1, 5, 9, 8)), (7, 11))
result["the same size"] = gap(random_logits((2, 5, 11, 9)), (11, 9))
result["large logits"] = gap([1e4 * x for x in random_logits(*several[:2])], (9, 11))
x = random_logits((1, 5, 4, 4))[0]
x[:, :, :2] = float("nan")
for logits in ([x], [x, x]):
    labels = fused_scores.class_map(logits, (8, 8))
    assert torch.equal(labels, scores.class_map(logits, (8, 8), fused=False))

# Of equal ones the first, within the classes taken together and beyond.
x = random_logits((1, 3, 4, 5))[0]
for count in (1, 2):
    labels = fused_scores.class_map([x.repeat(1, 4, 1, 1)] * count, (9, 11))
    assert torch.equal(labels, published([x] * count, (9, 11)).argmax(1))

# Any layout, copied and in place, and bands of rows that do not divide the image.
plain = random_logits((2, 9, 5, 7), (2, 9, 8, 3))
other = [
    plain[0].to(memory_format=torch.channels_last),
    torch.cat([plain[1], plain[1]], dim=3)[..., 3:],
]
result["channels_last"] = gap(other, (9, 11))
fused_scores._COPY_BYTES = 0
result["channels_last in place"] = gap(other, (9, 11))
fused_scores._STATISTICS = 4 * 11 * 5
result["bands"] = gap(other, (9, 11))

# As class_map gets there, by way of its trial.
scores._FUSED_DEVICES = ("cpu",)
labels = scores.class_map(plain, (9, 11), fused=True)
assert torch.equal(labels, scores.class_map(plain, (9, 11), fused=False))
assert list(scores._verdicts.values()) == [None]
print(json.dumps(result))
"""


def test_the_kernels_give_the_published_labels():
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.0.") and np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("the interpreter of triton 3.0 computes wrong offsets with NumPy 2")
    gaps = json.loads(run_python(INTERPRETED, TRITON_INTERPRET="1"))
    assert len(gaps) == 14
    # In probability; where logits are in the ten thousands, float32 holds them to 1e-3.
    wrong = {k: v for k, v in gaps.items() if v > (1e-3 if k == "large logits" else 1e-6)}
    assert not wrong


POINTERS = {"table": "*i64", "steps": "*fp32", "peaks": "*fp32", "weights": "*fp32"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu(dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from mit_semseg import fused_scores

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    new = "constexprs" in inspect.signature(ASTSource).parameters
    for kernel, constants in [
        (fused_scores._statistics_kernel, {"P": 128}),
        (fused_scores._labels_kernel, {"P": 128, "SOFTMAX": True}),
        (fused_scores._labels_kernel, {"P": 128, "SOFTMAX": False}),
    ]:
        types = {**POINTERS, "like": f"*{dtype}", "labels": "*i64"}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        if new:
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, signature, constexprs=constants)
        else:
            signature = {k: v for k, v in signature.items() if k not in constants}
            source = ASTSource(kernel, signature, constants=constants)
        options = {"num_warps": 4, "enable_fp_fusion": True}
        ptx = compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
        # A pixel stays in its thread: nothing goes from thread to thread.
        assert ".entry" in ptx and "shfl" not in ptx and "bar.sync" not in ptx


def test_triton_is_not_imported_before_it_is_needed():
    code = """
import sys, torch
before = "triton" in sys.modules
from mit_semseg import scores
scores.class_map([torch.zeros(1, 2, 3, 3)] * 2, (5, 5))
print(before or "triton" not in sys.modules)
"""
    assert run_python(code).strip() == "True"


# ------------------------------------------------------------------------------ the choice
class Kernels:
    """Stands in for the module of the kernels; does what it is told."""

    FAILURES = (RuntimeError, OSError)

    def __init__(self, do=None):
        self.do = do
        self.calls = []

    def class_map(self, logits, size):
        self.calls.append(size)
        if isinstance(self.do, Exception):
            raise self.do
        right = published(logits, size).argmax(1)
        return right if self.do is None else self.do(right)


@pytest.fixture
def install(monkeypatch):
    """Makes class_map try the given kernels, on the CPU, as if for the first time."""

    def install(kernels):
        monkeypatch.setattr(scores, "_FUSED_DEVICES", ("cpu",))
        monkeypatch.setattr(scores, "_verdicts", {})
        monkeypatch.setattr(scores, "_fused", lambda: kernels)

    return install


LOGITS = random_logits((2, 6, 5, 5), (2, 6, 7, 8))
SIZE = (20, 30)


def test_right_kernels_are_tried_once_and_used(install):
    kernels = Kernels()
    install(kernels)
    for _ in range(2):
        labels = scores.class_map(LOGITS, SIZE)
        assert torch.equal(labels, published(LOGITS, SIZE).argmax(1))
    trial, used = kernels.calls[:2], kernels.calls[2:]
    assert SIZE not in trial
    assert used == [SIZE, SIZE]
    # Another dtype is another kernel.
    scores.class_map([x.bfloat16() for x in LOGITS], SIZE, fused=True)
    assert len(kernels.calls) == 7


@pytest.mark.parametrize(
    ("do", "why"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease set CC"), "find C compiler. Please set"),
        (OSError("no ptxas"), "OSError: no ptxas"),
        (lambda right: 0 * right, "labels have probabilities below the maximum"),
        (lambda right: right - 7, "labels from -7"),
        (lambda right: right + 90, "to 100"),
    ],
)
def test_kernels_that_fail_leave_the_plain_form_and_one_warning(do, why, install, caplog):
    kernels = Kernels(do)
    install(kernels)
    with caplog.at_level(logging.WARNING, logger="mit_semseg"):
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            logits = [x.to(dtype) for x in LOGITS]
            labels = scores.class_map(logits, SIZE)
            assert torch.equal(labels, scores.class_map(logits, SIZE, fused=False))
    assert SIZE not in kernels.calls
    (record,) = caplog.records
    assert record.name == "mit_semseg" and why in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(ValueError, match="fused=True, but .*use fused=None") as raised:
        scores.class_map(LOGITS, SIZE, fused=True)
    assert why in str(raised.value)


def test_without_triton_the_plain_form_is_used(install, monkeypatch, caplog):
    true_fused = scores._fused
    install(None)
    monkeypatch.setattr(scores, "_fused", true_fused)
    monkeypatch.delitem(sys.modules, "mit_semseg.fused_scores", raising=False)
    monkeypatch.delattr("mit_semseg.fused_scores", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert scores.class_map(LOGITS, SIZE).shape == (2, *SIZE)
    (record,) = caplog.records
    assert "triton" in record.getMessage()


def test_out_of_memory_does_not_rule_the_kernels_out(install):
    install(Kernels(torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        scores.class_map(LOGITS, SIZE)
    assert not scores._verdicts


def test_inputs_that_the_kernels_do_not_take(install):
    with pytest.raises(ValueError, match="on cpu, not on CUDA"):
        scores.class_map(LOGITS, SIZE, fused=True)
    kernels = Kernels()
    install(kernels)
    scores.class_map(LOGITS, SIZE, fused=False)
    scores.probabilities(LOGITS, SIZE)
    double = [LOGITS[0], LOGITS[1].double()]
    assert scores.class_map(double, SIZE).shape == (2, *SIZE)
    with pytest.raises(ValueError, match="float64"):
        scores.class_map(double, SIZE, fused=True)
    assert not kernels.calls


def test_an_interface_that_changed_counts_as_no_triton(monkeypatch):
    monkeypatch.delitem(sys.modules, "mit_semseg.fused_scores", raising=False)
    monkeypatch.delattr("mit_semseg.fused_scores", raising=False)
    fake = SimpleNamespace(TritonError=RuntimeError)
    fake.language = fake  # without constexpr
    for name in ("triton", "triton.language", "triton.errors"):
        monkeypatch.setitem(sys.modules, name, fake)
    with pytest.raises(ImportError, match="triton does not load"):
        scores._fused()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cuda_gives_the_same(dtype, layout):
    shapes = [(2, 150, 38, 50), (2, 150, 57, 75), (2, 150, 75, 100)]
    logits = random_logits(*shapes, dtype=dtype)
    for scales in (logits, logits[:1]):
        moved = [x.to("cuda", memory_format=layout) for x in scales]
        labels = scores.class_map(moved, (487, 683), fused=True).cpu()
        reference = published(scales, (487, 683))
        gap = reference.amax(1) - reference.gather(1, labels[:, None])[:, 0]
        assert gap.max() <= 1e-5
