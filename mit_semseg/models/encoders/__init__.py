"""Encoders by name: one file a model, registered in `ENCODERS`."""

from mit_semseg.models.encoders import mobilenet  # noqa: F401  (registers)
from mit_semseg.models.encoders.base import ENCODERS, Encoder

__all__ = ["ENCODERS", "Encoder"]
