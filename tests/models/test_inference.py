"""The copy for prediction: same results, folded BatchNorms, fewer operators."""

import copy

import pytest
import torch
from pairs import Pair, randomise
from tolerances import rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mit_semseg.dataset.transforms import Normalize
from mit_semseg.models import ModelBuilder, SegmentationModule, inference
from mit_semseg.models.inference import fold_batchnorm, inference_copy


@pytest.fixture(autouse=True)
def small_checks(monkeypatch):
    """The copy is compared with the module below: its own check may use a smaller image."""
    monkeypatch.setattr(inference, "_CHECK_SIZES", ((64, 64),))


def trained(encoder, decoder):
    """A module whose BatchNorms have weights and statistics as after training."""
    module = Pair(encoder, decoder).build()
    module.decoder.use_softmax = True
    randomise(module, statistics=True)
    return module


@torch.no_grad()
def test_the_copy_gives_the_same_and_leaves_the_module_alone():
    """In float32; test_pairs.py compares all models in float64."""
    module = trained("resnet18dilated", "ppm_deepsup").train()
    before = copy.deepcopy(module.state_dict())
    image = torch.randn(1, 3, 64, 96)
    fast = inference_copy(module, "cpu")
    assert module.training and not fast.training
    # Through dozens of layers float32 rounds differently; logits are of the order of their spread.
    expected = module.eval().logits(image)
    torch.testing.assert_close(fast.logits(image), expected, rtol=0, atol=rounding(expected, 100))
    left = [name for name, x in fast.named_modules() if isinstance(x, nn.BatchNorm2d)]
    assert all("deepsup" in name for name in left)  # the auxiliary head does not run
    # Probabilities, which the published convention asks for, come the same way.
    feed = {"img_data": image}
    given, wanted = fast(feed, segSize=(50, 70)), module(feed, segSize=(50, 70))
    torch.testing.assert_close(given, wanted, rtol=0, atol=rounding(expected, 100))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in module.parameters())


class Block(nn.Module):
    """A convolution with a BatchNorm, wired in several ways."""

    def __init__(self, wiring):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.wiring = wiring

    def forward(self, x):
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
    "wiring",
    [*("plain", "read twice", "other order", "conv twice", "norm twice", "in a list", "between")],
)
@torch.no_grad()
def test_only_exclusive_pairs_are_folded(wiring):
    torch.manual_seed(0)
    block = Block(wiring).double()
    block.bn.running_mean.normal_()
    block.bn.running_var.uniform_(0.5, 2)
    block.bn.weight.normal_()
    block.eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = block(x)
    assert fold_batchnorm(block, lambda: block(x)) == (wiring == "plain")
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_norms_without_weights_and_depthwise_filters_are_folded():
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


def test_batch_statistics_are_not_folded():
    block = Block("plain").train()
    with pytest.raises(ValueError, match="training mode"):
        fold_batchnorm(block, lambda: block(torch.zeros(1, 4, 5, 5)))
    loose = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert fold_batchnorm(loose, lambda: loose(torch.zeros(1, 3, 4, 4))) == 0


@torch.no_grad()
def test_the_given_normalization_is_used_by_the_copy_only():
    module = trained("resnet18dilated", "c1").eval()
    with pytest.raises(ValueError, match="uint8.*normalize"):
        module.logits(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
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


@torch.no_grad()
def test_some_layers_stay_in_float32():
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

    def __init__(self):
        super().__init__()
        self.operators = self.casts = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operators += 1
        self.casts += func is torch.ops.aten._to_copy.default and "dtype" in kwargs
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("encoder", "decoder", "most"),
    [("resnet18dilated", "ppm_deepsup", 25), ("mobilenetv2dilated", "c1_deepsup", 6)],
)
@torch.no_grad()
def test_weights_are_cast_once(encoder, decoder, most):
    fast = inference_copy(trained(encoder, decoder), "cpu", dtype=torch.bfloat16)
    image = torch.randn(1, 3, 64, 64)
    fast.logits(image)  # makes the matrices that are kept
    with Casts() as counted:
        fast.logits(image)
    assert counted.operators > 30
    assert counted.casts <= most and counted.reads == 0


class Mixed(nn.Module):
    """No `Encoder`; it computes with a tensor of its own type."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x, return_feature_maps=False):
        return [nn.functional.conv2d(self.conv(x), torch.ones(4, 4, 1, 1))]


@torch.no_grad()
def test_any_module_may_be_the_encoder_and_is_named_if_it_cannot_be_cast():
    decoder = ModelBuilder.build_decoder("c1", num_class=3, channels=(4,), strides=(1,))
    module = SegmentationModule(Mixed(), decoder, None).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(inference_copy(module, "cpu").logits(x), module.logits(x))
    with pytest.raises(ValueError, match=r"Mixed with C1 cannot compute in torch.bfloat16"):
        inference_copy(module, "cpu", dtype=torch.bfloat16)


class ActivatedNorm(nn.BatchNorm2d):
    """A BatchNorm with its activation built in, as some libraries have."""

    def forward(self, input):
        return super().forward(input).relu()


class StandardizedConv(nn.Conv2d):
    """A convolution that standardises its filters when it is used."""

    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / weight.std(), self.bias)


class Odd(nn.Module):
    """An encoder that nobody foresaw."""

    def __init__(self, conv, norm, least=0):
        super().__init__()
        self.conv, self.least = conv(3, 16, 3, padding=1), least
        self.bn = norm(16)

    def forward(self, x, return_feature_maps=False):
        if x.shape[-1] < self.least:
            raise ValueError(f"images must be {self.least} wide")
        return [self.bn(input=self.conv(x))]


class Listed(Odd):
    """Reaches its BatchNorm by something else than its name."""

    def __init__(self, *kinds):
        super().__init__(*kinds)
        self.norms = {"bn": self.bn}  # lists are followed

    def forward(self, x, return_feature_maps=False):
        return [self.norms["bn"](self.conv(x))]


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
def test_custom_layers_never_change_the_result(encoder, warned, caplog):
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

    def forward(self, x, return_feature_maps=False):
        (y,) = super().forward(x)
        return [y + (y * 2**22).round() % 2]


@torch.no_grad()
def test_folding_is_kept_if_rounding_swaps_pooling_indices(caplog):
    torch.manual_seed(0)
    encoder = Jumpy(nn.Conv2d, nn.BatchNorm2d)
    encoder.bn.running_var.uniform_(0.5, 2)
    decoder = ModelBuilder.build_decoder("c1", num_class=4, channels=(16,), strides=(1,))
    module = SegmentationModule(encoder, decoder, None).eval()
    assert inference._fold_and_compare(module)[1] > 0.01
    with caplog.at_level("WARNING", logger="mit_semseg"):
        fast = inference_copy(module, "cpu")
    assert not caplog.text and isinstance(fast.encoder.bn, nn.Identity)


@torch.no_grad()
def test_double_precision_and_weight_norm_are_supported():
    module = trained("resnet18dilated", "c1").double()
    nn.utils.parametrizations.weight_norm(module.encoder.layer1[0].conv1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = module.eval().logits(x)
    torch.testing.assert_close(inference_copy(module, "cpu").logits(x), expected)
