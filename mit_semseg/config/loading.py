"""Configurations from files and command lines, and back into files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg.config.node import Config, tree_of
from mit_semseg.config.options import Options

# The published module-level configuration; scripts that merge into it keep working.
cfg: Config = tree_of(Options())


def get_defaults() -> Config:
    """A fresh tree of default values."""
    return tree_of(Options())


def load_config(path: str | Path | None = None, opts: Sequence[str] | None = None) -> Config:
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
        tree.merge_from_list(list(opts))
    return tree


def load_options(path: str | Path | None = None, opts: Sequence[str] | None = None) -> Options:
    """`load_config` as typed options, whose sections agree.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a wrong key or value, or values that cannot work together, with the reason.
    """
    return Options.read(load_config(path, opts))


def dump_config(tree: Config | Options, path: str | Path) -> None:
    """Write a configuration as yaml that `load_config` reads back to the same values."""
    tree = tree_of(tree) if isinstance(tree, Options) else tree
    Path(path).write_text(tree.dump(), encoding="utf-8")
