"""Conversion of stored mask values to class ids."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

import numpy as np

from mit_semseg.config import DataOptions
from mit_semseg.files import PathLike

_UNKNOWN = -2  # in lookup tables: neither a class nor ignored
# White in 8 and 16 bits: in masks of two classes one of them, in others "no label".
_WHITE = (255, 65535)


def _two_classes(white: int) -> str:
    """Advice for black and white masks of two classes."""
    return (
        f"if 0 and {white} are two classes, set DATASET.num_class 2 DATASET.label_map "
        f'"[[0, 0], [{white}, 1]]"'
    )


class LabelMap:
    """Maps stored mask values to class ids, or -1 for ignored, with a lookup table.

    Args:
        values: stored value -> class id in 0..num_class-1, or -1 for ignored.
        num_class: number of classes.
        hint: added to the error for a stored value that is not in `values`.
        mirror_pairs: pairs of classes that a flip exchanges, such as left and right arm.

    Example:
        >>> LabelMap.shifted(3, label_offset=0, ignore_label=[255])(np.array([[0, 2, 255]]))
        array([[ 0,  2, -1]])
    """

    def __init__(
        self,
        values: Mapping[int, int],
        num_class: int,
        hint: str = "",
        mirror_pairs: Iterable[tuple[int, int]] = (),
    ) -> None:
        if not values or min(values) < 0:
            raise ValueError("a label map needs stored values of 0 and above")
        if min(values.values()) < -1 or max(values.values()) >= num_class:
            raise ValueError(f"a label map for {num_class} classes maps to -1..{num_class - 1}")
        self.values = dict(values)
        self.num_class = num_class
        self.hint = hint
        self.mirror_pairs = tuple(mirror_pairs)
        self._table = np.full(max(values) + 1, _UNKNOWN, dtype=np.int64)
        self._table[list(values)] = list(values.values())
        self._run = next(k for k in itertools.count() if k not in values)  # 0..run-1 are known
        self._bytes = bytes(value for value in values if value < 256)

    @classmethod
    def shifted(
        cls, num_class: int, label_offset: int = 1, ignore_label: Iterable[int] = ()
    ) -> LabelMap:
        """Stored value minus `label_offset` is the class; values below the offset are ignored."""
        if label_offset < 0:
            raise ValueError(f"DATASET.label_offset is {label_offset}; it must be 0 or more")
        values = {v: max(v - label_offset, -1) for v in range(num_class + label_offset)}
        hint = f" (num_class {num_class}, label_offset {label_offset})"
        return cls(values, num_class, hint).ignoring(ignore_label)

    @classmethod
    def identity(cls, num_class: int, ignored: int, hint: str = "") -> LabelMap:
        """Stored values are class ids; one other value, `ignored`, is ignored."""
        return cls({k: k for k in range(num_class)} | {ignored: -1}, num_class, hint)

    @classmethod
    def of_options(cls, options: DataOptions) -> LabelMap:
        """The map of `label_map`, or else of `label_offset`, with `ignore_label`."""
        if not options.label_map:
            return cls.shifted(options.num_class, options.label_offset, options.ignore_label)
        values = {int(stored): int(class_id) for stored, class_id in options.label_map}
        return cls(values, options.num_class, " (DATASET.label_map)").ignoring(options.ignore_label)

    def ignoring(self, stored: Iterable[int]) -> LabelMap:
        """The map with these stored values also ignored."""
        extra = {int(value): -1 for value in stored}
        if any(value < 0 for value in extra):
            raise ValueError(
                f"DATASET.ignore_label is {sorted(extra)}; masks store values of 0 and above"
            )
        if not extra:
            return self
        return LabelMap({**self.values, **extra}, self.num_class, self.hint, self.mirror_pairs)

    def pairing(self, mirror_pairs: Iterable[tuple[int, int]]) -> LabelMap:
        """The map with these `mirror_pairs`."""
        return LabelMap(self.values, self.num_class, self.hint, mirror_pairs)

    @cached_property
    def mirrored(self) -> LabelMap:
        """The map for flipped images: the classes of each of `mirror_pairs` are exchanged."""
        if not self.mirror_pairs:
            return self
        other = dict(self.mirror_pairs) | {b: a for a, b in self.mirror_pairs}
        values = {stored: other.get(k, k) for stored, k in self.values.items()}
        return LabelMap(values, self.num_class, self.hint, self.mirror_pairs)

    def describe(self) -> str:
        """The stored values that are classes or ignored, for example `0..11, 255`."""
        known = sorted(self.values)
        runs: list[list[int]] = []
        for value in known:
            if runs and value == runs[-1][1] + 1:
                runs[-1][1] = value
            else:
                runs.append([value, value])
        return ", ".join(f"{a}..{b}" if a < b else f"{a}" for a, b in runs)

    def complaint(self, stored: Iterable[int], file: PathLike, others: Iterable[int] = ()) -> str:
        """The error message for a file with these stored values; "" if all are known.

        Args:
            stored: the values.
            file: the file.
            others: values of other files of the same data set.
        """
        bad = sorted(set(stored) - set(self.values))
        if not bad:
            return ""
        message = (
            f"{os.fspath(file)}: label {', '.join(map(str, bad[:8]))} is outside {self.describe()}"
        )
        ignore = f"DATASET.ignore_label {bad[0] if len(bad) == 1 else bad[:8]}"
        found, white = {*stored, *others}, bad[0]
        if white in _WHITE and (found == {0, white} or (found == {white} and self.num_class <= 2)):
            message += f"; {_two_classes(white)}"
            return message + (f", else {ignore}" if self.num_class > 2 else "")
        return f"{message}; set {ignore} or a label map{self.hint}"

    def check(self, raw: np.ndarray, file: PathLike = "mask") -> None:
        """Checks that every stored value is a class or ignored.

        Args:
            raw: integers of any shape.
            file: file name for the error.

        Raises:
            ValueError: a value is neither.
        """
        if not raw.size:
            return
        low, high = 0 if raw.dtype.kind == "u" else int(raw.min()), int(raw.max())
        if low >= 0 and high < self._run:  # the usual case, which is fast
            return
        if raw.dtype == np.uint8:
            unknown = bool(raw.tobytes().translate(None, self._bytes))  # bytes that are not known
        else:
            in_table = low >= 0 and high < len(self._table)
            unknown = not in_table or bool((self._table[raw] == _UNKNOWN).any())
        if unknown:
            raise ValueError(self.complaint(np.unique(raw).tolist(), file))

    def __call__(self, raw: np.ndarray, file: PathLike = "mask") -> np.ndarray:
        """Class ids of stored values.

        Args:
            raw: integers of any shape.
            file: file name for the error.

        Returns:
            int64 of the same shape, -1 = ignored.

        Raises:
            ValueError: a stored value is neither a class nor ignored.
        """
        self.check(raw, file)
        return self._table[raw]


def label_warnings(
    stored: Collection[int],
    ignored: int,
    pixels: int,
    where: str,
    present: Mapping[int, str],
    num_class: int,
) -> list[str]:
    """Warnings about ignored pixels, and about classes that do not occur.

    Args:
        stored: mask values that occur.
        ignored: number of ignored pixels.
        pixels: number of all pixels.
        where: the masks, for messages.
        present: names of the classes that occur, by class id.
        num_class: number of classes.
    """
    warnings = []
    if pixels and ignored / pixels > 0.5:
        warnings.append(
            f"{100 * ignored / pixels:.0f} % of pixels are ignored in {where}; "
            "check DATASET.label_offset and DATASET.ignore_label"
        )
    white = max(stored, default=0)
    if white in _WHITE and set(stored) == {0, white} and ignored:
        warnings.append(
            f"only 0 and {white} occur in {where}, and one is ignored: {_two_classes(white)}"
        )
    elif len(present) == 1 and num_class > 1:
        (name,) = present.values()
        warnings.append(
            f"all labelled pixels in {where} are of one class out of {num_class}, {name}; "
            "check DATASET.label_map, DATASET.label_offset and DATASET.ignore_label"
        )
    # Not if only the last quarter is missing: rare classes are often the last ones.
    elif present and 4 * (max(present) + 1) <= 3 * num_class:
        warnings.append(
            f"the highest class in {where} is {max(present)}, but DATASET.num_class is "
            f"{num_class}; check DATASET.num_class"
        )
    return warnings
