"""What the tools ask of recipes: a name of its own for each, and whether one has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mit_semseg.config import get_defaults
from mit_semseg.config.node import Config


def named(recipes: Iterable[str | Path]) -> dict[str, str]:
    """Name -> file, in order; the name is that of the file without its ending.

    Raises:
        ValueError: two files have one name.
    """
    found: dict[str, str] = {}
    for recipe in map(str, recipes):
        name = Path(recipe).stem
        if found.setdefault(name, recipe) != recipe:
            raise ValueError(
                f"two recipes are called {name}: {found[name]} and {recipe}; their results would "
                "be mixed up: rename one"
            )
    return found


def fingerprint(cfg: Config, without: Iterable[str] = ()) -> str:
    """16 hexadecimal digits that differ for configurations that differ.

    Only what differs from the defaults counts, so that a key which a later version brings does
    not make everything of before look edited.

    Args:
        cfg: with all defaults and overrides.
        without: keys of `DATASET` that do not count; `DIR` never does.
    """
    plain = cfg.clone()
    plain.DIR = ""
    for key in without:
        plain.DATASET[key] = ""
    set_here = {
        f"{section}.{key}": value
        for section, defaults in get_defaults().items()
        if isinstance(defaults, dict)
        for key, value in plain[section].items()
        if value != defaults[key]
    }
    return hashlib.sha256(repr(sorted(set_here.items())).encode()).hexdigest()[:16]
