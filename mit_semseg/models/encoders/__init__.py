"""Encoders by name: one file a model, registered in `ENCODERS`."""

# Importing registers.
from mit_semseg.models.encoders import hrnet, mobilenet, resnet, resnext  # noqa: F401
from mit_semseg.models.encoders.base import ENCODERS, Encoder

__all__ = ["ENCODERS", "Encoder"]
