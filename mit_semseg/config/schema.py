"""Declaration of settings: keys with type, default, meaning and range.

A section is a frozen dataclass whose fields are created with `key`. Its values, from a YAML file,
the command line or Python, are converted and checked on construction. The yacs tree, the tables of
docs/settings.md and `mit-semseg config` are generated from these fields.
"""

from __future__ import annotations

import ast
import logging
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, ClassVar, TypeVar

from mit_semseg.errors import warns_here
from mit_semseg.registry import closest

log = logging.getLogger("mit_semseg")

_NAMES = {bool: "`True`, `False`", int: "integer", float: "number", str: "string"}
_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Setting:
    """A key of the configuration.

    Attributes:
        name: with its section, `TRAIN.optim`.
        default: value; lists are tuples.
        doc: meaning and unit, in Markdown.
        kinds: possible types, in the order in which they are tried.
        words: allowed strings; with other types than str in addition to their values.
        least, most: inclusive bounds of a number, or of each number of a list.
        lengths: allowed lengths of a list; empty for any.
        fits: a further condition.
        advice: the end of error messages, what to give instead.
        old: earlier names in the section, each with a conversion of its values or None.
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
        """Convert and check a value.

        Args:
            value: of one of the types.
            source: file or command line of the value, in which strings are parsed: "0.02",
                "(300, 450)", "color,index". Empty for values from Python.

        Raises:
            ValueError: a wrong value; the message has source, key, value and fix.
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
        """Convert and check a value given with an earlier name, which is used in errors."""
        convert, given = self.old[name], _literal(value) if source else value
        if convert is None:
            return self.read(value, source)
        shown = f"{self.name.partition('.')[0]}.{name} {given!r:.80} (now {self.name})"
        new = convert(given) if _is_number(given) else given
        return replace(self, name=shown).read(new, source)

    def takes(self) -> str:
        """The possible values in Markdown."""
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
        """The value in one of the key's types; None if it has none of them."""
        if value is False and "off" in self.words:
            value = "off"  # YAML reads an unquoted off as False
        if isinstance(value, str) and value in self.words:
            return value
        for kind in self.kinds:
            if kind is not str:
                is_text = typed and isinstance(value, str) and kind not in _KINDS
                found = _as_type(kind, _words(value) if is_text else value)
            elif self.words or (len(self.kinds) > 1 and isinstance(value, (list, tuple))):
                continue
            else:
                # The original string, not its literal: "None", a folder called 2024_10.
                found = _as_type(str, value if isinstance(value, str) else text)
            if found is not None:
                return found
        return None

    def _takes(self, value: Any) -> str:
        """The end of the error for a value of a wrong type."""
        if self.kinds == (str,) and self.words:
            return f"{closest(str(value), list(self.words))}; give one of {', '.join(self.words)}"
        if self.kinds[0] not in _KINDS and isinstance(value, Mapping):
            return "; give a list"
        if self.advice and (self.words or self.kinds[0] not in _KINDS):
            return f"; {self.advice}"
        return f"; give {_KINDS.get(self.kinds[0], 'a list')}"

    def _wrong(self, value: Any) -> str:
        """The end of the error for a value of the right type; empty if it is valid."""
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
            return f"; it must be in [{low:g}, {high:g}]"
        return "; it must not be negative" if low == 0 else f"; it must be at least {low:g}"


def key(default: Any, doc: str, **limits: Any) -> Any:
    """A field of a section; `limits` are attributes of `Setting`."""
    return field(default=default, metadata={"doc": doc, **limits})


S = TypeVar("S", bound="Section")


@dataclass(frozen=True)
class Section:
    """Base class of sections, which converts and checks values on construction."""

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, setting in settings(type(self)).items():
            object.__setattr__(self, name, setting.read(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        """Raise ValueError for an invalid combination of values."""

    @classmethod
    def read(cls: type[S], given: Any) -> S:
        """A section from an object or dict with some of its keys; others have their defaults.

        Raises:
            ValueError: a wrong value, with key and fix.
        """
        if isinstance(given, cls):
            return given
        values: dict[str, Any] = {}
        for name, setting in settings(cls).items():
            for known in (name, *setting.old):  # the earlier name last: it was set by the user
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
    """Warn of keys given with earlier names, old -> new."""
    if names and warns_here():
        where = f"{source}: " if source else ""
        renamed = ", ".join(f"{old} is now {new}" for old, new in names.items())
        log.warning("%srenamed keys: %s", where, renamed)


def settings(section: type[Section]) -> dict[str, Setting]:
    """The settings of a section by field name."""
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
    """The value of a Python literal such as "(300, 375)" or "True"; other strings unchanged."""
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
    except OverflowError:  # an integer outside the range of float
        return False


def _as_type(kind: Any, value: Any) -> Any:
    """The value converted to `kind`; None if that is not possible."""
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
    """The words of a list: [color, index], (color) or color,index."""
    return [word.strip() for word in text.strip("[]() ").split(",") if word.strip()]


def _entries(value: Any) -> Iterable[Any]:
    """The entries of a list or a single value; [None] for other types."""
    if isinstance(value, (Mapping, bool)):
        return [None]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return value
    return [] if value is None else [value]
