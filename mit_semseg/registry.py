"""Registries of encoders, decoders, losses and data sets, filled with a decorator."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

Entry = TypeVar("Entry", bound=Callable[..., Any])
Given = TypeVar("Given", bound=Callable[..., Any])

# Suffixes of the names of an encoder by output stride. Dilation does not change the weights.
DILATED_NAMES = {32: ("",), 16: ("_dilated16",), 8: ("dilated", "_dilated8")}


def closest(name: str, known: Iterable[str], most: int = 1) -> str:
    """A hint `; did you mean 'x'?` with the nearest known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


class Registry(Generic[Entry]):
    """A table of factories by name.

    Example:
        >>> SHAPES = Registry("shape")
        >>> @SHAPES.register("square")
        ... def square() -> str: return "square"
        >>> SHAPES.get("square")()
        'square'
    """

    def __init__(self, kind: str, page: str = "") -> None:
        """An empty registry.

        Args:
            kind: what the factories create, for errors.
            page: page of the documentation with all names; without it errors list the names.
        """
        self.kind, self.page = kind, page
        self._entries: dict[str, Entry] = {}

    def register(self, *names: str) -> Callable[[Given], Given]:
        """Decorator that registers a factory under one or more names.

        Raises:
            ValueError: a name is already registered.
        """

        def enter(factory: Given) -> Given:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries.update(dict.fromkeys(names, cast(Entry, factory)))
            return factory

        return enter

    def get(self, name: str) -> Entry:
        """The factory with a name.

        Raises:
            ValueError: an unknown name; the message has the nearest names.
        """
        if name not in self._entries:
            near = closest(name, self._entries, 3 if self.page else 1)
            listed = f"all are in {self.page}" if self.page else f"known: {', '.join(self.names())}"
            raise ValueError(f"unknown {self.kind} {name!r}{near} ({listed})")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names in alphabetical order."""
        return sorted(self._entries)

    def first_names(self) -> list[str]:
        """The first name of each factory, in alphabetical order."""
        first = {factory: name for name, factory in reversed(self._entries.items())}
        return sorted(first.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries
