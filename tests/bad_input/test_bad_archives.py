"""Archives of data sets that are damaged, or made to write where they should not."""

import io
import os
import re
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mit_semseg.dataset import downloads
from mit_semseg.dataset.downloads import unpack

CONTENT = bytes(range(256)) * 40


def write_zip(path, *names, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(name, CONTENT)
    return path


def tar_entry(name, kind=tarfile.REGTYPE, link=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    entry.size = len(CONTENT) if kind == tarfile.REGTYPE else 0
    return entry


def write_tar(path, *entries, mode="w"):
    with tarfile.open(path, mode) as archive:
        for entry in entries:
            archive.addfile(entry, io.BytesIO(CONTENT) if entry.size else None)
    return path


OUTSIDE = ["../evil", "a/../../evil", "/evil", "//evil", "..", "a/..", "..\\evil", "C:\\evil", "."]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_nothing_is_written_outside(tmp_path, untouched, kind, name):
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        write_zip(path, "good", name)
    else:
        write_tar(path, tar_entry("good"), tar_entry(name))
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    refused = pytest.raises(ValueError, match="contains the unsafe path")
    with untouched(but=out), refused as caught:
        unpack(path, out, progress=False)
    assert str(path) in str(caught.value) and not Path("/evil").exists()
    assert {file.name for file in out.rglob("*")} <= {"good"}


def test_links_and_devices_are_left_out(tmp_path, untouched):
    """Not even by way of a link that comes first does a file get outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    path = write_tar(
        tmp_path / "x.tar",
        tar_entry("door", tarfile.SYMTYPE, str(outside)),
        tar_entry("door/evil"),
        tar_entry("hard", tarfile.LNKTYPE, "../outside/mine"),
        tar_entry("up", tarfile.SYMTYPE, "../outside/mine"),
        tar_entry("pipe", tarfile.FIFOTYPE),
        tar_entry("disk", tarfile.BLKTYPE),
        tar_entry("tty", tarfile.CHRTYPE),
        tar_entry("good"),
    )
    out = tmp_path / "out"
    with untouched(but=out):
        assert unpack(path, out, progress=False) == 2
    files = [p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()]
    assert sorted(files) == ["door/evil", "good"]
    assert not any(p.is_symlink() for p in out.rglob("*"))
    link = zipfile.ZipInfo("door")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, str(outside))
        archive.writestr("door/evil2", CONTENT)
    with untouched(but=out):
        assert unpack(tmp_path / "x.zip", out, progress=False) == 1
    assert (out / "door" / "evil2").is_file() and os.listdir(outside) == ["mine"]


def test_more_than_the_disk_holds(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", "a.bin")
    free = SimpleNamespace(free=100)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match=r"x\.zip: 'a\.bin' has 10240 bytes, but .* has 100"):
        unpack(path, tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_sizes_in_archives(tmp_path):
    """1 TB in the header, 10 kB in the file."""
    entry = tar_entry("huge")
    entry.size = 1 << 40
    huge = tmp_path / "x.tar"
    huge.write_bytes(entry.tobuf() + CONTENT)
    with pytest.raises((ValueError, OSError), match=r"x\.tar"):
        unpack(huge, tmp_path / "out", progress=False)
    path = write_zip(tmp_path / "x.zip", "a.bin", method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.start_dir + 20  # both sizes in the directory
    content[at : at + 8] = (1 << 30).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=r"x\.zip"):
        unpack(path, tmp_path / "out", progress=False)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_an_encrypted_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", "a.bin")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.start_dir + 8] |= 1  # the flag of encryption
    content[6] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.zip: a damaged archive .*password"):
        unpack(path, tmp_path / "out", progress=False)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_damage_anywhere(tmp_path, kind):
    """Cut or flipped: one line that names the archive, or the very same files."""
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        write_zip(path, "a/b.bin", "c.bin")
    else:
        mode = f"w:{kind.partition('.')[2]}" if "." in kind else "w"
        write_tar(path, tar_entry("a/b.bin"), tar_entry("c.bin"), mode=mode)
    content = path.read_bytes()
    rng = np.random.default_rng(7)
    refused = 0
    for k in range(60):
        changed = bytearray(content)
        position = int(rng.integers(len(content)))
        if k % 3:
            changed[position] ^= 1 << int(rng.integers(8))
        else:
            del changed[position:]
        path.write_bytes(changed)
        out = tmp_path / f"out{k}"
        try:
            unpack(path, out, progress=False)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and re.search(r"x\.|out\d", str(error)), (k, position)
            refused += 1
            assert not list(out.rglob("*.part"))
            continue
        if kind != "tar":  # which has checksums for names alone
            found = {p.read_bytes() for p in out.rglob("*") if p.is_file()}
            assert found == {CONTENT}, (k, position)
    assert refused > (10 if kind == "tar" else 30)
