"""Names of recipes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def named(recipes: Iterable[str | Path]) -> dict[str, str]:
    """Name of the file without its extension -> file.

    Raises:
        ValueError: two files have the same name.
    """
    found: dict[str, str] = {}
    for recipe in map(str, recipes):
        name = Path(recipe).stem
        if found.setdefault(name, recipe) != recipe:
            raise ValueError(
                f"two recipes are called {name}: {found[name]} and {recipe}: rename one of them"
            )
    return found
