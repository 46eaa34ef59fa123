"""Loading and saving of configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg import shipped
from mit_semseg.arguments import CONFIG
from mit_semseg.config.node import Config, tree_of
from mit_semseg.config.options import Options

# The module-level configuration of the published toolkit, for its scripts.
cfg: Config = tree_of(Options())


def get_defaults() -> Config:
    """A new tree of default values."""
    return tree_of(Options())


def load_config(path: str | Path | None = None, opts: Sequence[str] | None = None) -> Config:
    """The defaults, overridden by a YAML file, overridden by `KEY value` pairs.

    Args:
        path: a YAML file, a checkpoint folder, or the name of a shipped recipe; None for the
            defaults. `DIR` of a file in a checkpoint folder is that folder.
        opts: `[KEY, value, KEY, value, ...]` with dotted keys, as on the command line.

    Returns:
        A new tree.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: an unknown key or a wrong value.

    Example:
        >>> load_config(None, ["TRAIN.lr_encoder", "0.01"]).TRAIN.lr_encoder
        0.01
    """
    tree = get_defaults()
    if path is not None:
        file = shipped.recipe(path)
        if (file / CONFIG).is_file():
            file = file / CONFIG
        tree.merge_from_file(file)
        if any(file.parent.glob("encoder_*")):
            tree.merge_from_list(["DIR", str(file.parent)])
            tree.origins["DIR"] = f"folder of {file}"
    if opts:
        tree.merge_from_list(list(opts))
    return tree


def load_options(path: str | Path | None = None, opts: Sequence[str] | None = None) -> Options:
    """`load_config` as typed options.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a wrong key or value, or an invalid combination of values.
    """
    return Options.read(load_config(path, opts))


def dump_config(tree: Config | Options, path: str | Path) -> None:
    """Write a configuration as a YAML file for `load_config`."""
    tree = tree_of(tree) if isinstance(tree, Options) else tree
    Path(path).write_text(tree.dump(), encoding="utf-8")
