"""Pairs of encoders and decoders in which every registered model occurs."""

import torch

from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder, check_pair
from mit_semseg.models.papers import PAPER_MODELS


def every_model():
    """The models of the papers, and pairs with all other registered encoders and decoders."""
    encoders, decoders = ENCODERS.first_names(), DECODERS.first_names()
    pairs = {(model.encoder, model.decoder) for model in PAPER_MODELS}
    seen = {*(ENCODERS.get(e) for e, _ in pairs), *(DECODERS.get(d) for _, d in pairs)}
    light = ("resnet18dilated", "resnet18", "mobilenetv2dilated")
    for name in encoders:
        if ENCODERS.get(name) not in seen:
            pairs.add(_first_fit((name, d) for d in ("c1", *decoders)))
    for name in decoders:
        if DECODERS.get(name) not in seen:
            pairs.add(_first_fit((e, name) for e in (*light, *encoders)))
    return sorted(pairs)


def _first_fit(pairs):
    for pair in pairs:
        try:
            check_pair(*pair)
            encoder = ENCODERS.get(pair[0])
            with torch.device("meta"):
                ModelBuilder.build_decoder(
                    pair[1], channels=encoder.channels, strides=encoder.strides, num_class=2
                )
        except ValueError:
            continue
        return pair
    raise ValueError("a registered model fits no other")
