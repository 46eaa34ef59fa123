"""Configurations from files and command lines, and back into files."""

from __future__ import annotations

from pathlib import Path

from mit_semseg.config.defaults import _C
from mit_semseg.config.node import Config

# The published module-level configuration; scripts that merge into it keep working.
cfg: Config = _C


def get_defaults() -> Config:
    """A fresh tree of default values."""
    return _DEFAULTS.clone()


_DEFAULTS = _C.clone()


def load_config(path: str | Path | None = None, opts: list[str] | None = None) -> Config:
    """The defaults, overlaid by a yaml file, overlaid by `KEY value` pairs.

    Args:
        path: a yaml file, or None for the defaults alone.
        opts: `[KEY, value, KEY, value, ...]` with dotted keys, as typed on a command line.

    Returns:
        A new tree; the module-level `cfg` is left alone.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown key (the nearest known one is named), or a wrong value.

    Example:
        >>> load_config(None, ["TRAIN.lr_encoder", "0.01"]).TRAIN.lr_encoder
        0.01
    """
    tree = get_defaults()
    if path is not None:
        tree.merge_from_file(path)
    if opts:
        tree.merge_from_list(opts)
    return tree


def dump_config(tree: Config, path: str | Path) -> None:
    """Write a tree as yaml that `load_config` reads back to the same values."""
    Path(path).write_text(tree.dump(), encoding="utf-8")
