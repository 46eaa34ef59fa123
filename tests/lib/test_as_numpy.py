"""Nested tensors, to and from numpy."""

from collections import namedtuple

import numpy as np
import pytest
import torch

from mit_semseg.lib.utils import as_numpy, as_variable, mark_volatile

Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (torch.float32, np.float32),
        (torch.float64, np.float64),
        (torch.float16, np.float16),
        (torch.bfloat16, np.float32),
        (torch.int64, np.int64),
        (torch.bool, np.bool_),
        (torch.uint8, np.uint8),
    ],
)
def test_dtype_and_values(dtype, want):
    array = as_numpy(torch.tensor([[0, 1], [1, 1]]).to(dtype))
    assert array.dtype == want
    np.testing.assert_array_equal(array, [[0, 1], [1, 1]])


def test_nested():
    tensor = torch.ones(2, requires_grad=True) * 3
    out = as_numpy({"a": [tensor, (tensor, 4)], "b": Pair(tensor, "text"), "c": None})
    for array in (out["a"][0], out["a"][1][0], out["b"].first):
        assert isinstance(array, np.ndarray) and array.tolist() == [3, 3]
    assert isinstance(out["a"][1], tuple) and out["a"][1][1] == 4
    assert out["b"].second == "text" and out["c"] is None


def test_variables_are_tensors():
    tensor = torch.ones(1)
    made = as_variable({"a": [tensor, 2], "b": (torch.zeros(1).numpy(), None, "name")})
    assert made["a"][0] is tensor
    assert torch.equal(made["a"][1], torch.tensor(2))
    assert isinstance(made["b"], tuple)
    assert torch.equal(made["b"][0], torch.zeros(1))
    assert made["b"][1:] == (None, "name")
    x = torch.ones(1, requires_grad=True)
    marked = mark_volatile({"x": [x], "n": 3})
    assert marked == {"x": [x], "n": 3} and marked["x"][0].no_grad is True
    (marked["x"][0] * 2).backward()
    assert x.grad is not None  # marking changes no gradient
