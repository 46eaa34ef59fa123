"""Download and unpacking of public data sets."""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source
from mit_semseg.dataset.records import Record, with_sizes, write_odgt
from mit_semseg.download import DownloadError, fetch
from mit_semseg.errors import one_line
from mit_semseg.files import replacing

# Exceptions for damaged archives; RuntimeError if a damaged flag claims encryption.
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    struct.error,
    OverflowError,
)


def sources() -> dict[str, Source]:
    """Sources of the public data sets, by format name."""
    found: dict[str, Source] = {}
    for name in FORMATS.names():
        data_format: DataFormat = FORMATS.get(name)()
        if data_format.source is not None:
            found[name] = data_format.source
    return found


def download(name: str, dest: str | os.PathLike[str], *, progress: bool = True) -> bool:
    """Downloads and unpacks a public data set, and prints its licence.

    Interrupted downloads are resumed by the next call; archives are kept beside the data and can be
    deleted afterwards.

    Args:
        name: a key of `sources()`; archives that require a registration are unpacked if they are in
            `dest`.
        dest: folder for `DATASET.root_dataset`, usually `data/<Source.folder>`.
        progress: show progress bars.

    Returns:
        Whether the data are complete; if not, instructions for a manual download were printed.

    Raises:
        ValueError: the data set is unknown, or an archive contains a path outside its folder.
    """
    known = sources()
    if name not in known:
        raise ValueError(f"no data set {name!r} to download; known: {', '.join(known)}")
    source, dest = known[name], Path(dest)
    print(f"{source.title}\nlicence: {source.licence}\n{source.home}")
    missing = [x for x in source.archives if not x.urls and not (dest / x.file_name).is_file()]
    if missing or not source.archives:
        print(by_hand(source, dest, missing))
        return False
    for archive in source.archives:
        file = dest / archive.file_name
        try:
            if archive.urls:
                fetch(archive.urls, file, sha256=archive.sha256, progress=progress)
        except DownloadError as error:
            print(f"{error.reason}\n{by_hand(source, dest, source.archives)}")
            return False
        unpack(file, dest / archive.into, archive.member, progress=progress)
    if not all(archive.urls for archive in source.archives):
        try:  # the content of manually downloaded archives may be wrong
            FORMATS.get(name)().records(dest, "train")
        except FileNotFoundError as error:
            print(f"{error}\n{by_hand(source, dest, source.archives)}")
            return False
    print(f"ready: DATASET.format {name} DATASET.root_dataset {dest}")
    for split, list_name in source.lists.items():
        path = dest.parent / list_name
        if path.exists():
            print(f"{path} exists and is kept")
            continue
        records = with_sizes(FORMATS.get(name)().records(dest, split), dest)
        write_odgt(path, [_below(dest.name, record) for record in records])
        print(f"{path}: {len(records)} samples, DATASET.root_dataset {dest.parent}")
    print(f"the archives in {dest} are no longer needed")
    return True


def _below(folder: str, record: Record) -> Record:
    """The record with paths relative to the folder above."""
    moved = record.copy()
    moved["fpath_img"] = f"{folder}/{record['fpath_img']}"
    moved["fpath_segm"] = f"{folder}/{record['fpath_segm']}"
    return moved


def by_hand(source: Source, dest: Path, archives: Sequence[Archive]) -> str:
    """Instructions for a manual download."""
    lines = []
    if not all(archive.urls for archive in archives) or not archives:
        lines.append(f"see {source.home}, which requires a registration or consent;")
    for archive in archives:
        lines.append(f"download {' or '.join(archive.urls) or archive.file_name}")
        lines.append(f"  and put it at {dest / archive.file_name}, then run this command again;")
    lines.append(f"or unpack it yourself so that {dest} holds: {source.layout}")
    return "\n".join(lines)


def unpack(file: Path, dest: Path, member: str = "", *, progress: bool = True) -> int:
    """Unpacks the regular files of a zip or tar archive to `dest`.

    Existing files of the right size are kept. Files are written atomically. Links and devices are
    skipped.

    Args:
        file: the archive.
        dest: folder to unpack to.
        member: unpack the content of this folder of the archive only.
        progress: show a progress bar.

    Returns:
        Number of files in `dest` that are from the archive.

    Raises:
        ValueError: the file is not an archive or is damaged, `member` is not in it, or a path is
            outside `dest`.
        OSError: a file is larger than the free space, or cannot be written.
    """
    count = 0
    bar = tqdm(desc=f"unpacking {file.name}", unit="files", disable=None if progress else True)
    try:
        with bar:
            for name, size, content in _entries(file):
                target = _target(file, dest, name, member)
                if target is None:
                    continue
                count += 1
                bar.update()
                if target.is_file() and target.stat().st_size == size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(file, name, size, content, target)
    except _DAMAGED as error:
        reason = one_line(error)
        raise ValueError(
            f"{file}: a damaged archive ({reason}); delete it and try again"
        ) from error
    if not count:
        raise ValueError(f"{file}: contains no files{f' in {member}' if member else ''}")
    return count


def _write(file: Path, name: str, size: int, content: _Content, target: Path) -> None:
    """Writes one entry to `target` atomically."""
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(
            f"{file}: {name!r} has {size} bytes, but {target.parent} has {free} bytes free; free "
            "some space, or unpack to another disk"
        )
    try:
        with replacing(target) as part, content() as reader, part.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
    except OSError as error:
        if error.errno and not error.filename:  # errors of write() have no file name
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


class _Content:
    """Opens one entry of an archive."""

    def __init__(self, archive: zipfile.ZipFile | tarfile.TarFile, entry: object) -> None:
        self.archive, self.entry = archive, entry

    def __call__(self) -> IO[bytes]:
        if isinstance(self.archive, zipfile.ZipFile):
            assert isinstance(self.entry, zipfile.ZipInfo)
            try:
                return self.archive.open(self.entry)
            except OSError as error:  # the zip directory has a negative offset
                raise zipfile.BadZipFile(str(error)) from error
        assert isinstance(self.entry, tarfile.TarInfo)
        reader = self.archive.extractfile(self.entry)
        assert reader is not None  # it is a regular file
        return reader


def _entries(file: Path) -> Iterator[tuple[str, int, _Content]]:
    """Name, size and opener of each regular file in an archive."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    yield info.filename, info.file_size, _Content(archive, info)
    elif tarfile.is_tarfile(file):
        _check_tar(file)
        with tarfile.open(file) as tar:
            for entry in tar:
                if entry.isfile():
                    yield entry.name, entry.size, _Content(tar, entry)
    else:
        raise ValueError(f"{file}: neither a zip nor a tar archive; delete it and try again")


def _check_tar(file: Path) -> None:
    """ReadError if a tar archive is truncated, or its compressed data are damaged."""
    last = b""
    with tarfile.open(file) as tar:
        assert tar.fileobj is not None  # it was opened by name
        try:
            tar.fileobj.seek(0)
            while chunk := tar.fileobj.read(1 << 20):
                last = chunk
        except OSError as error:  # of gzip and bzip2
            raise tarfile.ReadError(str(error)) from error
    if not last or any(last[-tarfile.BLOCKSIZE :]):  # the end is a block of zeros
        raise tarfile.ReadError("truncated")


def _target(file: Path, dest: Path, name: str, member: str) -> Path | None:
    """Target path of an entry; None if it is outside `member`."""
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if unsafe or not path.parts:
        raise ValueError(f"{file}: contains the unsafe path {name!r}; get it from another source")
    if member:
        inside = PurePosixPath(member)
        if inside not in path.parents:
            return None
        path = path.relative_to(inside)
    return dest.joinpath(*path.parts)
