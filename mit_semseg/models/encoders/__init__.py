"""Encoders by name: one file a model, registered in `ENCODERS`."""

# Importing registers.
from mit_semseg.models.encoders import (  # noqa: F401
    bisenet,
    densenet,
    drn,
    hrnet,
    icnet,
    mobilenet,
    mobilenetv3,
    resnet,
    resnext,
    xception,
)
from mit_semseg.models.encoders.base import ENCODERS, Encoder

__all__ = ["ENCODERS", "Encoder"]
