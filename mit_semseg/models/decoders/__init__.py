"""Decoders by name: one file a model, registered in `DECODERS`."""

from mit_semseg.models.decoders import c1, ppm, upernet  # noqa: F401  (importing registers)
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder

__all__ = ["DECODERS", "Auxiliary", "Decoder"]
