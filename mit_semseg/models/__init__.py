"""Encoders, decoders, and the module that joins them with a loss."""

import importlib
from types import ModuleType

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


def __getattr__(name: str) -> ModuleType:
    # Importing the published package also imported these modules (now in `mit_semseg.compat`).
    if name in ("hrnet", "mobilenet", "models", "resnet", "resnext", "utils"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
