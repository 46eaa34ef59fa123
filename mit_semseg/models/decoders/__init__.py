"""Decoders: one file per architecture, registered by name in `DECODERS`."""

# Importing a module registers its decoders.
from mit_semseg.models.decoders import (  # noqa: F401
    bisenet,
    bisenetv2,
    c1,
    danet,
    ddrnet,
    deeplabv3,
    deeplabv3plus,
    denseaspp,
    dunet,
    encnet,
    enet,
    fcdensenet,
    fcn,
    fcn_head,
    hamburger,
    icnet,
    linear,
    linknet,
    lraspp,
    ocnet,
    pidnet,
    ppliteseg,
    ppm,
    segformer,
    segnet,
    stdc,
    unet,
    upernet,
)
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder

__all__ = ["DECODERS", "Auxiliary", "Decoder"]
