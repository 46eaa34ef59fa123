"""Encoders with decoders: which work together, and what those that do must do."""

import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from every_model import every_model
from pairs import CLASSES, PAIRS, Pair, declared_maps, on_meta, without_gradient
from torch import nn

from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder, check_pair, inference
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.decoders.fcn import FCN
from mit_semseg.models.papers import PAPER_MODELS

every_pair = pytest.mark.parametrize(
    "pair", [pytest.param(p, id=str(p), marks=[pytest.mark.slow] if p.slow else []) for p in PAIRS]
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """FCN's 4096 channels are not needed here; the smallest image proves the copy to itself."""
    monkeypatch.setattr(FCN, "width", 64)
    monkeypatch.setattr(inference, "_TRACE_SIZE", (32, 32))
    monkeypatch.setattr(inference, "_CHECK_SIZES", ((32, 32),))


@every_pair
@torch.no_grad()
def test_scores_any_size(pair):
    with torch.device("meta"):
        module = pair.build()
    for batch, *size in ((2, 64, 96), (1, 67, 97), (1, 96, 40)):
        padded = [math.ceil(n / pair.multiple) * pair.multiple for n in size]
        wanted = (batch, CLASSES, *(math.ceil(n / pair.stride) for n in padded))
        images = torch.zeros(batch, 3, *size, device="meta")
        assert module.train(batch == 1).logits(images).shape == wanted


@every_pair
def test_one_odd_image_trains_every_parameter_also_recomputed(pair):
    generator = torch.Generator().manual_seed(2)
    batch = {
        "img_data": torch.randn(1, 3, 49, 65, generator=generator),
        "seg_label": torch.randint(-1, CLASSES, (1, 33, 47), generator=generator),
    }
    batch["seg_label"][:, 16:] = 0  # not every pixel is at a boundary
    plain, again = pair.build(), pair.build()
    assert checkpoint_activations(again.encoder)
    losses = []
    for module in (plain, again):
        torch.manual_seed(1)  # of dropout
        loss, accuracy = module.train()(batch)
        loss.backward()
        losses.append(loss.item())
        assert 0 <= accuracy <= 1
    assert without_gradient(plain) == []
    assert math.isfinite(losses[0]) and losses[0] == losses[1]
    for mine, its in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.state_dict(), plain.state_dict(), rtol=0, atol=0)


@every_pair
@torch.no_grad()
def test_prediction_is_the_same_folded_and_nearly_in_half_precision(pair, caplog):
    module = pair.trained()
    image = torch.randn(1, 3, 32, 32)  # convolutions in float16 are slow on a CPU

    def log_probabilities():
        return module.decoder.log_probabilities(module.features(image), (40, 30))[0]

    expected = log_probabilities()
    for dtype, limit in zip((torch.bfloat16, torch.float16), pair.rounding, strict=True):
        with torch.autocast("cpu", dtype=dtype):
            given = log_probabilities()
        assert given.dtype == torch.float32
        torch.testing.assert_close(given.exp().sum(1), torch.ones(1, 40, 30))
        assert (given - expected).abs().mean() / expected.std() < limit
    # With weights of that type, as in prediction.
    half = inference.inference_copy(module, "cpu", dtype=torch.bfloat16)
    cast = half.decoder.log_probabilities(half.features(image), (40, 30))[0]
    assert (cast - expected).abs().mean() / expected.std() < pair.rounding[0]

    module.double()
    fast = inference.inference_copy(module, "cpu")
    assert "not folded" not in caplog.text
    image = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    torch.testing.assert_close(fast.logits(image), module.logits(image), rtol=0, atol=1e-9)
    norms = [
        {name for name, x in m.named_modules() if isinstance(x, nn.BatchNorm2d)}
        for m in (module, fast)
    ]
    assert (norms[1] < norms[0]) == pair.folds


@pytest.mark.slow
@pytest.mark.parametrize(("arch_encoder", "arch_decoder"), every_model())
def test_training_gives_every_parameter_a_gradient(arch_encoder, arch_decoder):
    """One without would end DistributedDataParallel in its second step."""
    module = Pair(arch_encoder, arch_decoder).build().train()
    label = torch.randint(0, CLASSES, (2, 8, 8))
    module({"img_data": torch.randn(2, 3, 64, 64), "seg_label": label})[0].backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_every_decoder_of_a_paper_is_among_the_pairs():
    """In one size."""
    tested = {DECODERS.get(pair.decoder).__module__ for pair in PAIRS}
    assert {DECODERS.get(model.decoder).__module__ for model in PAPER_MODELS} <= tested


# Of 16 million parameters and more the paper's, or what is known of the model otherwise.
@pytest.mark.parametrize(
    ("encoder", "decoder", "classes", "millions", "slack"),
    [
        ("vgg16", "fcn8s", 21, 134, 0.01),  # table 1
        ("torchvision_resnet18", "linknet", 21, 11.5, 0.005),  # table 3
        ("enet", "enet", 12, 0.37, 0.03),  # table 3
        ("enet", "enet", 20, 0.37, 0.03),
        ("unet", "unet", 21, 31.03, 0.01),
        ("unet_bilinear", "unet_bilinear", 11, 13.37, 0.01),
        ("unet_bilinear", "unet_bilinear", 21, 13.37, 0.01),
        ("mscan_t", "hamburger", 150, 4.3, 0.02),  # table 2
        ("mscan_s", "hamburger", 150, 13.9, 0.005),
        ("mscan_b", "hamburger_b", 150, 27.6, 0.005),
        ("mscan_l", "hamburger_l", 150, 48.9, 0.005),
        ("fcdensenet56", "fcdensenet56", 11, 1.5, 0.09),  # table 3
        ("fcdensenet67", "fcdensenet67", 11, 3.5, 0.02),
        ("fcdensenet103", "fcdensenet103", 11, 9.33, 0.01),
    ],
)
def test_size(encoder, decoder, classes, millions, slack, monkeypatch):
    monkeypatch.undo()  # all channels
    with torch.device("meta"):
        module = Pair(encoder, decoder).build(classes)
    count = sum(p.numel() for p in module.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=slack)
    if encoder.startswith("fcdensenet"):
        # The name counts the convolutions and transposed convolutions, transitions included.
        layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert len(layers) == int(encoder.removeprefix("fcdensenet"))


# ----------------------------------------------------------------------------- which may be used
# Decoders that read what certain encoders emit, and no other does.
OWN = {
    name: own for name in DECODERS.first_names() if (own := DECODERS.get(name).supported_encoders)
}


@cache
def emitted(arch_encoder):
    """Feature maps of two images of 64x96, without arithmetic."""
    if ENCODERS.get(arch_encoder).supported_decoders:  # its maps have dtypes of their own
        return on_meta(arch_encoder)(torch.zeros(2, 3, 64, 96, device="meta"), True)
    # What the encoder really emits is tested with it; here its declaration stands for it.
    return declared_maps(arch_encoder, 2, 64, 96)


def refusal(arch_encoder, arch_decoder):
    """The expected error for a pair that cannot work; "" for one that can."""
    encoders = OWN.get(arch_decoder, (arch_encoder,))
    if arch_encoder not in encoders:
        return f"set MODEL.arch_encoder to {' or '.join(encoders)}, or"
    decoders = [decoder for decoder, encoders in OWN.items() if arch_encoder in encoders]
    # Of FC-DenseNet's encoders the maps are features: others read them.
    if decoders and arch_decoder not in decoders and "fcdensenet" not in arch_encoder:
        return rf"set MODEL.arch_decoder to (\w+ or )*{decoders[0]}"
    minimum = DECODERS.get(arch_decoder).min_feature_maps
    few = len(ENCODERS.get(arch_encoder).channels) < minimum
    return f"{arch_decoder} needs at least {minimum} feature maps" if few else ""


@pytest.mark.parametrize("arch_decoder", DECODERS.first_names())
def test_every_pair_is_accepted_or_refused(arch_decoder):
    for arch_encoder in ENCODERS.first_names():
        refused = refusal(arch_encoder, arch_decoder)
        with pytest.raises(ValueError, match=refused) if refused else nullcontext():
            check_pair(arch_encoder, arch_decoder, ENCODERS.get(arch_encoder).channels[-1])


# Which of the encoder's maps has the resolution of the scores: the finest (0), or the deepest (-1).
LEVEL = {"c1": -1, "c1_deepsup": -1, "ppm": -1, "ppm_deepsup": -1, "upernet": 0, "upernet_lite": 0}


@pytest.mark.parametrize("arch_decoder", DECODERS.first_names())
@torch.no_grad()
def test_every_accepted_pair_works(arch_decoder):
    # One encoder stands for all with the same strides: any widths work, see test_decoders.py.
    owned = {encoder for encoders in OWN.values() for encoder in encoders}
    kinds = {
        (kind.strides, kind.supported_decoders, name in owned): name
        for name, kind in ((name, ENCODERS.get(name)) for name in ENCODERS.first_names())
    }
    for arch_encoder in kinds.values():
        if refusal(arch_encoder, arch_decoder):
            continue
        encoder = ENCODERS.get(arch_encoder)
        try:
            with torch.device("meta"):
                decoder = ModelBuilder.build_decoder(
                    arch_decoder, num_class=7, channels=encoder.channels, strides=encoder.strides
                )
        except ValueError as error:  # strides that it cannot work with
            assert "stride" in str(error) and "\n" not in str(error)
            continue
        heads = decoder.train().logits(emitted(arch_encoder))
        for head, auxiliary in zip(heads, (None, *decoder.auxiliary), strict=True):
            assert head.shape[:2] == (2, 7) or (auxiliary and auxiliary.loss)
        if arch_decoder in LEVEL:
            stride = encoder.strides[LEVEL[arch_decoder]]
            assert heads[0].shape[2:] == (64 // stride, 96 // stride)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("resnet18dilated", "ppm_deepsup", 2048),
            "^resnet18dilated emits 512 channels; MODEL.fc_dim is 2048: set MODEL.fc_dim 512$",
        ),
        (
            ("hrnetv2", "upernet", 720),
            r"upernet needs at least 2 feature maps and hrnetv2 emits 1.*c1.*ppm",
        ),
        (("resnet50dilatd", "c1"), "did you mean 'resnet50dilated'"),
        (("resnet18", "upernett"), "did you mean 'upernet'"),
    ],
)
def test_a_refusal_says_what_to_set(names, message):
    with pytest.raises(ValueError, match=message):
        check_pair(*names)


def test_older_decoder_names_mean_the_same():
    for name in ("c1", "ppm"):
        assert DECODERS.get(name) is DECODERS.get(f"{name}_bilinear")
        assert DECODERS.get(f"{name}_deepsup") is DECODERS.get(f"{name}_bilinear_deepsup")
    assert DECODERS.get("ocnet") is DECODERS.get("ocnet_base")
