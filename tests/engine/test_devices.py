"""Devices that the user names, and what is said of wrong ones."""

import pytest
import torch

from mit_semseg.engine.devices import resolve_devices


@pytest.mark.parametrize(
    ("count", "text", "expected"),
    [
        (0, None, "cpu"),
        (2, None, "cuda:0 cuda:1"),
        (0, "cpu", "cpu"),
        (2, "cpu", "cpu"),
        (4, "0-2", "cuda:0 cuda:1 cuda:2"),
        (4, "3,0", "cuda:3 cuda:0"),
        (4, "gpu1-gpu2", "cuda:1 cuda:2"),
        (8, "0-1,5,1", "cuda:0 cuda:1 cuda:5"),
        (2, "2", "--gpus 2, but this machine has 2 GPUs; the first is 0"),
        (1, "0-3", "--gpus 0-3, but this machine has 1 GPU; the first is 0"),
        (0, "0", "--gpus 0, but this machine has no GPU that torch can use; --gpus cpu runs"),
        (2, "cpu,0", "--gpus cpu,0: name GPUs or cpu, not both"),
        (2, "", "invalid devices ''; give 0-3, 0,2, gpu0-gpu2, cpu or mps"),
        (2, "all", "invalid devices 'all'; give 0-3"),
        (2, "0,,1", "invalid devices '0,,1'; give 0-3"),
        (2, "-1", "invalid devices '-1'; give 0-3"),
    ],
)
def test_devices(monkeypatch, count, text, expected):
    """On a machine with so many GPUs: the devices, or the beginning of the error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if expected.startswith(("cpu", "cuda")):
        assert " ".join(map(str, resolve_devices(text))) == expected
    else:
        with pytest.raises(ValueError) as error:
            resolve_devices(text)
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
