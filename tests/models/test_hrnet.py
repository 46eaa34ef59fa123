"""HRNetV2 encoders."""

import pytest
import torch
from encoder_tester import EncoderTester

from mit_semseg.models import ENCODERS


class TestHRNetV2(EncoderTester):
    arch = "hrnetv2"
    published = "encoder/hrnetv2"


class TestHRNetV2W18(EncoderTester):
    arch = "hrnetv2_w18"


# As timm 1.0 counts stem, stages and transitions of hrnet_w18, hrnet_w32 and hrnet_w48.
@pytest.mark.parametrize(
    ("arch", "parameters"),
    [("hrnetv2_w18", 9_562_260), ("hrnetv2_w32", 29_305_536), ("hrnetv2", 65_325_120)],
)
def test_size(arch: str, parameters: int) -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get(arch)()
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert len(encoder.state_dict()) == 1830
