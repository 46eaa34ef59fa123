"""MobileNetV2 of torchvision and of TF-slim: conversions are exact."""

import os
from pathlib import Path

import pytest
import torch
from heads import Head
from torch import nn
from torchvision.models import mobilenet_v2

from mit_semseg.download import DownloadError
from mit_semseg.models import ENCODERS
from mit_semseg.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    convert_tfslim_mobilenet,
    load_encoder,
    load_into,
    rename_torchvision_mobilenet,
    sources,
)

REAL = (
    Path(os.environ.get("SEMSEG_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    / "../weights/mobilenet_v2_imagenet_tfslim.pth"
)


def torchvision_mobilenet(eps=1e-05):
    torch.manual_seed(0)
    net = mobilenet_v2(weights=None, norm_layer=lambda c: nn.BatchNorm2d(c, eps=eps))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch sets the running statistics
            nn.init.uniform_(module.weight, 0.05, 0.4)  # small, so that eps 1e-3 shows
            nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        net(torch.rand(4, 3, 96, 96) * 2 - 1)
    return net.eval()


def test_torchvision_weights_from_a_mirror_and_from_a_file(host, tmp_path, monkeypatch):
    source, target = torchvision_mobilenet(), ENCODERS.get("mobilenetv2")()
    path = tmp_path / "mine.pth"
    torch.save(source.state_dict(), path)
    report = load_encoder(target, "mobilenetv2dilated", f"torchvision:{path}")
    assert report is not None
    assert (report.ok, report.unexpected, len(report.matched)) == (True, [], 306)

    # The published file's digest is in its name, and ours is another file.
    torch.save(source.state_dict(), host / "mobilenet_v2-b0353104.pth")
    monkeypatch.setattr(sources, "mirrored", lambda name, urls: [(host / name).as_uri()])
    with pytest.raises(DownloadError, match="expected b0353104"):
        load_encoder(target, "mobilenetv2dilated", "torchvision:mobilenet_v2")


@pytest.mark.parametrize(
    ("arch", "name", "reason"),
    [
        ("resnet50dilated", "torchvision:resnet50", "7x7.*set .*_encoder to torchvision_resnet50"),
        ("resnet50dilated", "torchvision:mobilenet_v2", "'resnet50dilated': set .* to mobilenetv2"),
        ("torchvision_resnet50", "torchvision:resnet34", "set MODEL.arch_encoder to resnet34"),
        ("resnet18", "tfslim:x.pth", "mobilenetv2dilated"),
        ("mobilenetv2dilated", "torchvision:mobilenet_v3", "did you mean 'mobilenet_v2'"),
    ],
)
def test_weights_of_another_architecture_are_refused(arch, name, reason):
    with pytest.raises(ValueError, match=reason):
        load_encoder(Head(), arch, name)


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))]
)
def test_tfslim_conversion_is_exact(mean, std):
    """Both nets see one picture, each in its own convention; no zero padding is involved."""
    source = torchvision_mobilenet(eps=1e-3)
    target = ENCODERS.get("mobilenetv2")().eval()
    state = convert_tfslim_mobilenet(source.state_dict(), mean=mean, std=std)
    load_into(target, state, what="encoder", strict=True)
    nets = [source.features[:18].double(), target.features.double()]
    for net in nets:
        # Only the first convolution pads with another grey in either convention.
        net[0][0].padding = (0, 0)
    torch.manual_seed(1)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    y = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected, got = nets[0](2 * x - 1), nets[1](y)
        plain = rename_torchvision_mobilenet(source.float().state_dict())
        load_into(target.float(), plain, what="encoder")
        unconverted = target.double().features(2 * x - 1)  # only eps differs now
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert (unconverted - expected).abs().max() > 100 * tolerance


def test_tfslim_needs_a_mobilenet():
    with pytest.raises(ValueError, match="not a MobileNetV2"):
        convert_tfslim_mobilenet(Head().state_dict())


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there")
def test_the_real_tfslim_file_loads_and_is_the_same_net():
    source = mobilenet_v2(weights=None, norm_layer=lambda c: nn.BatchNorm2d(c, eps=1e-3))
    source.load_state_dict(torch.load(REAL, weights_only=True), strict=False)
    target = ENCODERS.get("mobilenetv2")().eval()
    report = load_encoder(target, "mobilenetv2dilated", f"tfslim:{REAL}")
    assert report is not None and report.ok
    torch.manual_seed(1)
    x = torch.rand(1, 3, 320, 320)
    y = (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = source.eval().features[:7](2 * x - 1)
        got = target.features[:7](y)
    # Stride 8 here: what the border's padding reaches stays within a few pixels of it.
    inner = (..., slice(8, -8), slice(8, -8))
    error = (got[inner] - expected[inner]).abs().max() / expected.abs().max()
    assert error < 1e-4
