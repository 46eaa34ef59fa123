"""The copy for prediction: faster, and the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import rounding
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mit_semseg.dataset.transforms import Normalize
from mit_semseg.models import ModelBuilder, SegmentationModule, inference
from mit_semseg.models.inference import fold_batchnorm, inference_copy

PAIRS = [
    ("resnet18dilated", "ppm_deepsup"),
    pytest.param("resnet50", "upernet", marks=pytest.mark.slow),
    pytest.param("resnext101", "c1", marks=pytest.mark.slow),
    ("mobilenetv2dilated", "c1_deepsup"),
    pytest.param("hrnetv2", "c1", marks=pytest.mark.slow),
]


def trained(encoder: str, decoder: str) -> SegmentationModule:
    """A module whose BatchNorms do something, as after training."""
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, weights="none")
    dec = ModelBuilder.build_decoder(
        decoder, num_class=7, channels=enc.channels, strides=enc.strides, use_softmax=True
    )
    module = SegmentationModule(enc, dec, None)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
@torch.no_grad()
def test_the_copy_gives_the_same_logits(encoder: str, decoder: str) -> None:
    module = trained(encoder, decoder)
    before = copy.deepcopy(module.state_dict())
    image = torch.randn(1, 3, 64, 96)
    fast = inference_copy(module, "cpu")
    # Through dozens of layers float32 rounds differently; logits are of the order of their spread.
    expected = module.eval().logits(image)
    torch.testing.assert_close(fast.logits(image), expected, rtol=0, atol=rounding(expected, 100))
    left = [name for name, x in fast.named_modules() if isinstance(x, nn.BatchNorm2d)]
    assert all("deepsup" in name for name in left)  # the auxiliary head does not run
    # Probabilities, which the published convention asks for, come the same way.
    feed = {"img_data": image}
    given, wanted = fast(feed, segSize=(50, 70)), module(feed, segSize=(50, 70))
    torch.testing.assert_close(given, wanted, rtol=0, atol=rounding(expected, 100))
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_copy_needs_no_mode_and_leaves_it() -> None:
    module = trained("resnet18dilated", "c1").train()
    fast = inference_copy(module, "cpu")
    assert module.training
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in module.parameters())


class Block(nn.Module):
    """A convolution with a BatchNorm, wired in several ways."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        match self.wiring:
            case "read twice":
                return self.bn(y) + y
            case "other order":
                return self.conv(self.bn(x))
            case "conv twice":
                return self.bn(self.conv(y))
            case "norm twice":
                return self.bn(self.bn(y))
            case "in a list":
                return torch.cat([self.bn(y), y], dim=1)
            case "between":
                return self.bn(torch.relu(y))
        return self.bn(y)


@pytest.mark.parametrize(
    ("wiring", "count"),
    [
        ("plain", 1),
        ("read twice", 0),
        ("other order", 0),
        ("conv twice", 0),
        ("norm twice", 0),
        ("in a list", 0),
        ("between", 0),
    ],
)
@torch.no_grad()
def test_only_what_may_be_folded_is(wiring: str, count: int) -> None:
    torch.manual_seed(0)
    block = Block(wiring).double()
    block.bn.running_mean.normal_()
    block.bn.running_var.uniform_(0.5, 2)
    block.bn.weight.normal_()
    block.eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = block(x)
    assert fold_batchnorm(block, lambda: block(x)) == count
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_norms_without_weights_and_depthwise_filters_are_folded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8, affine=False, eps=1e-3)
    ).double()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    net.eval()
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    expected = net(x)
    assert fold_batchnorm(net, lambda: net(x)) == 1
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(net[1], nn.Identity)


def test_batch_statistics_are_not_folded() -> None:
    block = Block("plain").train()
    with pytest.raises(ValueError, match="training mode"):
        fold_batchnorm(block, lambda: block(torch.zeros(1, 4, 5, 5)))
    loose = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert fold_batchnorm(loose, lambda: loose(torch.zeros(1, 3, 4, 4))) == 0


def test_bytes_without_a_normalization_are_refused() -> None:
    module = trained("resnet18dilated", "c1").eval()
    with pytest.raises(ValueError, match="uint8.*normalize"):
        module.logits(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@torch.no_grad()
def test_the_normalization_given_is_the_copys_alone() -> None:
    module = trained("resnet18dilated", "c1").eval()
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    wanted = module.logits(2 * (pixels / 255 - 0.5))
    given = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    fast = inference_copy(module, "cpu", given)
    atol = rounding(wanted, 20)
    torch.testing.assert_close(fast.logits(pixels), wanted, rtol=0, atol=atol)
    assert module.normalize is None
    # It goes before the module's own, which stays where it is.
    module.normalize = Normalize()
    fast = inference_copy(module, "cpu", given)
    torch.testing.assert_close(fast.logits(pixels), wanted, rtol=0, atol=atol)
    assert inference_copy(module, "cpu").normalize is not module.normalize


class Plain(nn.Module):
    """An encoder that knows nothing of `Encoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        return [self.conv(x)]


@torch.no_grad()
def test_any_module_may_be_the_encoder() -> None:
    decoder = ModelBuilder.build_decoder("c1", num_class=3, channels=(4,), strides=(1,))
    module = SegmentationModule(Plain(), decoder, None).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(inference_copy(module, "cpu").logits(x), module.logits(x))


@torch.no_grad()
def test_some_layers_stay_in_float32() -> None:
    module = trained("mobilenetv2dilated", "c1_deepsup")
    fast = inference_copy(module, "cpu", dtype=torch.bfloat16)
    seen = {}
    for name, layer in fast.encoder.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.dtype}))
    assert fast.logits(torch.randn(1, 3, 64, 64)).dtype == torch.bfloat16
    single = {name for name, dtype in seen.items() if dtype == torch.float32}
    assert len(single) == 3  # the stem, and the two convolutions of the first block
    assert all(name.startswith(("features.0.", "features.1.")) for name in single)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    # They were never rounded; and such a copy can be cast to float32 again.
    folded = inference_copy(module, "cpu")
    for name, value in folded.encoder.features[1].state_dict().items():
        assert torch.equal(fast.encoder.features[1].layer.state_dict()[name], value)
    again = inference_copy(fast, "cpu", dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.logits(torch.randn(1, 3, 64, 64)).dtype == torch.float32


class Casts(TorchDispatchMode):
    """Counts operators, those that change a type, and those that read a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.casts = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operators += 1
        self.casts += func is torch.ops.aten._to_copy.default and "dtype" in kwargs
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("encoder", "decoder", "most"),
    [("resnet50dilated", "ppm_deepsup", 25), ("mobilenetv2dilated", "c1_deepsup", 6)],
)
@torch.no_grad()
def test_weights_are_cast_once(encoder: str, decoder: str, most: int) -> None:
    fast = inference_copy(trained(encoder, decoder), "cpu", dtype=torch.bfloat16)
    image = torch.randn(1, 3, 64, 64)
    fast.logits(image)  # makes the matrices that are kept
    with Casts() as counted:
        fast.logits(image)
    assert counted.operators > 30
    assert counted.casts <= most and counted.reads == 0


class Mixed(nn.Module):
    """An encoder that computes with a tensor of its own type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        return [nn.functional.conv2d(self.conv(x), torch.ones(4, 4, 1, 1))]


def test_a_layer_that_cannot_be_cast_is_named() -> None:
    decoder = ModelBuilder.build_decoder("c1", num_class=3, channels=(4,), strides=(1,))
    module = SegmentationModule(Mixed(), decoder, None).eval()
    with pytest.raises(ValueError, match=r"Mixed with C1 cannot compute in torch.bfloat16"):
        inference_copy(module, "cpu", dtype=torch.bfloat16)


class ActivatedNorm(nn.BatchNorm2d):
    """A BatchNorm with its activation built in, as some libraries have."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class StandardizedConv(nn.Conv2d):
    """A convolution that standardises its filters when it is used."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / weight.std(), self.bias)


class Odd(nn.Module):
    """An encoder that nobody foresaw."""

    def __init__(self, conv: type[nn.Conv2d], norm: type[nn.BatchNorm2d], least: int = 0) -> None:
        super().__init__()
        self.conv, self.least = conv(3, 16, 3, padding=1), least
        self.bn = norm(16)

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        if x.shape[-1] < self.least:
            raise ValueError(f"images must be {self.least} wide")
        return [self.bn(input=self.conv(x))]


class Listed(Odd):
    """Reaches its BatchNorm by something else than its name."""

    def __init__(self, *kinds: Any) -> None:
        super().__init__(*kinds)
        self.norms = [self.bn]

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        return [self.norms[0](self.conv(x))]


@pytest.mark.parametrize(
    ("encoder", "warned"),
    [
        (Odd(nn.Conv2d, nn.BatchNorm2d), ""),
        (Odd(nn.Conv2d, ActivatedNorm), "would change the logits"),
        (Odd(StandardizedConv, nn.BatchNorm2d), "would change the logits"),
        (Listed(nn.Conv2d, nn.BatchNorm2d), "would change the logits"),
        (Odd(nn.Conv2d, nn.BatchNorm2d, 200), "images must be 200 wide"),
    ],
)
@torch.no_grad()
def test_custom_layers_never_change_the_result(
    encoder: Odd, warned: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    encoder.bn.running_mean.normal_()
    encoder.bn.running_var.uniform_(0.2, 0.5)
    decoder = ModelBuilder.build_decoder("c1", num_class=4, channels=(16,), strides=(1,))
    module = SegmentationModule(encoder, decoder, None).eval()
    x = torch.randn(1, 3, 32, 256)
    expected = module.logits(x)
    with caplog.at_level("WARNING", logger="mit_semseg"):
        fast = inference_copy(module, "cpu")
    torch.testing.assert_close(fast.logits(x), expected, rtol=1e-3, atol=1e-4)
    assert (warned in caplog.text) if warned else not caplog.text
    assert isinstance(fast.encoder.bn, nn.Identity) is not bool(warned)


class Jumpy(Odd):
    """Makes a jump of a rounding error, as pooling indices do where two maxima are equal."""

    def forward(self, x: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        (y,) = super().forward(x)
        return [y + (y * 2**22).round() % 2]


@torch.no_grad()
def test_folding_is_not_blamed_for_jumps_of_rounding(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    encoder = Jumpy(nn.Conv2d, nn.BatchNorm2d)
    encoder.bn.running_var.uniform_(0.5, 2)
    decoder = ModelBuilder.build_decoder("c1", num_class=4, channels=(16,), strides=(1,))
    module = SegmentationModule(encoder, decoder, None).eval()
    assert inference._trial(module)[1] > 0.01
    with caplog.at_level("WARNING", logger="mit_semseg"):
        fast = inference_copy(module, "cpu")
    assert not caplog.text and isinstance(fast.encoder.bn, nn.Identity)


@torch.no_grad()
def test_double_precision_and_weight_norm_are_taken() -> None:
    module = trained("resnet18dilated", "c1").double()
    nn.utils.parametrizations.weight_norm(module.encoder.layer1[0].conv1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = module.eval().logits(x)
    torch.testing.assert_close(inference_copy(module, "cpu").logits(x), expected)


def test_ppm_as_it_was_published_is_taken() -> None:
    """Code derived from the published decoder joins resized pools itself."""
    module = trained("resnet18dilated", "ppm").eval()
    x = torch.randn(1, 512, 6, 7)
    pools = [nn.functional.interpolate(p(x), (6, 7), mode="bilinear") for p in module.decoder.ppm]
    given = module.decoder.conv_last(torch.cat([x, *pools], dim=1))
    wanted = module.decoder.logits([x])[0]
    torch.testing.assert_close(given, wanted, rtol=0, atol=rounding(wanted, 4))
