"""Masks that are computed from annotations once, and cached beside the data."""

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

# Folder of the cached masks, in that of the data set.
FOLDER = "semantic_masks"
# Number of images of a cached list whose existence is checked.
_CHECKED = 32


@dataclass(frozen=True)
class MaskJob:
    """A mask to be computed.

    Attributes:
        record: with `fpath_segm`, relative to the data set's folder.
        draw: returns its stored values, (H, W) uint8.
    """

    record: Record
    draw: Callable[[], np.ndarray]


def cached_facts(root: Path, listing: str, source: str) -> dict[str, Any] | None:
    """The `facts` of a `cached_masks` call; None if its masks are not those of `source`.

    If the modification time of `source` differs from the recorded one, its checksum is compared,
    because modification times change in copies of a data set. If `source` does not exist, the
    masks are valid.
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
        with contextlib.suppress(OSError):  # if it cannot be written, the next call compares again
            _write_note(path, digest, now, facts)
    return facts  # type: ignore[no-any-return]


def cached_masks(
    root: Path,
    listing: str,
    jobs: Callable[[], Sequence[MaskJob]],
    title: str,
    source: str,
    facts: Mapping[str, Any],
) -> list[Record]:
    """Records whose masks are computed by the first call, and reused by later ones.

    Masks, and then their list, are written atomically: an interrupted call is resumed by the next
    one, and several processes can call at the same time. If `source` has changed, the masks are
    computed again.

    Args:
        root: folder of the data set.
        listing: list file below `root`, which is written when all masks exist.
        jobs: returns the masks to compute; only called if there is no list, or its images do not
            exist, because the layout may have changed. Existing masks are kept.
        title: title of the progress bar.
        source: file below `root` that the masks are computed from; not needed afterwards.
        facts: JSON values that `cached_facts` returns.

    Raises:
        OSError: the folder is not writable.
    """
    path, file = root / listing, root / source
    since = _changed(file)
    if path.is_file() and (not since or cached_facts(root, listing, source) is not None):
        records = read_odgt(path)
        if not since or _has_images(root, records):
            return records
    digest = sha256_of(file) if since else ""
    todo = jobs()
    try:
        for folder in {(root / job.record["fpath_segm"]).parent for job in todo}:
            folder.mkdir(parents=True, exist_ok=True)
        # Otherwise an older list would count as that of the new file.
        _note(path).unlink(missing_ok=True)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # Several processes, such as ranks, may run this at the same time. Each has a random
            # order and skips existing masks, so that they share the work, and any of them may die.
            order = np.random.default_rng().permutation(len(todo)).tolist()
            done = pool.map(lambda number: _draw(root, todo[number], since), order)
            for _ in tqdm(done, desc=f"{title} masks", total=len(todo), unit="img", disable=None):
                pass
        write_odgt(path, [job.record for job in todo])
        _write_note(_note(path), digest, since, facts)
    except PermissionError as error:
        raise _not_writable(root, error) from error
    return read_odgt(path)


def converted_masks(root: Path, jobs: Sequence[tuple[Path, MaskJob]], title: str) -> list[Record]:
    """Records whose masks are computed from one file each, and again when that file changes.

    Args:
        root: folder of the data set.
        jobs: the file that a mask is computed from, and the mask.
        title: title of the progress bar.

    Raises:
        OSError: the folder is not writable.
    """
    try:
        for folder in {(root / job.record["fpath_segm"]).parent for _, job in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            done = pool.map(lambda pair: _draw(root, pair[1], _changed(pair[0])), jobs)
            for _ in tqdm(done, desc=f"{title} masks", total=len(jobs), unit="img", disable=None):
                pass
    except PermissionError as error:
        raise _not_writable(root, error) from error
    return [job.record for _, job in jobs]


def _not_writable(root: Path, error: PermissionError) -> OSError:
    return OSError(
        f"{root}: its masks are computed once and cached in {FOLDER}, but the folder is not "
        f"writable ({error.strerror}); run mit-semseg data check where it is, or use a copy"
    )


def _has_images(root: Path, records: Sequence[Record]) -> bool:
    """Whether at least one of a few images of a list exists; some may be missing."""
    few = records[:: max(1, len(records) // _CHECKED)]
    return any((root / record["fpath_img"]).is_file() for record in few)


def _changed(file: Path) -> int:
    """Modification time of a file in nanoseconds; 0 if it does not exist."""
    return file.stat().st_mtime_ns if file.is_file() else 0


def _note(path: Path) -> Path:
    """The file beside a list that describes the source of its masks."""
    return path.with_name(f"{path.stem}.json")


def _write_note(path: Path, digest: str, changed: int, facts: Mapping[str, Any]) -> None:
    note = {"sha256": digest, "changed": changed, "facts": facts}
    with replacing(path) as part:
        part.write_text(json.dumps(note) + "\n", encoding="utf-8")


def _draw(root: Path, job: MaskJob, since: int) -> None:
    """Writes a mask, unless it exists with the modification time of the source."""
    target = root / job.record["fpath_segm"]
    if not target.is_file() or _changed(target) != since:
        with replacing(target) as part:
            Image.fromarray(job.draw()).save(part, format="PNG")
            os.utime(part, ns=(since, since))
