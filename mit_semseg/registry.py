"""Names to builders: encoders, decoders, losses and data sets register here by decorator."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

Entry = TypeVar("Entry", bound=Callable[..., Any])
Given = TypeVar("Given", bound=Callable[..., Any])

# What follows the name of an encoder at an output stride; older names first. Dilation does not
# change the weights.
DILATED_NAMES = {32: ("",), 16: ("_dilated16",), 8: ("dilated", "_dilated8")}


def closest(name: str, known: Iterator[str] | list[str]) -> str:
    """A hint `; did you mean 'x'?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(Generic[Entry]):
    """A table of named factories of one kind.

    Example:
        >>> SHAPES = Registry("shape")
        >>> @SHAPES.register("square")
        ... def square() -> str: return "square"
        >>> SHAPES.get("square")()
        'square'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, *names: str) -> Callable[[Given], Given]:
        """Decorator that enters a factory under one or more names; a taken name is an error."""

        def enter(factory: Given) -> Given:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries.update(dict.fromkeys(names, cast(Entry, factory)))
            return factory

        return enter

    def get(self, name: str) -> Entry:
        """The factory called `name`; ValueError with the nearest name and the list otherwise."""
        if name not in self._entries:
            raise ValueError(
                f"unknown {self.kind} {name!r}{closest(name, list(self._entries))} "
                f"(known: {', '.join(self.names())})"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def first_names(self) -> list[str]:
        """Of every factory the name that it was registered under first, sorted."""
        first = {factory: name for name, factory in reversed(self._entries.items())}
        return sorted(first.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries
