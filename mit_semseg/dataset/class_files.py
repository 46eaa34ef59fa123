"""Class tables in the forms that annotation tools write: names, and colours or stored values."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mit_semseg.files import PathLike

# Names of files with class tables, in the order in which they are preferred.
TABLE_FILES = (
    *("labelmap.txt", "_classes.csv", "class_names.txt", "label_names.txt", "label_colors.txt"),
    *("class_dict.csv", "classes.csv", "classes.txt", "labels.txt"),
)
# Names of labelme for pixels without a class, and for ignored ones.
BACKGROUNDS = ("background", "_background_")
IGNORED_NAME = "__ignore__"
IGNORED_VALUE = 255


def is_background(name: str) -> bool:
    """Whether a class of this name means "no object"."""
    return name.casefold() in BACKGROUNDS


@dataclass(frozen=True, eq=False)
class ClassFile:
    """The rows of a class table.

    Attributes:
        path: the file, for messages.
        names: names of the rows, all different.
        colors: (K, 3) uint8 RGB; None: the file has none.
        values: stored value of each row in masks of one channel.
    """

    path: str
    names: tuple[str, ...]
    colors: np.ndarray | None
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        for what, rows in (("name", self.names), ("value", self.values)):
            self._check_different(what, rows)

    def _check_different(self, what: str, rows: Sequence[object]) -> None:
        twice = next((row for n, row in enumerate(rows) if row in rows[:n]), None)
        if twice is not None:
            raise ValueError(f"{self.path}: two of its classes have the {what} {twice!r}")

    @classmethod
    def load(cls, path: PathLike) -> ClassFile:
        """Reads one of these forms, recognised by the content:

        - CSV with the columns `Idx,Name[,R,G,B]` of this package, where `Idx` is the stored value,
          or `name,r,g,b`;
        - CSV with the columns `Pixel Value, Class`, as in exports of Roboflow;
        - `name:r,g,b:parts:actions`, the `labelmap.txt` of CVAT; colours may be missing;
        - `r g b name`, the `label_colors.txt` of CamVid;
        - a name per line, as in exports of labelme: stored values count from 0, and 255 is
          ignored; a first line `__ignore__` is not counted.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: a row is not of the form of the others, or two are equal.
        """
        name = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name}: no such class table")
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not a text file in UTF-8, as class tables are") from error
        lines = [line.strip() for line in text.splitlines()]
        rows = [line for line in lines if line and not line.startswith("#")]
        if not rows:
            raise ValueError(f"{name}: a class table without rows")
        header = [cell.strip().casefold() for cell in rows[0].split(",")]
        read: Callable[[str, Sequence[str]], ClassFile] = _names
        if "name" in header or {"pixel value", "class"} <= set(header):
            read = _csv
        elif all(line.count(":") >= 3 for line in rows):
            read = _labelmap
        elif all(_is_camvid(line) for line in rows):
            read = _label_colors
        return read(name, rows)

    def rows_of(self, pixels: np.ndarray, file: PathLike) -> np.ndarray:
        """Row numbers of a colour mask.

        Args:
            pixels: (H, W, 3) uint8 RGB.
            file: its file, for the error.

        Returns:
            (H, W) int64.

        Raises:
            ValueError: a colour is not in the table; the message names it and its first pixel. Or
                two rows have the same colour.
        """
        if self.colors is None:
            raise ValueError(
                f"{os.fspath(file)}: a colour mask, but {self.path} has no colours; add them as "
                "name:r,g,b:: (labelmap.txt) or Idx,Name,R,G,B"
            )
        self._check_different("colour", [tuple(color) for color in self.colors.tolist()])
        keys = _packed(self.colors)
        order = np.argsort(keys)
        packed = _packed(pixels)
        rows = order[np.minimum(np.searchsorted(keys, packed, sorter=order), len(keys) - 1)]
        unknown = keys[rows] != packed
        if unknown.any():
            y, x = np.unravel_index(int(unknown.argmax()), unknown.shape)
            color = pixels[y, x].astype(np.int64)
            apart = np.abs(self.colors.astype(np.int64) - color).max(axis=1)
            nearest = int(apart.argmin())
            fix = "add a row for it"
            if apart[nearest] < 32:  # as edges and compression make them
                fix += ", or save masks without anti-aliasing and compression"
            raise ValueError(
                f"{os.fspath(file)}: colour {tuple(color.tolist())} at column {x}, row {y} "
                f"({int(unknown.sum())} pixels of unknown colours) is not in {self.path}; the "
                f"nearest is {self.names[nearest]!r} {tuple(self.colors[nearest].tolist())}: {fix}"
            )
        return rows


def _packed(colors: np.ndarray) -> np.ndarray:
    """Colours (..., 3) as integers."""
    return colors.astype(np.int64) @ np.array([65536, 256, 1])


def _color(cells: Sequence[str], where: str) -> list[int]:
    values = [cell.strip() for cell in cells]
    if len(values) != 3 or not all(v.isdecimal() and int(v) <= 255 for v in values):
        raise ValueError(f"{where}: colour {','.join(values)!r}; give three numbers in 0..255")
    return [int(v) for v in values]


def _csv(name: str, rows: Sequence[str]) -> ClassFile:
    table = list(csv.reader(rows, skipinitialspace=True))
    header = [cell.strip().casefold() for cell in table[0]]
    at = {cell: k for k, cell in enumerate(header)}
    label = at["name"] if "name" in at else at["class"]
    number_column = next((column for column in ("pixel value", "idx") if column in at), "")
    names, colors, values = [], [], []
    for number, cells in enumerate(table[1:], 2):
        where = f"{name}: row {number}"
        if len(cells) < len(header):
            raise ValueError(f"{where} has {len(cells)} columns, the first has {len(header)}")
        names.append(cells[label].split(";")[0].strip())
        if {"r", "g", "b"} <= set(at):
            colors.append(_color([cells[at[c]] for c in "rgb"], where))
        if number_column:
            value = cells[at[number_column]].strip()
            if not value.isdecimal():
                raise ValueError(f"{where}: {number_column} is {value!r}, not a number")
            values.append(int(value))
    return _file(name, names, colors, values)


def _labelmap(name: str, rows: Sequence[str]) -> ClassFile:
    # A name may contain colons; what follows it has none.
    cells = [row.rsplit(":", 3) for row in rows]
    given = [n for n, cell in enumerate(cells) if cell[1].strip()]
    if given and len(given) < len(cells):
        lacking = next(n for n in range(len(cells)) if n not in given)
        raise ValueError(f"{name}: class {cells[lacking][0]!r} has no colour, others have")
    colors = [_color(cells[n][1].split(","), f"{name}: {cells[n][0]!r}") for n in given]
    return _file(name, [cell[0].strip() for cell in cells], colors)


def _is_camvid(line: str) -> bool:
    cells = line.split(maxsplit=3)
    return len(cells) == 4 and all(cell.isdecimal() for cell in cells[:3])


def _label_colors(name: str, rows: Sequence[str]) -> ClassFile:
    cells = [row.split(maxsplit=3) for row in rows]
    return _file(name, [c[3] for c in cells], [_color(c[:3], f"{name}: {c[3]!r}") for c in cells])


def _names(name: str, rows: Sequence[str]) -> ClassFile:
    if rows[0] == IGNORED_NAME:
        rows = rows[1:]
    values = [*range(len(rows))]
    if len(rows) <= IGNORED_VALUE:
        rows, values = [*rows, IGNORED_NAME], [*values, IGNORED_VALUE]
    return _file(name, rows, [], values)


def _file(
    name: str, names: Sequence[str], colors: Sequence[Sequence[int]], values: Sequence[int] = ()
) -> ClassFile:
    if not names:
        raise ValueError(f"{name}: a class table without rows")
    if not all(names):
        raise ValueError(f"{name}: class {list(names).index('')} has no name")
    table = np.array(colors, dtype=np.uint8) if colors else None
    return ClassFile(name, tuple(names), table, tuple(values or range(len(names))))
