"""A configuration, read and checked against the models and data that it names."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mit_semseg.config import Options, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import FORMATS
from mit_semseg.engine.devices import resolve_devices
from mit_semseg.engine.processes import started_here
from mit_semseg.models.builder import check_options

__all__ = ["checked", "read_config", "resolve_devices"]  # resolve_devices: a public name

log = logging.getLogger("mit_semseg")


def read_config(path: str | Path | None, opts: list[str] | None = None) -> Config:
    """`load_config`, and values checked against each other; warns of those without effect.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a wrong key or value, or values that cannot work together, with the reason.
    """
    tree = load_config(path, opts)
    checked(Options.read(tree))
    return tree


def checked(options: Options) -> Options:
    """The options, if the models and data that they name can work together; warns as `read_config`.

    Raises:
        ValueError: they cannot, with the reason.
    """
    check_options(options)
    if os.environ.get("RANK", "0") == "0" and not started_here():
        for line in without_effect(options):
            log.warning("%s", line)
    return options


def without_effect(options: Options) -> list[str]:
    """One line for each setting that others leave without effect."""
    lines = options.without_effect()
    data = options.DATASET
    if data.label_map and FORMATS.get(data.format)().num_class is not None:
        lines.append("DATASET.label_map has no effect: it is for DATASET.format odgt and folder")
    return lines
