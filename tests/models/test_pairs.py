"""Every encoder with every decoder it can feed, and the refusal of the rest."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from encoder_tester import declared_maps
from every_model import every_model
from pair_tester import build_pair

from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder, check_pair
from mit_semseg.registry import Registry


def unique(registry: Registry) -> list[str]:
    """The shortest name of everything registered."""
    longest_first = sorted(registry.names(), key=len, reverse=True)
    return sorted({registry.get(name): name for name in longest_first}.values())


UNIQUE_ENCODERS, UNIQUE_DECODERS = unique(ENCODERS), unique(DECODERS)


def seen(arch_encoder: str) -> tuple[object, ...]:
    """All that decoders see of an encoder."""
    kind = ENCODERS.get(arch_encoder)
    made_for_it = tuple(
        n for n in UNIQUE_DECODERS if arch_encoder in DECODERS.get(n).supported_encoders
    )
    return kind.channels, kind.strides, kind.supported_decoders, made_for_it


# One name stands for all that look the same.
DIFFERENT_ENCODERS = list({seen(name): name for name in UNIQUE_ENCODERS}.values())
# Which of the encoder's maps has the resolution of the scores: counted from the finest (0), or
# from the deepest (-1). Where it is none of them, the test of the decoder says what it is.
LEVEL = {"c1": -1, "c1_deepsup": -1, "ppm": -1, "ppm_deepsup": -1, "upernet": 0, "upernet_lite": 0}


# Decoders that read what certain encoders emit, and no other does.
HALVES = {
    **{name: (name,) for name in ("enet", "fcdensenet56", "fcdensenet67", "fcdensenet103")},
    "segnet": ("vgg16_bn_indices",),
    "icnet": ("icnet_resnet50",),
    "bisenet": ("bisenet_resnet18",),
    "ddrnet_23": ("ddrnet_23_slim", "ddrnet_23"),
    "pidnet_s": ("pidnet_s", "pidnet_m"),
    "pidnet_l": ("pidnet_l",),
}


def emitted(arch_encoder: str) -> list[torch.Tensor]:
    """Feature maps of two images of 64x96, without arithmetic."""
    encoder = ENCODERS.get(arch_encoder)
    if encoder.supported_decoders:  # its maps have dtypes of their own
        with torch.device("meta"):
            return encoder()(torch.zeros(2, 3, 64, 96), return_feature_maps=True)
    # What the encoder really emits is tested with it; here its declaration stands for it.
    return declared_maps(arch_encoder, 2, 64, 96)


def refusal(arch_encoder: str, arch_decoder: str) -> str:
    """What is said of a pair that cannot work; "" of one that can."""
    encoders = HALVES.get(arch_decoder, (arch_encoder,))
    if arch_encoder not in encoders:
        return f"set MODEL.arch_encoder to {' or '.join(encoders)}, or"
    decoders = [decoder for decoder, encoders in HALVES.items() if arch_encoder in encoders]
    # Of FC-DenseNet's encoders the maps are features: others read them.
    if decoders and arch_decoder not in decoders and "fcdensenet" not in arch_encoder:
        return rf"set MODEL.arch_decoder to (\w+ or )*{decoders[0]}"
    minimum = DECODERS.get(arch_decoder).min_feature_maps
    few = len(ENCODERS.get(arch_encoder).channels) < minimum
    return f"{arch_decoder} needs at least {minimum} feature maps" if few else ""


@pytest.mark.parametrize("arch_encoder", UNIQUE_ENCODERS)
def test_every_pair_is_taken_or_refused(arch_encoder: str) -> None:
    fc_dim = ENCODERS.get(arch_encoder).channels[-1]
    for arch_decoder in UNIQUE_DECODERS:
        refused = refusal(arch_encoder, arch_decoder)
        with pytest.raises(ValueError, match=refused) if refused else nullcontext():
            check_pair(arch_encoder, arch_decoder, fc_dim)


@pytest.mark.parametrize("arch_encoder", DIFFERENT_ENCODERS)
@torch.no_grad()
def test_every_pair_that_is_taken_works(arch_encoder: str) -> None:
    encoder = ENCODERS.get(arch_encoder)
    maps = emitted(arch_encoder)
    for arch_decoder in UNIQUE_DECODERS:
        if refusal(arch_encoder, arch_decoder):
            continue
        try:
            with torch.device("meta"):
                decoder = ModelBuilder.build_decoder(
                    arch_decoder, num_class=7, channels=encoder.channels, strides=encoder.strides
                )
        except ValueError as error:  # strides that it cannot work with
            assert "stride" in str(error) and "\n" not in str(error)
            continue
        heads = decoder.train().logits(maps)
        assert len(heads) == 1 + len(decoder.auxiliary)
        for head, auxiliary in zip(heads, (None, *decoder.auxiliary)):
            assert head.shape[:2] == (2, 7) or (auxiliary and auxiliary.loss)
        if arch_decoder in LEVEL:
            stride = encoder.strides[LEVEL[arch_decoder]]
            assert heads[0].shape[2:] == (64 // stride, 96 // stride)


def test_a_wrong_fc_dim_is_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError) as error:
        check_pair("resnet18dilated", "ppm_deepsup", 2048)
    assert str(error.value) == (
        "resnet18dilated emits 512 channels; MODEL.fc_dim is 2048: set MODEL.fc_dim 512"
    )


def test_a_decoder_that_needs_more_maps_is_refused_with_others() -> None:
    with pytest.raises(
        ValueError, match=r"upernet needs at least 2 feature maps and hrnetv2 emits 1.*c1.*ppm"
    ):
        check_pair("hrnetv2", "upernet", 720)


@pytest.mark.parametrize(
    ("encoder", "decoder", "near"),
    [("resnet50dilatd", "c1", "resnet50dilated"), ("resnet18", "upernett", "upernet")],
)
def test_an_unknown_name_is_refused_with_the_nearest(encoder: str, decoder: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        check_pair(encoder, decoder)


def test_older_decoder_names_mean_the_same() -> None:
    for name in ("c1", "ppm"):
        assert DECODERS.get(name) is DECODERS.get(f"{name}_bilinear")
        assert DECODERS.get(f"{name}_deepsup") is DECODERS.get(f"{name}_bilinear_deepsup")


@pytest.mark.slow
@pytest.mark.parametrize(("arch_encoder", "arch_decoder"), every_model())
def test_training_gives_every_parameter_a_gradient(arch_encoder: str, arch_decoder: str) -> None:
    """One without would end DistributedDataParallel in its second step."""
    module = build_pair(arch_encoder, arch_decoder).train()
    label = torch.randint(0, 5, (2, 8, 8))
    module({"img_data": torch.randn(2, 3, 64, 64), "seg_label": label})[0].backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
