"""Every encoder with every decoder it can feed, and the refusal of the rest."""

from __future__ import annotations

import pytest
import torch

from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder, check_pair

UNIQUE_ENCODERS = sorted(name for name in ENCODERS.names() if "_dilated8" not in name)
UNIQUE_DECODERS = sorted(name for name in DECODERS.names() if "bilinear" not in name)


@pytest.mark.parametrize("arch_encoder", UNIQUE_ENCODERS)
def test_every_pair_works_or_is_refused(arch_encoder: str) -> None:
    encoder = ENCODERS.get(arch_encoder)
    # What the encoder really emits is tested with it; here its declaration stands for it.
    maps = [
        torch.zeros(2, c, 64 // s, 96 // s, device="meta")
        for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]
    refused = []
    for arch_decoder in UNIQUE_DECODERS:
        try:
            check_pair(arch_encoder, arch_decoder, encoder.channels[-1])
        except ValueError:
            refused.append(arch_decoder)
            continue
        with torch.device("meta"):
            decoder = ModelBuilder.build_decoder(
                arch_decoder, num_class=7, channels=encoder.channels, strides=encoder.strides
            )
        heads = decoder.train().logits(maps)
        assert len(heads) == 1 + len(decoder.auxiliary)
        assert all(head.shape[:2] == (2, 7) for head in heads)
        finest = 4 if arch_decoder.startswith("upernet") else encoder.strides[-1]
        assert heads[0].shape[2:] == (64 // finest, 96 // finest)
    alone = ["c1_deepsup", "ppm_deepsup", "upernet", "upernet_lite"]
    assert refused == (alone if arch_encoder == "hrnetv2" else [])


def test_a_wrong_fc_dim_is_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError) as error:
        check_pair("resnet18dilated", "ppm_deepsup", 2048)
    assert str(error.value) == (
        "resnet18dilated emits 512 channels; MODEL.fc_dim is 2048: set MODEL.fc_dim 512"
    )


def test_a_decoder_that_needs_more_maps_is_refused_with_others() -> None:
    with pytest.raises(
        ValueError, match=r"upernet reads at least 2 feature maps and hrnetv2 emits 1.*c1.*ppm"
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
