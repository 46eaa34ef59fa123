"""Recipes by the names of their files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


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
