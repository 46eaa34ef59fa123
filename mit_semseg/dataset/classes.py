"""Class tables: names and colours of the classes."""

from __future__ import annotations

import colorsys
import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mit_semseg.files import PathLike

TABLES = Path(__file__).parent / "tables"


def distinct_colors(count: int) -> np.ndarray:
    """`count` distinct colours, (count, 3) uint8, with hues at golden-angle steps."""
    colors = [
        colorsys.hsv_to_rgb((0.6180339887 * k) % 1, (0.55, 0.95, 0.75)[k % 3], (0.95, 0.75)[k % 2])
        for k in range(count)
    ]
    return np.rint(np.array(colors).reshape(-1, 3) * 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Names and colours of the classes, in class order.

    Attributes:
        names: names of the K classes.
        colors: (K, 3) uint8 RGB.
    """

    names: tuple[str, ...]
    colors: np.ndarray

    def __post_init__(self) -> None:
        if self.colors.shape != (len(self.names), 3):
            raise ValueError(
                f"a class table of {len(self.names)} names needs colors of shape "
                f"({len(self.names)}, 3); got {self.colors.shape}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, names: Iterable[str]) -> ClassTable:
        """A table of these names with generated colours."""
        names = tuple(names)
        return cls(names, distinct_colors(len(names)))

    @classmethod
    def numbered(cls, count: int) -> ClassTable:
        """A table with names `class 0`, `class 1`, ..."""
        return cls.of(f"class {k}" for k in range(count))

    @classmethod
    def load(cls, path: PathLike) -> ClassTable:
        """Loads a CSV file with columns Idx (from 1, in order), Name and optionally R, G, B.

        Of several names separated by `;` the first is used. Without R, G, B, colours are generated.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: a column is missing, a row is out of order, or a colour is outside 0..255.
        """
        name = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name}: no such class table; check DATASET.classes")
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        columns = set(rows[0]) if rows else set()
        if not {"Idx", "Name"} <= columns:
            raise ValueError(f"{name}: a class table needs the columns Idx,Name[,R,G,B] and rows")
        names, colors = [], []
        for number, row in enumerate(rows, 1):
            if row["Idx"] != str(number):
                raise ValueError(f"{name}: Idx is {row['Idx']!r} in row {number}; count from 1")
            names.append((row["Name"] or "").split(";")[0].strip())
            if {"R", "G", "B"} <= columns:
                values = [str(row[c]).strip() for c in "RGB"]
                if not all(v.isdecimal() and int(v) <= 255 for v in values):
                    raise ValueError(f"{name}: row {number} has colour {values}; use 0..255")
                colors.append([int(v) for v in values])
        if not colors:
            return cls.of(names)
        return cls(tuple(names), np.array(colors, dtype=np.uint8))

    def checked(self, num_class: int, name: PathLike, fix: str) -> ClassTable:
        """The table, if it has `num_class` rows.

        Args:
            num_class: `DATASET.num_class`.
            name: name of the table, for the error.
            fix: advice, for the error.

        Raises:
            ValueError: the number of rows differs.
        """
        if len(self) != num_class:
            raise ValueError(
                f"{os.fspath(name)} has {len(self)} classes, but DATASET.num_class is {num_class}; "
                f"{fix}"
            )
        return self

    def save(self, path: PathLike) -> None:
        """Writes the table as CSV with columns Idx,Name,R,G,B."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["Idx", "Name", "R", "G", "B"])
            for number, (name, color) in enumerate(zip(self.names, self.colors.tolist()), 1):
                writer.writerow([number, name, *color])


def table_of(name: str, num_class: int, title: str) -> ClassTable:
    """A class table of the package; ValueError if it does not have `num_class` rows."""
    table = ClassTable.load(TABLES / f"{name}.csv")
    return table.checked(num_class, title, f"set DATASET.num_class {len(table)}")
