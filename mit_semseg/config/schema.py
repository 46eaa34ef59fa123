"""What a class of settings is made of: keys with type, default, meaning and range.

A section is a frozen dataclass whose fields are made by `key`. It reads and checks every value when
it is made, whether that comes from a yaml file, a command line or Python. The yacs tree, the tables
of docs/settings.md and `mit-semseg config` are generated from the same fields.
"""

from __future__ import annotations

import ast
import logging
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, ClassVar, TypeVar

from mit_semseg.registry import closest

log = logging.getLogger("mit_semseg")

_NAMES = {bool: "`True`, `False`", int: "integer", float: "number", str: "string"}
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Setting:
    """A key: what it means, and which values it takes.

    Attributes:
        name: with its section, `TRAIN.optim`.
        default: as a section holds it; lists are tuples.
        doc: meaning and unit, in Markdown.
        kinds: types of the values, in the order in which they are tried.
        words: texts that are taken: the only ones of a text, others beside numbers and lists.
        least, most: inclusive bounds of a number, or of each number of a list.
        lengths: numbers of entries that a list may have; empty for any.
        fits: what else a value must hold.
        advice: the end of an error: what to give instead.
        old: earlier names in the section, with what turns an earlier value into one of today.
    """

    name: str
    default: Any
    doc: str
    kinds: tuple[Any, ...]
    words: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    lengths: tuple[int, ...] = ()
    fits: Callable[[Any], bool] | None = None
    advice: str = ""
    old: Mapping[str, Callable[[Any], Any] | None] = field(default_factory=dict)

    def read(self, value: Any, source: str = "") -> Any:
        """A value as a section holds it.

        Args:
            value: of one of the key's types.
            source: file or command line that it comes from, where texts stand for values, too:
                "0.02", "(300, 450)", "color,index". Empty for values of Python.

        Raises:
            ValueError: the key does not take it; source, key, value and what to give are named.
        """
        given = _literal(value) if source else value
        found = self._parsed(given, value, bool(source))
        if found is not None and not self._wrong(found):
            return found
        advice = self._wrong(found) if found is not None else self._takes(given)
        shown = found if isinstance(found, tuple) else given
        shown = list(shown) if isinstance(shown, tuple) else shown
        where = f"{source}: " if source else ""
        raise ValueError(f"{where}{self.name} is {shown!r:.200}{advice}")

    def read_old(self, name: str, value: Any, source: str = "") -> Any:
        """A value that was given under an earlier name of the key; errors show that name."""
        convert, given = self.old[name], _literal(value) if source else value
        if convert is None:
            return self.read(value, source)
        shown = f"{self.name.partition('.')[0]}.{name} {given!r:.80} (now {self.name})"
        new = convert(given) if _is_number(given) else given
        return replace(self, name=shown).read(new, source)

    def takes(self) -> str:
        """What values the key takes, in a few words of Markdown."""
        forms = [f"`{word}`" for word in self.words]
        for kind in self.kinds:
            if kind is str and self.words:
                continue
            inner = typing.get_args(kind)[0] if typing.get_args(kind) else kind
            name = _NAMES.get(inner, "list")
            forms.append(name if inner is kind else f"list of {name}s")
        low, high = self.least, self.most
        bounds = (
            "" if low is None else f" ≥ {low:g}" if high is None else f" in [{low:g}, {high:g}]"
        )
        return f"{', '.join(forms)}{bounds}"

    def _parsed(self, value: Any, text: Any, typed: bool) -> Any:
        """The value in one of the key's types; None where it has none of them."""
        if value is False and "off" in self.words:
            value = "off"  # as yaml reads a bare off
        if isinstance(value, str) and value in self.words:
            return value
        for kind in self.kinds:
            if kind is not str:
                is_text = typed and isinstance(value, str) and kind not in _KINDS
                found = _as_type(kind, _words(value) if is_text else value)
            elif self.words or (len(self.kinds) > 1 and isinstance(value, (list, tuple))):
                continue
            else:
                # A text that reads as something else stays one: "None", a folder called 2024_10.
                found = _as_type(str, value if isinstance(value, str) else text)
            if found is not None:
                return found
        return None

    def _takes(self, value: Any) -> str:
        """The end of the error about a value of another type."""
        if self.kinds == (str,) and self.words:
            return f"{closest(str(value), list(self.words))}; it is one of {', '.join(self.words)}"
        if self.kinds[0] not in _KINDS and isinstance(value, Mapping):
            return "; it takes a list"
        if self.advice and (self.words or self.kinds[0] not in _KINDS):
            return f"; {self.advice}"
        return f"; it takes {_KINDS.get(self.kinds[0], 'a list')}"

    def _wrong(self, value: Any) -> str:
        """The end of the error about a value of the right type; empty where it fits."""
        if isinstance(value, str) and value in self.words:
            return ""
        entries = value if isinstance(value, tuple) else (value,)
        low, high = self.least, self.most
        inside = all(
            (low is None or entry >= low) and (high is None or entry <= high)
            for entry in (entries if (low, high) != (None, None) else ())
        )
        long = isinstance(value, tuple) and self.lengths and len(value) not in self.lengths
        if inside and not long and (self.fits is None or self.fits(value)):
            return ""
        if self.advice:
            return f"; {self.advice}"
        if high is not None:
            return f"; it must be within [{low:g}, {high:g}]"
        return "; it must not be negative" if low == 0 else f"; it must be at least {low:g}"


def key(default: Any, doc: str, **limits: Any) -> Any:
    """A field of a section; `limits` are attributes of `Setting`."""
    return field(default=default, metadata={"doc": doc, **limits})


S = TypeVar("S", bound="Section")


@dataclass(frozen=True)
class Section:
    """Base of the sections: values are read and checked when one is made."""

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, setting in settings(type(self)).items():
            object.__setattr__(self, name, setting.read(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        """Refuses values that cannot work together, with a ValueError."""

    @classmethod
    def read(cls: type[S], given: Any) -> S:
        """A section from any object with some of its attributes, or a dict with some of its keys.

        Those it lacks keep their default.

        Raises:
            ValueError: a value cannot be used; the message names the key and the fix.
        """
        if isinstance(given, cls):
            return given
        values: dict[str, Any] = {}
        for name, setting in settings(cls).items():
            for known in (name, *setting.old):  # in a yacs tree an old name is what was set
                has = known in given if isinstance(given, Mapping) else hasattr(given, known)
                if not has:
                    continue
                value = given[known] if isinstance(given, Mapping) else getattr(given, known)
                if known != name:
                    warn_renamed({f"{cls.SECTION}.{known}": setting.name})
                    value = setting.read_old(known, value)
                values[name] = value
        return cls(**values)


def warn_renamed(names: Mapping[str, str], source: str = "") -> None:
    """One line about keys that were given by earlier names, unless another process says it."""
    if names and os.environ.get("RANK", "0") == "0":
        where = f"{source}: " if source else ""
        told = ", ".join(f"{old} is now {new}" for old, new in names.items())
        log.warning("%searlier names of keys: %s", where, told)


def settings(section: type[Section]) -> dict[str, Setting]:
    """The keys of a section by the names of their fields."""
    if section not in _made:
        _made[section] = _settings(section)
    return _made[section]


_made: dict[type[Section], dict[str, Setting]] = {}


def _settings(section: type[Section]) -> dict[str, Setting]:
    hints = typing.get_type_hints(section)
    prefix = f"{section.SECTION}." if section.SECTION else ""
    return {
        f.name: Setting(f"{prefix}{f.name}", f.default, kinds=_kinds(hints[f.name]), **f.metadata)
        for f in fields(section)
        if f.metadata
    }


# ------------------------------------------------------------------------------ values
def _kinds(hint: Any) -> tuple[Any, ...]:
    """`int | str` as (int, str), `tuple[float, ...]` as (tuple[float, ...],)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _literal(value: Any) -> Any:
    """Reads "(300, 375)", "0.02" or "True" as Python writes them; anything else stays a text."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return {"true": True, "false": False}.get(value.lower(), value)


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _as_type(kind: Any, value: Any) -> Any:
    """The value as a `kind`, None where it is no such thing."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind in (int, float):
        return kind(value) if _is_number(value) and (kind is float or value % 1 == 0) else None
    if kind is str:
        if value is None:
            return ""
        return str(value) if isinstance(value, str) or not isinstance(value, Iterable) else None
    inner = typing.get_args(kind)[0]
    entries = [
        _as_type(inner, entry) if inner in _KINDS or isinstance(entry, (list, tuple)) else None
        for entry in _entries(value)
    ]
    return None if None in entries else tuple(entries)


def _words(text: str) -> list[str]:
    """A list as typed in a shell: [color, index], (color) or color,index."""
    return [word.strip() for word in text.strip("[]() ").split(",") if word.strip()]


def _entries(value: Any) -> Iterable[Any]:
    """The entries of a list, [None] where it is none; a single entry stands for itself."""
    if isinstance(value, (Mapping, bool)):
        return [None]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return value
    return [] if value is None else [value]
