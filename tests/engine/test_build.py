"""Choices that building a training makes from settings, device and network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mit_semseg.config import load_config
from mit_semseg.engine.training.build import keeps_channels_last, shape_bucket
from mit_semseg.models import ENCODERS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "device", "fixed_size", "expected"),
    [
        ("auto", CPU, False, 1),  # figures of the CPU, and what it resumes, stay as they were
        ("auto", GPU, False, 64),
        ("auto", GPU, True, 1),
        (32, GPU, False, 32),
        (32, CPU, False, 32),
        ("off", GPU, False, 1),
    ],
)
def test_shapes_are_few_on_a_gpu(
    wanted: int | str, device: torch.device, fixed_size: bool, expected: int
) -> None:
    assert shape_bucket(wanted, device, fixed_size) == expected


@pytest.mark.parametrize(
    ("encoder", "device", "dtype", "expected"),
    [
        ("resnet18dilated", GPU, torch.bfloat16, True),
        ("resnet18dilated", GPU, torch.float16, True),
        ("resnet18dilated", GPU, None, False),
        ("resnext50", GPU, torch.bfloat16, True),  # grouped, not depthwise
        ("mobilenetv2dilated", GPU, torch.bfloat16, False),
        ("xception65", GPU, torch.float16, False),
        ("mobilenetv2dilated", CPU, torch.bfloat16, True),
        ("resnet18dilated", CPU, None, True),
    ],
)
def test_memory_format(
    encoder: str, device: torch.device, dtype: torch.dtype | None, expected: bool
) -> None:
    build: Callable[..., torch.nn.Module] = ENCODERS.get(encoder)
    module = build()
    assert keeps_channels_last("auto", device, dtype, module) is expected
    assert keeps_channels_last(True, device, dtype, module) is True
    assert keeps_channels_last(False, device, dtype, module) is False


def test_settings_of_both_are_read_from_files_and_commands() -> None:
    read = load_config(None, ["TRAIN.channels_last", "true", "TRAIN.shape_bucket", "32"]).TRAIN
    assert (read.channels_last, read.shape_bucket) == (True, 32)
    defaults = load_config(None).TRAIN
    assert (defaults.channels_last, defaults.shape_bucket) == ("auto", "auto")
    for key, value in (("channels_last", "maybe"), ("shape_bucket", "0"), ("shape_bucket", "x")):
        with pytest.raises(ValueError, match=f"TRAIN.{key} is .*; give .*auto"):
            load_config(None, [f"TRAIN.{key}", value])
