"""Encoders: one file per architecture, registered by name in `ENCODERS`."""

# Importing a module registers its encoders.
from mit_semseg.models.encoders import (  # noqa: F401
    bisenet,
    bisenetv2,
    ddrnet,
    densenet,
    drn,
    enet,
    fcdensenet,
    hrnet,
    icnet,
    mobilenet,
    mobilenetv3,
    mscan,
    pidnet,
    resnet,
    resnext,
    stdc,
    unet,
    vgg,
    xception,
)
from mit_semseg.models.encoders.base import ENCODERS, Encoder

__all__ = ["ENCODERS", "Encoder"]
