"""Choices that building a training makes from settings, device and network."""

import pytest
import torch

from mit_semseg.config import load_config
from mit_semseg.engine.training.build import build, keeps_channels_last, shape_bucket
from mit_semseg.models import ENCODERS
from mit_semseg.precision import Precision

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
def test_shape_bucket(wanted, device, fixed_size, expected):
    assert shape_bucket(wanted, device, fixed_size) == expected


@pytest.mark.parametrize(
    ("encoder", "device", "precision", "expected"),
    [
        ("resnet18dilated", GPU, "bf16", True),
        ("resnet18dilated", GPU, "fp16", True),
        ("resnet18dilated", GPU, "tf32", False),
        ("resnext50", GPU, "bf16", True),  # grouped, not depthwise
        ("mobilenetv2dilated", GPU, "bf16", False),
        ("xception65", GPU, "fp16", False),
        ("mobilenetv2dilated", CPU, "bf16", True),
        ("resnet18dilated", CPU, "fp32", True),
    ],
)
def test_memory_format(encoder, device, precision, expected):
    module = ENCODERS.get(encoder)()
    found = Precision.of(precision, device)
    assert keeps_channels_last("auto", found, module) is expected
    assert keeps_channels_last(True, found, module) is True
    assert keeps_channels_last(False, found, module) is False


def test_channels_last_and_shape_bucket_are_settings():
    read = load_config(None, ["TRAIN.channels_last", "true", "TRAIN.shape_bucket", "32"]).TRAIN
    assert (read.channels_last, read.shape_bucket) == (True, 32)
    defaults = load_config(None).TRAIN
    assert (defaults.channels_last, defaults.shape_bucket) == ("auto", "auto")
    for key, value in (("channels_last", "maybe"), ("shape_bucket", "0"), ("shape_bucket", "x")):
        with pytest.raises(ValueError, match=f"TRAIN.{key} is .*; give .*auto"):
            load_config(None, [f"TRAIN.{key}", value])


def test_the_loss_is_checked_before_the_data_is_read():
    cfg = load_config(None, ["TRAIN.loss", "nlll", "DATASET.root_dataset", "no such folder"])
    with pytest.raises(ValueError, match="unknown loss 'nlll'; did you mean 'nll'"):
        build(cfg, [CPU])
