"""Weight files of `torch.save` and safetensors: verified, then read without running code."""

from __future__ import annotations

import pickle
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mit_semseg.errors import one_line

_ZIP = b"PK\x03\x04"  # how an archive of torch.save begins
_FOLDER = 0x10  # the attribute of a record, as of MS-DOS
# What Python raises on broken archives, by where they are broken. RuntimeError: a flag that was
# flipped claims encryption, or a method of compression nobody knows.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    OverflowError,
)
# What torch.load raises on damaged or foreign files; old ones, without checksums, take it anywhere.
_BROKEN_FILE = (
    *_BROKEN_ZIP,
    pickle.UnpicklingError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
)


def check_archive(path: str | Path) -> None:
    """Refuses a damaged archive of `torch.save`, whose checksums `torch.load` does not look at.

    Every record is read once, at the speed of the disk or of CRC-32. Files that are no zip archive
    pass: those of old versions of torch have no checksums, and `torch.load` judges the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the archive is cut short, its structure is broken, or a record's checksum is
            wrong; the file is named.
    """
    head = _head(path)
    # An old file begins with a pickle, and may hold anything that looks like the end of an archive.
    if head.startswith(b"\x80"):
        return
    wrong = "cut short: its end is missing"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                wrong = _wrong_record(archive)
        elif head != _ZIP:
            return
    except _BROKEN_ZIP as error:
        wrong = f"{error}"
    if wrong:
        raise ValueError(
            f"{path} is damaged ({wrong}); copy or download it again, or use an earlier checkpoint"
        )


def _head(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(_ZIP))


def _wrong_record(archive: zipfile.ZipFile) -> str:
    """What is wrong with the first bad record of an archive; "" when none is."""
    for record in archive.infolist():
        # Nobody compresses weights, and torch reads by the one size, Python by the other.
        if record.compress_type == zipfile.ZIP_STORED and record.file_size != record.compress_size:
            return f"record {record.filename} has two sizes"
        # Which torch takes for empty, so that a tensor is whatever the memory held.
        if record.external_attr & _FOLDER:
            return f"record {record.filename} is marked as a folder"
    name = archive.testzip()
    return "" if name is None else f"the checksum of record {name} is wrong"


def load_checked(path: str | Path, map_location: Any = "cpu") -> Any:
    """What `torch.save` or safetensors wrote: the only way files of weights are read here.

    Checksums are compared (`check_archive`), and `weights_only=True` lets the file run no code. A
    file whose name ends in `.safetensors` has neither checksums nor code.

    Args:
        path: the file.
        map_location: where its tensors go, as of `torch.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind, or holds more than tensors and plain values.
    """
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path, map_location)
    check_archive(path)
    refused = f"{path} cannot be read as weights (damaged, or holding more than tensors): "
    if _head(path) != _ZIP and tarfile.is_tarfile(path):
        # torch before 2.6 ran the code of these, whatever it was told: CVE-2025-32434.
        raise ValueError(f"{refused}a tar archive")
    try:
        with warnings.catch_warnings():  # the error says what torch warns of first
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True)
    except _BROKEN_FILE as error:
        raise ValueError(f"{refused}{_why(error)}") from error


def _load_safetensors(path: str | Path, device: Any) -> dict[str, Tensor]:
    try:
        import safetensors.torch as reader
        from safetensors import SafetensorError
    except ImportError as error:
        raise ValueError(f"{path} needs safetensors: pip install 'mit_semseg[timm]'") from error
    try:
        found: dict[str, Tensor] = reader.load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({one_line(error, 120)})") from error
    return found


def _why(error: BaseException) -> str:
    """The reason in torch's message, without its advice to run the code of the file."""
    text = str(error)
    if "TorchScript" in text:
        return "a TorchScript archive; save the model's state_dict() instead"
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {named[1]}, which is no tensor; save a state_dict() instead"
    if not text or "weights_only" in text:
        return "no file of torch.save"
    return one_line(error, 120, named=True)


def read_state_dict(source: str | Path | Mapping[str, Any], file: str = "") -> dict[str, Tensor]:
    """The named tensors of a checkpoint, without wrappers and `module.` prefixes.

    Args:
        source: a file, read with `weights_only=True` so that it can run no code, or a mapping.
        file: name to give in errors when `source` is a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds more than tensors, or holds none.
    """
    if isinstance(source, Mapping):
        state: Any = source
        file = file or "the given tensors"
    else:
        path = Path(source)
        file = str(path)
        if not path.is_file():
            raise FileNotFoundError(not_found(path))
        state = load_checked(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} holds a {type(state).__name__}, not named tensors")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            name = str(key)
            while name.startswith("module."):
                name = name[len("module.") :]
            tensors[name] = value
    if not tensors:
        raise ValueError(f"{file} holds no tensors{few([str(k) for k in state])}")
    return tensors


def not_found(path: Path) -> str:
    what = "is a folder, not a weight file" if path.is_dir() else "does not exist"
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    files = sorted(
        f.name
        for f in folder.iterdir()
        if f.name.endswith((".pth", ".pt", ".pth.tar", ".bin", ".safetensors"))
    )
    shown = ", ".join(files[:20]) + (", ..." if len(files) > 20 else "") if files else "none"
    return f"weight file {path} {what}; weight files in {folder.resolve()}: {shown}"


def few(names: Sequence[str], count: int = 5) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:count])}{', ...' if len(names) > count else ''})"
