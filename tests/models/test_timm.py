"""Encoders of timm, beside timm itself."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairs import CLASSES, Pair, randomise, without_gradient
from torch import Tensor, nn

from mit_semseg.config import load_options
from mit_semseg.download import DownloadError
from mit_semseg.lib.nn import UserScatteredDataParallel
from mit_semseg.models import DECODERS, ModelBuilder, SegmentationModule, check_pair, inference
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.builder import check_options
from mit_semseg.models.depthwise import DepthwiseConv2d
from mit_semseg.models.encoders.timm_backbone import TimmEncoder, TimmVariant, load_timm
from mit_semseg.models.encoders.timm_backbone import features as timm_features
from mit_semseg.models.encoders.vit_pyramid import SimplePyramid

timm = pytest.importorskip("timm")
REAL = (
    Path(os.environ.get("SEMSEG_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    / "../weights/tf_efficientnet_lite2_imagenet.pth"
)

# Name, arguments of timm's own network of features, whether it has channels last, and the multiple
# of the sides of images.
FAMILIES: dict[str, tuple[dict[str, Any], bool, int]] = {
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
def made(name: str) -> TimmEncoder:
    """An encoder whose normalisation has seen something, in evaluation."""
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder(f"timm:{name}", weights="none")
    randomise(encoder, statistics=True)
    return encoder.eval()


def module_of(encoder: nn.Module) -> SegmentationModule:
    decoder = ModelBuilder.build_decoder(
        "c1", num_class=CLASSES, channels=encoder.channels, strides=encoder.strides
    )
    return SegmentationModule(encoder, decoder, None)


@pytest.mark.parametrize("name", FAMILIES, scope="class")
class TestFamily:
    @torch.no_grad()
    def test_maps_are_those_of_timm(self, name: str) -> None:
        options, channels_last, multiple = FAMILIES[name]
        encoder = made(name)
        theirs = timm.create_model(name, pretrained=False, features_only=True, **options).eval()
        theirs.load_state_dict(encoder.net.state_dict())
        assert encoder.channels == tuple(theirs.feature_info.channels())
        assert encoder.strides == tuple(theirs.feature_info.reduction())
        H, W = 2 * multiple, 3 * multiple
        image = torch.randn(1, 3, H, W - 1)
        # Padding stands at the right, and is cut off.
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

    def test_every_parameter_learns_also_when_blocks_are_computed_again(self, name: str) -> None:
        again = copy.deepcopy(made(name))
        plain = copy.deepcopy(again)
        assert len(checkpoint_activations(again)) >= 4
        image = torch.randn(2, 3, 32, 64)
        for encoder in (plain, again):
            maps = encoder(image, return_feature_maps=True)
            values = [(x * torch.linspace(-1, 1, x.shape[1])[:, None, None]).mean() for x in maps]
            sum(values).backward()
        assert without_gradient(plain) == []
        for mine, its in zip(plain.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(its.grad, mine.grad, rtol=1e-4, atol=1e-7)

    @torch.no_grad()
    def test_the_copy_for_prediction_folds_and_casts(
        self, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What the copy proves to itself is proved here: the smallest image is enough for that.
        monkeypatch.setattr(inference, "_CHECK_SIZES", ((64, 64),))
        module = module_of(made(name)).eval()
        image = torch.randn(1, 3, 64, 96)
        expected = module.logits(image)
        fast = inference.inference_copy(module, "cpu")
        assert "not folded" not in caplog.text
        norms = [sum(isinstance(x, nn.BatchNorm2d) for x in m.modules()) for m in (module, fast)]
        assert norms[1] <= norms[0] / 2  # ResNetV2 has some after sums
        scale = float(expected.std())
        torch.testing.assert_close(fast.logits(image), expected, rtol=0, atol=1e-4 * scale)
        half = inference.inference_copy(fast, "cpu", dtype=torch.bfloat16)
        assert (half.logits(image).float() - expected).abs().mean() < 0.1 * scale


def test_batchnorm_with_an_activation_is_folded_and_the_activation_stays() -> None:
    module = module_of(made("tf_efficientnet_lite0"))
    kinds = [type(x).__name__ for x in module.encoder.net.modules()]
    assert kinds.count("BatchNormAct2d") > 30 and "BatchNorm2d" not in kinds
    fast = inference.inference_copy(module, "cpu")
    assert not any(isinstance(x, nn.BatchNorm2d) for x in fast.modules())
    activations = [sum(isinstance(x, nn.ReLU6) for x in m.modules()) for m in (module, fast)]
    assert activations[0] == activations[1] > 30


def test_depthwise_convolutions_take_the_fast_path_and_give_the_same() -> None:
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


def test_replicas_normalise_as_one() -> None:
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
        ("resnet50", 8, (4, 8, 8, 8)),
        ("resnet50", 16, (4, 8, 16, 16)),
        ("tf_efficientnet_lite2", 16, (4, 8, 16, 16)),
        ("mobilenetv3_large_100", 8, (4, 8, 8, 8)),
        ("convnext_tiny", 16, (4, 8, 16, 16)),
        ("vgg16", 32, (4, 8, 16, 32)),
    ],
)
def test_an_output_stride_is_declared_and_emitted(
    name: str, output_stride: int, strides: tuple[int, ...]
) -> None:
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
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        check_pair(f"timm:{name}", "c1", **options)
    assert "\n" not in str(error.value)


def test_an_encoder_of_our_own_has_its_stride_in_its_name() -> None:
    check_pair("resnet50dilated", "c1", output_stride=8)
    with pytest.raises(ValueError, match="are for timm encoders.*resnet50"):
        check_pair("resnet50", "c1", output_stride=8)


def test_pairs_are_checked_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimmVariant, "__call__", lambda self: pytest.fail("it was built"))
    check_pair("timm:tf_efficientnet_lite2", "deeplabv3plus", 352)
    with pytest.raises(ValueError, match=r"set MODEL\.fc_dim 352"):
        check_pair("timm:tf_efficientnet_lite2", "deeplabv3plus", 320)
    with pytest.raises(ValueError, match="does not work with encoder timm:resnet10t"):
        check_pair("timm:resnet10t", "segnet")
    with pytest.raises(ValueError, match="at least 2 feature maps"):
        check_pair("timm:vit_tiny_patch16_224", "upernet", out_indices=(11,))


def options_of(*pairs: object) -> Any:
    return load_options(None, ["MODEL.arch_decoder", "c1", *map(str, pairs)])


def test_fc_dim_may_be_left_out() -> None:
    check_options(options_of("MODEL.arch_encoder", "timm:resnet10t"))
    with pytest.raises(ValueError, match=r"set MODEL\.fc_dim 512"):
        check_options(options_of("MODEL.arch_encoder", "timm:resnet10t", "MODEL.fc_dim", 256))


def test_mean_and_std_are_those_of_the_weights() -> None:
    vit = ("MODEL.arch_encoder", "timm:vit_tiny_patch16_224")
    other = ("DATASET.mean", "[0.4, 0.4, 0.4]")
    found = options_of(*vit).DATASET
    assert found.mean == found.std == (0.5, 0.5, 0.5)
    assert options_of("MODEL.arch_encoder", "timm:resnet10t").DATASET.mean[0] == 0.485
    with pytest.raises(ValueError, match=r"trained with \[0.5, 0.5, 0.5\].*leave both out"):
        options_of(*vit, *other)
    explicit = options_of(*vit, *other, "MODEL.weights_encoder", "none")
    assert explicit.DATASET.mean == (0.4, 0.4, 0.4)


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet10t needs timm: pip install 'mit_sem.*timm"):
        load_timm("resnet10t")


@torch.no_grad()
def test_stages_are_chosen_and_later_ones_left_out() -> None:
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
def test_blocks_of_a_vision_transformer_are_chosen() -> None:
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
def test_a_pyramid_has_several_strides(name: str, strides: tuple[int, ...]) -> None:
    variant = TimmVariant(name, vit_pyramid=True)
    assert (variant.strides, variant.channels) == (strides, (256,) * len(strides))
    encoder = variant().eval()
    maps = encoder(torch.randn(1, 3, 65, 97), return_feature_maps=True)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (256, math.ceil(65 / s), math.ceil(97 / s)) for s in strides
    ]
    sum((x * torch.randn_like(x)).mean() for x in maps).backward()
    assert without_gradient(encoder) == []


def test_the_pyramid_is_the_papers() -> None:
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
def test_a_classifier_saved_by_timm_starts_an_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
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
            torch.testing.assert_close(first[:, 3], theirs.mean(1), rtol=0, atol=0)
    with torch.no_grad():
        assert encoder(torch.randn(1, 4, 64, 64))[0].isfinite().all()


@torch.no_grad()
@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there")
def test_a_real_file_loads_and_is_the_same_network() -> None:
    encoder = ModelBuilder.build_encoder("timm:tf_efficientnet_lite2", weights=str(REAL)).eval()
    whole = timm.create_model("tf_efficientnet_lite2").eval()
    whole.load_state_dict(torch.load(REAL, weights_only=True), strict=False)
    image = torch.randn(1, 3, 64, 96)
    expected = whole.forward_intermediates(image, indices=[4], intermediates_only=True)[0]
    (given,) = encoder(image)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
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


def test_without_a_network_the_error_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="set MODEL.weights_encoder none") as error:
        ModelBuilder.build_encoder("timm:resnet10t")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="publishes no weights for timm:resnet10t"):
        monkeypatch.setattr(timm.models.PretrainedCfg, "has_weights", False)
        ModelBuilder.build_encoder("timm:resnet10t")


def test_maps_of_every_decoder_that_takes_so_many(name: str = "timm:resnet10t") -> None:
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder(name, weights="none")
        maps: list[Tensor] = encoder(torch.zeros(1, 3, 64, 96), return_feature_maps=True)
        for decoder in DECODERS.first_names():
            kind = DECODERS.get(decoder)
            if not kind.supported_encoders:
                check_pair(name, decoder)
                head = kind(encoder.channels, num_class=2, strides=encoder.strides).eval()
                assert head.logits(list(maps))[0].shape[1] == 2


# ------------------------------------------------------------------------------ the page
ROW = re.compile(r"^\| `timm:(\S+)` \| ([\d.]+) \| ([\d, ]+) \| (\S.*?) \| (\S+) \|", re.MULTILINE)
ROWS = ROW.findall((Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8"))


def test_the_page_states_the_licences_of_timm() -> None:
    assert len(ROWS) > 10
    for name, *_, licence in ROWS:
        assert timm.models.get_pretrained_cfg(name, allow_unregistered=False).license == licence


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_page_states_sizes_and_strides(row: tuple[str, ...]) -> None:
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
