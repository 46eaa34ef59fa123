"""Masks that a data set does not ship as such: drawn once, and kept beside the data."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mit_semseg.dataset.records import Record, read_odgt, write_odgt
from mit_semseg.download import sha256_of
from mit_semseg.files import replacing

# Folder below the data set's that masks are kept in.
FOLDER = "semantic_masks"
# Images that are looked for where a list of drawn masks says they are.
_LOOKED_AT = 32


@dataclass(frozen=True)
class Drawing:
    """A mask that is to be.

    Attributes:
        record: with `fpath_segm`, relative to the data set's folder.
        draw: makes its stored values, (H, W) uint8.
    """

    record: Record
    draw: Callable[[], np.ndarray]


def facts_of(root: Path, listing: str, source: str) -> dict[str, Any] | None:
    """The `facts` that `drawn_once` kept; None unless its masks are those of `source` as it is now.

    What counts is the content of `source`, of which a file of another time of change is compared:
    one that takes the place of another may be older than the masks of that, and in a copy of a
    data set times say nothing. Where `source` is gone the masks count as they are.
    """
    path, file = _note(root / listing), root / source
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        digest, changed, facts = note["sha256"], note["changed"], note["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    now = _changed(file)
    if now and now != changed:
        if sha256_of(file) != digest:
            return None
        with contextlib.suppress(OSError):  # where it cannot be written, it is compared again
            _write_note(path, digest, now, facts)
    return facts  # type: ignore[no-any-return]


def drawn_once(
    root: Path,
    listing: str,
    drawings: Callable[[], Sequence[Drawing]],
    title: str,
    source: str,
    facts: Mapping[str, Any],
) -> list[Record]:
    """Records whose masks are drawn by the first call, and found by later ones.

    Every mask appears under its name when it is complete, and the list after all of them: an
    interrupted call is continued by the next one, and several processes may call at once. When
    the file that they were drawn from has changed, they are drawn again.

    Args:
        root: folder of the data set.
        listing: list file below `root` that says that all masks are there.
        drawings: what to draw; only asked when there is no such list, or the images it names are
            gone: they may lie in another layout now, and masks that are there are kept.
        title: of the progress bar.
        source: file below `root` that the masks are drawn from; it may be gone once they are.
        facts: what `facts_of` is to return; of types that JSON has.

    Raises:
        OSError: the folder cannot be written to.
    """
    path, file = root / listing, root / source
    since = _changed(file)
    if path.is_file() and (not since or facts_of(root, listing, source) is not None):
        records = read_odgt(path)
        if not since or _has_images(root, records):
            return records
    digest = sha256_of(file) if since else ""
    todo = drawings()
    try:
        for folder in {(root / drawing.record["fpath_segm"]).parent for drawing in todo}:
            folder.mkdir(parents=True, exist_ok=True)
        _note(path).unlink(missing_ok=True)  # it would make an older list that of the new file
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # Several processes may start at once, as the ranks of a run do. Each goes through the
            # masks in an order of its own and leaves out those that are there by then, so that
            # they share the work, whoever of them dies.
            order = np.random.default_rng().permutation(len(todo)).tolist()
            done = pool.map(lambda number: _draw(root, todo[number], since), order)
            for _ in tqdm(done, desc=f"{title} masks", total=len(todo), unit="img", disable=None):
                pass
        write_odgt(path, [drawing.record for drawing in todo])
        _write_note(_note(path), digest, since, facts)
    except PermissionError as error:
        raise OSError(
            f"{root}: its masks are drawn once and kept in {FOLDER}, but it cannot be written to "
            f"({error.strerror}); call mit-semseg data check where it can, or use a copy"
        ) from error
    return read_odgt(path)


def _has_images(root: Path, records: Sequence[Record]) -> bool:
    """Whether images are where a list says: one of a few is enough, since some may be missing."""
    few = records[:: max(1, len(records) // _LOOKED_AT)]
    return any((root / record["fpath_img"]).is_file() for record in few)


def _changed(file: Path) -> int:
    """When a file was last written, in nanoseconds; 0 where there is none."""
    return file.stat().st_mtime_ns if file.is_file() else 0


def _note(path: Path) -> Path:
    """The file beside a list that says what its masks were drawn from."""
    return path.with_name(f"{path.stem}.json")


def _write_note(path: Path, digest: str, changed: int, facts: Mapping[str, Any]) -> None:
    note = {"sha256": digest, "changed": changed, "facts": facts}
    with replacing(path) as part:
        part.write_text(json.dumps(note) + "\n", encoding="utf-8")


def _draw(root: Path, drawing: Drawing, since: int) -> None:
    """Draw a mask, unless one is there of the same file, which has its time of change."""
    target = root / drawing.record["fpath_segm"]
    if not target.is_file() or _changed(target) != since:
        with replacing(target) as part:
            Image.fromarray(drawing.draw()).save(part, format="PNG")
            os.utime(part, ns=(since, since))
