"""Encoders of timm: equality with timm's networks."""

import contextlib
import copy
import math
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairs import CLASSES, Pair, randomise, without_gradient
from tolerances import rounding
from torch import nn

from mit_semseg.config import load_options
from mit_semseg.download import DownloadError
from mit_semseg.lib.nn import UserScatteredDataParallel
from mit_semseg.models import ModelBuilder, SegmentationModule, check_pair, inference
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.builder import check_options
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.encoders.timm_backbone import TimmVariant, load_timm
from mit_semseg.models.encoders.timm_backbone import features as timm_features
from mit_semseg.models.encoders.vit_pyramid import SimplePyramid

timm = pytest.importorskip("timm")
REAL = (
    Path(os.environ.get("SEMSEG_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    / "../weights/tf_efficientnet_lite2_imagenet.pth"
)

# Name: arguments of timm's feature network, whether its maps are channels last, and the multiple of
# the sides of images.
FAMILIES = {
    "resnet10t": ({"out_indices": (1, 2, 3, 4)}, False, 32),
    "tf_efficientnet_lite0": ({"out_indices": (1, 2, 3, 4)}, False, 32),
    "mobilenetv3_small_050": ({"out_indices": (1, 2, 3, 4)}, False, 32),
    "convnext_atto": ({}, False, 32),
    "resnetv2_18d": ({"out_indices": (1, 2, 3, 4)}, False, 32),
    "hgnetv2_b0": ({}, False, 32),
    "swin_tiny_patch4_window7_224": ({"strict_img_size": False}, True, 32),
    "mambaout_femto": ({}, True, 32),
    "pvt_v2_b0": ({}, False, 32),
    "vit_tiny_patch16_224": (
        {"dynamic_img_size": True, "out_indices": (2, 5, 8, 11)},
        False,
        16,
    ),
    "eva02_tiny_patch14_224": (
        {"dynamic_img_size": True, "out_indices": (2, 5, 8, 11)},
        False,
        14,
    ),
}


@lru_cache(maxsize=1)
def made(name):
    """An encoder in evaluation mode with random BatchNorm statistics."""
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder(f"timm:{name}", weights="none")
    randomise(encoder, statistics=True)
    return encoder.eval()


def module_of(encoder):
    decoder = ModelBuilder.build_decoder(
        "c1", num_class=CLASSES, channels=encoder.channels, strides=encoder.strides
    )
    return SegmentationModule(encoder, decoder, None)


@pytest.mark.parametrize("name", FAMILIES, scope="class")
class TestFamily:
    @torch.no_grad()
    def test_maps_are_those_of_timm(self, name):
        options, channels_last, multiple = FAMILIES[name]
        encoder = made(name)
        theirs = timm.create_model(name, pretrained=False, features_only=True, **options).eval()
        theirs.load_state_dict(encoder.net.state_dict())
        assert encoder.channels == tuple(theirs.feature_info.channels())
        assert encoder.strides == tuple(theirs.feature_info.reduction())
        H, W = 2 * multiple, 3 * multiple
        image = torch.randn(1, 3, H, W - 1)
        # Padding is added at the right, and cut off the maps.
        expected = theirs(F.pad(image, (0, 1)))
        if channels_last:
            expected = [x.permute(0, 3, 1, 2) for x in expected]
        maps = encoder(image, return_feature_maps=True)
        assert [tuple(x.shape[1:]) for x in maps] == [
            (c, H // s, math.ceil((W - 1) / s)) for c, s in zip(encoder.channels, encoder.strides)
        ]
        for ours, its in zip(maps, expected, strict=True):
            its = its[..., : ours.shape[-2], : ours.shape[-1]]
            torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5 * float(its.abs().max()))

    def test_every_parameter_gets_the_same_gradient_with_checkpointing(self, name):
        plain, checkpointed = copy.deepcopy(made(name)), copy.deepcopy(made(name))
        assert len(checkpoint_activations(checkpointed)) >= 4
        image = torch.randn(2, 3, 32, 64)
        for encoder in (plain, checkpointed):
            maps = encoder(image, return_feature_maps=True)
            values = [(x * torch.linspace(-1, 1, x.shape[1])[:, None, None]).mean() for x in maps]
            sum(values).backward()
        assert without_gradient(plain) == []
        for mine, its in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(its.grad, mine.grad, rtol=1e-4, atol=1e-7)

    @torch.no_grad()
    def test_the_copy_for_prediction_folds_and_casts(self, name, caplog, monkeypatch):
        # Results are compared below: the copy's own check may use the smallest image.
        monkeypatch.setattr(inference, "_CHECK_SIZES", ((64, 64),))
        module = module_of(made(name)).eval()
        image = torch.randn(1, 3, 64, 96)
        expected = module.logits(image)
        fast = inference.inference_copy(module, "cpu")
        assert "not folded" not in caplog.text
        norms = [sum(isinstance(x, nn.BatchNorm2d) for x in m.modules()) for m in (module, fast)]
        assert norms[0] > norms[1] == (8 if name == "resnetv2_18d" else 0)  # 8 follow sums
        scale = float(expected.std())
        torch.testing.assert_close(fast.logits(image), expected, rtol=0, atol=1e-4 * scale)
        half = inference.inference_copy(fast, "cpu", dtype=torch.bfloat16)
        assert (half.logits(image).float() - expected).abs().mean() < 0.1 * scale


def test_depthwise_convolutions_take_the_fast_path_and_give_the_same():
    encoder = made("tf_efficientnet_lite0")
    fast = [x for x in encoder.modules() if isinstance(x, DepthwiseConv2d)]
    plain = timm.create_model("tf_efficientnet_lite0", features_only=True)
    depthwise = [
        x for x in plain.modules() if isinstance(x, nn.Conv2d) and x.groups == x.in_channels > 1
    ]
    assert len(fast) == len(depthwise) > 10
    for side in (17, 20):  # "SAME" padding of even and odd sides
        for ours, its in zip(fast, depthwise, strict=True):
            its.load_state_dict(ours.state_dict())
            x = torch.randn(1, ours.in_channels, side, side + 3, requires_grad=True)
            expected, given = its(x), ours(x)
            torch.testing.assert_close(given, expected)
            weights = torch.randn_like(expected)
            gradients = [
                torch.autograd.grad((y * weights).sum(), (x, layer.weight))
                for y, layer in ((expected, its), (given, ours))
            ]
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_replicas_normalise_as_one():
    """Loss, running statistics and gradients are those of the union of the batches."""
    torch.manual_seed(0)
    whole = Pair("timm:resnet10t", "c1").build().double().train()
    apart = copy.deepcopy(whole)
    parts = [
        {
            "img_data": torch.randn(n, 3, 64, 64, dtype=torch.float64),
            "seg_label": torch.randint(CLASSES, (n, 8, 8)),
        }
        for n in (1, 2)
    ]
    loss, _ = whole({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    loss.backward()
    losses, _ = UserScatteredDataParallel(apart, device_ids=["cpu", "cpu"])(parts)
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), loss)
    torch.testing.assert_close(apart.state_dict(), whole.state_dict())
    for mine, its in zip(whole.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(its.grad, mine.grad)


# ------------------------------------------------------------------------------ declarations
@pytest.mark.parametrize(
    ("name", "output_stride", "strides"),
    [
        ("resnet10t", 8, (4, 8, 8, 8)),
        ("tf_efficientnet_lite0", 16, (4, 8, 16, 16)),
        ("convnext_atto", 16, (4, 8, 16, 16)),
        ("vgg16", 32, (4, 8, 16, 32)),
    ],
)
def test_an_output_stride_is_declared_and_emitted(name, output_stride, strides):
    variant = TimmVariant(name, output_stride)
    assert variant.strides == strides
    with torch.device("meta"):
        maps = variant()(torch.zeros(1, 3, 64, 96), return_feature_maps=True)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(variant.channels, strides, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnet5", {}, "no such model; did you mean 'resnet50'"),
        ("resnet50.nowhere", {}, "no weights 'nowhere' of it; it has resnet50.a1_in1k"),
        ("mixer_s32_224", {}, r"its own size only, 224x224 .*: take another encoder"),
        ("coatnet_0_rw_224", {}, "its own size only"),
        ("swin_tiny_patch4_window7_224", {"output_stride": 16}, "output_stride is 16.*set 0"),
        ("vit_tiny_patch16_224", {"output_stride": 8}, "plain vision transformer: .*set 0"),
        ("vit_tiny_patch16_224", {"out_indices": (3, 12)}, "maps 0 to 11"),
        ("vit_tiny_patch16_224", {"out_indices": (5, 2)}, "rising order"),
        ("vit_tiny_patch16_224", {"out_indices": (5, 7), "vit_pyramid": True}, "of one block"),
        ("resnet10t", {"out_indices": (1, 5)}, "maps 0 to 4, of strides 2, 4, 8, 16, 32: give"),
        ("resnet10t", {"vit_pyramid": True}, r"strides \[2, 4, 8, 16, 32\]: leave it out"),
    ],
)
def test_invalid_settings_are_refused(name, options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check_pair(f"timm:{name}", "c1", **options)
    assert "\n" not in str(error.value)


def test_an_encoder_of_our_own_has_its_stride_in_its_name():
    check_pair("resnet50dilated", "c1", output_stride=8)
    with pytest.raises(ValueError, match="are for timm encoders.*resnet50"):
        check_pair("resnet50", "c1", output_stride=8)


def test_pairs_are_checked_without_weights(monkeypatch):
    monkeypatch.setattr(TimmVariant, "__call__", lambda self: pytest.fail("it was built"))
    check_pair("timm:tf_efficientnet_lite2", "deeplabv3plus", 352)
    with pytest.raises(ValueError, match=r"set MODEL\.fc_dim 352"):
        check_pair("timm:tf_efficientnet_lite2", "deeplabv3plus", 320)
    with pytest.raises(ValueError, match="does not work with encoder timm:resnet10t"):
        check_pair("timm:resnet10t", "segnet")
    with pytest.raises(ValueError, match="at least 2 feature maps"):
        check_pair("timm:vit_tiny_patch16_224", "upernet", out_indices=(11,))


def options_of(*pairs):
    return load_options(None, ["MODEL.arch_decoder", "c1", *map(str, pairs)])


def test_fc_dim_may_be_left_out():
    check_options(options_of("MODEL.arch_encoder", "timm:resnet10t"))
    with pytest.raises(ValueError, match=r"set MODEL\.fc_dim 512"):
        check_options(options_of("MODEL.arch_encoder", "timm:resnet10t", "MODEL.fc_dim", 256))


def test_mean_and_std_are_those_of_the_weights():
    vit = ("MODEL.arch_encoder", "timm:vit_tiny_patch16_224")
    other = ("DATASET.mean", "[0.4, 0.4, 0.4]")
    found = options_of(*vit).DATASET
    assert found.mean == found.std == (0.5, 0.5, 0.5)
    assert options_of("MODEL.arch_encoder", "timm:resnet10t").DATASET.mean[0] == 0.485
    with pytest.raises(ValueError, match=r"trained with \[0.5, 0.5, 0.5\].*leave both out"):
        options_of(*vit, *other)
    explicit = options_of(*vit, *other, "MODEL.weights_encoder", "none")
    assert explicit.DATASET.mean == (0.4, 0.4, 0.4)


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet10t needs timm: pip install 'mit_sem.*timm"):
        load_timm("resnet10t")


@torch.no_grad()
def test_stages_are_chosen_and_later_ones_left_out():
    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    variant = TimmVariant("tf_efficientnet_lite0", out_indices=(0, 2, 3))
    assert (variant.channels, variant.strides) == ((16, 40, 112), (2, 8, 16))
    encoder = variant().eval()
    # The stages of stride 32 hold most of the 2.96 million parameters.
    assert sum(p.numel() for p in encoder.parameters()) == 700_768
    given = whole.state_dict()
    kept = {k.removeprefix("net.model."): k for k in encoder.state_dict()}
    assert set(kept) <= set(given)
    encoder.load_state_dict({full: given[k] for k, full in kept.items()})
    image = torch.randn(1, 3, 64, 96)
    expected = [whole(image)[i] for i in (0, 2, 3)]
    for ours, its in zip(encoder(image, return_feature_maps=True), expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ plain ViTs
@torch.no_grad()
def test_blocks_of_a_vision_transformer_are_chosen():
    torch.manual_seed(0)
    encoder = TimmVariant("vit_tiny_patch16_224", out_indices=(3, 7))().eval()
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    kept = {k.removeprefix("model."): v for k, v in encoder.net.state_dict().items()}
    assert whole.load_state_dict(kept, strict=False).unexpected_keys == []
    image = torch.randn(1, 3, 64, 96)
    expected = whole.forward_intermediates(image, indices=[3, 7], intermediates_only=True)
    for ours, its in zip(encoder(image, return_feature_maps=True), expected, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "strides"),
    [("vit_tiny_patch16_224", (4, 8, 16, 32)), ("eva02_tiny_patch14_224", (7, 14, 28))],
)
def test_a_pyramid_has_several_strides(name, strides):
    variant = TimmVariant(name, vit_pyramid=True)
    assert (variant.strides, variant.channels) == (strides, (256,) * len(strides))
    encoder = variant().eval()
    maps = encoder(torch.randn(1, 3, 65, 97), return_feature_maps=True)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (256, math.ceil(65 / s), math.ceil(97 / s)) for s in strides
    ]
    sum((x * torch.randn_like(x)).mean() for x in maps).backward()
    assert without_gradient(encoder) == []


def test_the_pyramid_is_the_papers():
    """Parameters counted by hand, of ViT-B: arXiv:2203.16527, sec. 3 and appendix A.2."""
    n, half, quarter, width = 768, 384, 192, 256
    norm = 2 * width
    deconvs = 2 * (4 * n * half + half) + (2 * half + 4 * half * quarter + quarter)
    lateral = sum(width * channels for channels in (quarter, half, n, n))
    pyramid = SimplePyramid(n, width, 4)
    assert sum(p.numel() for p in pyramid.parameters()) == (
        deconvs + lateral + 4 * (9 * width * width + 2 * norm)
    )
    x = torch.randn(1, n, 2, 3)
    assert [tuple(y.shape[2:]) for y in pyramid(x)] == [(8, 12), (4, 6), (2, 3), (1, 1)]


# ------------------------------------------------------------------------------ weights
def test_a_classifier_saved_by_timm_starts_an_encoder(tmp_path, capsys, caplog):
    from safetensors.torch import save_file

    caplog.set_level("INFO")
    for name, head in (
        ("convnext_atto", ("head.norm", "head.fc")),
        ("vit_tiny_patch16_224", ("norm", "head")),
        ("tf_efficientnet_lite0", ("conv_head", "bn2", "classifier")),
    ):
        whole = timm.create_model(name, num_classes=7)
        left = sum(k.rpartition(".")[0] in head for k in whole.state_dict())
        torch.save({"state_dict": whole.state_dict()}, tmp_path / "a.pth")
        save_file(whole.state_dict(), tmp_path / "a.safetensors")
        for file in ("a.pth", "a.safetensors"):
            caplog.clear()
            encoder = ModelBuilder.build_encoder(
                f"timm:{name}", weights=str(tmp_path / file), in_channels=4
            )
            assert f"0 missing, {left} unexpected" in capsys.readouterr().out + caplog.text
            first = next(p for p in encoder.parameters() if p.ndim == 4)
            theirs = next(p for p in whole.parameters() if p.ndim == 4)
            torch.testing.assert_close(first[:, :3], theirs, rtol=0, atol=0)
            mean = theirs.mean(1)  # the order of a sum depends on the memory's layout
            torch.testing.assert_close(first[:, 3], mean, rtol=0, atol=rounding(theirs, 3))
    with torch.no_grad():
        assert encoder(torch.randn(1, 4, 64, 64))[0].isfinite().all()


@torch.no_grad()
@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there")
def test_a_real_file_loads_and_is_the_same_network():
    encoder = ModelBuilder.build_encoder("timm:tf_efficientnet_lite2", weights=str(REAL)).eval()
    whole = timm.create_model("tf_efficientnet_lite2").eval()
    whole.load_state_dict(torch.load(REAL, weights_only=True), strict=False)
    image = torch.randn(1, 3, 64, 96)
    expected = whole.forward_intermediates(image, indices=[4], intermediates_only=True)[0]
    (given,) = encoder(image)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "other.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" * 64)
    for weights, reason in (
        (tmp_path / "other.pth", "does not fit the encoder: no tensor name matches"),
        (tmp_path / "bad.safetensors", "bad.safetensors is damaged"),
        ("torchvision:resnet50", "not for timm:convnext_atto"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            ModelBuilder.build_encoder("timm:convnext_atto", weights=str(weights))
        assert "\n" not in str(error.value)


def test_without_a_network_the_error_says_what_to_set(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="set MODEL.weights_encoder none") as error:
        ModelBuilder.build_encoder("timm:resnet10t")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="publishes no weights for timm:resnet10t"):
        monkeypatch.setattr(timm.models.PretrainedCfg, "has_weights", False)
        ModelBuilder.build_encoder("timm:resnet10t")


# ------------------------------------------------------------------------------ the page
ROW = re.compile(r"^\| `timm:(\S+)` \| ([\d.]+) \| ([\d, ]+) \| (\S.*?) \| (\S+) \|", re.MULTILINE)
ROWS = ROW.findall((Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8"))


def test_the_page_states_the_licences_of_timm():
    assert len(ROWS) > 10
    for name, *_, licence in ROWS:
        assert timm.models.get_pretrained_cfg(name, allow_unregistered=False).license == licence


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_page_states_sizes_and_strides(row):
    name, millions, strides, others, _ = row
    variant = TimmVariant(name)
    assert ", ".join(map(str, variant.strides)) == strides
    with torch.device("meta"):
        parameters = sum(p.numel() for p in timm_features(name).parameters())
    assert f"{parameters / 1e6:.1f}" == millions
    possible = []
    for stride in (8, 16):
        with contextlib.suppress(ValueError):
            possible += [stride] * (TimmVariant(name, stride).strides != variant.strides)
    assert others == (", ".join(map(str, possible)) or "–")
