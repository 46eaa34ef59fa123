"""Reading of a configuration, checked against its models and data set."""

from __future__ import annotations

import logging
from pathlib import Path

from mit_semseg.config import Options, load_config, load_options
from mit_semseg.config.node import Config
from mit_semseg.dataset import FORMATS
from mit_semseg.engine.devices import resolve_devices
from mit_semseg.errors import warns_here
from mit_semseg.models.builder import check_options

__all__ = [  # resolve_devices: a public name
    "checked",
    "read_config",
    "read_options",
    "resolve_devices",
]

log = logging.getLogger("mit_semseg")


def read_config(path: str | Path | None, opts: list[str] | None = None) -> Config:
    """`load_config` and `checked`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a wrong key or value, or an invalid combination of values.
    """
    tree = load_config(path, opts)
    checked(Options.read(tree))
    return tree


def read_options(path: str | Path | None, opts: list[str] | None = None) -> Options:
    """`load_options` and `checked`, with the errors of `read_config`."""
    return checked(load_options(path, opts))


def checked(options: Options) -> Options:
    """Check options against their models and data set, and warn of settings without effect.

    Raises:
        ValueError: an invalid combination of values.
    """
    check_options(options)
    if warns_here():
        for line in without_effect(options):
            log.warning("%s", line)
    return options


def without_effect(options: Options) -> list[str]:
    """One line for each setting that has no effect because of other settings."""
    lines = options.without_effect()
    data = options.DATASET
    if data.label_map and FORMATS.get(data.format)().num_class is not None:
        lines.append("DATASET.label_map has no effect without DATASET.format odgt or folder")
    return lines
