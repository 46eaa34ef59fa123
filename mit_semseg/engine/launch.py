"""A configuration, read and checked against the models and data that it names."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from mit_semseg.config import get_defaults, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import FORMATS
from mit_semseg.dataset.split import check_channels
from mit_semseg.engine.devices import resolve_devices
from mit_semseg.engine.processes import started_here
from mit_semseg.models import ENCODERS, check_aux_weights, check_pair

__all__ = ["read_config", "resolve_devices", "without_effect"]  # resolve_devices: a public name

log = logging.getLogger("mit_semseg")


def read_config(path: str | Path | None, opts: list[str] | None = None) -> Config:
    """`load_config`, and values checked against each other; warns of those without effect.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a wrong key or value, or values that cannot work together, with the reason.
    """
    cfg = load_config(path, opts)
    check_pair(cfg.MODEL.arch_encoder, cfg.MODEL.arch_decoder, cfg.MODEL.fc_dim)
    check_aux_weights(cfg.MODEL.arch_decoder, cfg.TRAIN.aux_weights)
    FORMATS.get(cfg.DATASET.format)
    check_channels(cfg.MODEL.in_channels, cfg.DATASET)
    _check_windows(cfg)
    if os.environ.get("RANK", "0") == "0" and not started_here():
        for line in without_effect(cfg):
            log.warning("%s", line)
    return cfg


def _check_windows(cfg: Config) -> None:
    """Refuse sliding windows whose sides are no multiples of the encoder's strides."""
    stride = math.lcm(*ENCODERS.get(cfg.MODEL.arch_encoder.lower()).strides)
    for section in ("VAL", "TEST"):
        window = cfg[section].window
        if any(side % stride for side in window):
            fitting = [-(-int(side) // stride) * stride for side in window]
            raise ValueError(
                f"{section}.window is {window}, but {cfg.MODEL.arch_encoder} needs multiples of "
                f"its stride {stride}: set {section}.window {fitting}"
            )


def without_effect(cfg: Config) -> list[str]:
    """One line for each setting that others leave without effect."""
    defaults = get_defaults()
    needs = {
        "TRAIN.label_smoothing": ("smooth" in cfg.TRAIN.loss, "the loss smooth"),
        "TRAIN.deep_sup_scale": (not cfg.TRAIN.aux_weights, "TRAIN.aux_weights ()"),
        "VAL.stride": (cfg.VAL.window, "VAL.window"),
        "TEST.stride": (cfg.TEST.window, "TEST.window"),
        "DATASET.label_map": (
            FORMATS.get(cfg.DATASET.format)().num_class is None,
            "DATASET.format odgt and folder",
        ),
        **{
            f"DATASET.depth_{key}": (cfg.DATASET.depth, "DATASET.depth True")
            for key in ("scale", "mean", "std")
        },
    }
    lines = []
    for name, (has, what) in needs.items():
        section, key = name.split(".")
        if not has and cfg[section][key] != defaults[section][key]:
            lines.append(f"{name} has no effect: it is for {what}")
    return lines
