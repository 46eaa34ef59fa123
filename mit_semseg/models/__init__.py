"""Encoders, decoders, and the module that joins them with a loss."""

from mit_semseg.models.builder import ModelBuilder, check_aux_weights, check_pair
from mit_semseg.models.decoders import DECODERS, Decoder
from mit_semseg.models.encoders import ENCODERS, Encoder
from mit_semseg.models.module import SegmentationModule

__all__ = [
    "DECODERS",
    "ENCODERS",
    "Decoder",
    "Encoder",
    "ModelBuilder",
    "SegmentationModule",
    "check_aux_weights",
    "check_pair",
]
