"""PPM decoders."""

import copy

import pytest
import torch
from decoder_tester import DecoderTester
from torch import nn

from mit_semseg.models.layers import PooledBatchNorm2d


class TestPPM(DecoderTester):
    arch = "ppm"
    published = (512,)


class TestPPMDeepSup(DecoderTester):
    arch = "ppm_deepsup"
    published = (320, 512, 2048)
    min_feature_maps = 2
    auxiliary = True


def test_a_single_value_is_normalised_with_running_statistics() -> None:
    torch.manual_seed(0)
    norm = PooledBatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(1, 4, 1, 1)
    wanted = (x - norm.running_mean.view(1, 4, 1, 1)) / (norm.running_var + 1e-5).sqrt().view(
        1, 4, 1, 1
    )
    torch.testing.assert_close(norm.train()(x), wanted)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(4).train()(x)


def test_several_values_are_normalised_as_torch_does() -> None:
    torch.manual_seed(0)
    norm, oracle = PooledBatchNorm2d(4).train(), nn.BatchNorm2d(4).train()
    x = torch.randn(2, 4, 1, 1)
    assert torch.equal(norm(x), oracle(x))
    assert torch.equal(norm.running_var, oracle.running_var)
