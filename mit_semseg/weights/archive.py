"""Weight files of `torch.save` and safetensors: verified, then read without executing code."""

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

_ZIP = b"PK\x03\x04"  # first bytes of an archive of torch.save
_FOLDER = 0x10  # MS-DOS attribute of a folder
# Suffixes of the files of a checkpoint.
SUFFIXES = (".pth", ".safetensors")
_CHECKSUM = "crc32"  # in the metadata of safetensors files that are written here
# Exceptions for damaged archives. RuntimeError: a damaged flag claims encryption or an unknown
# compression method.
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
# Exceptions of torch.load for damaged or foreign files. Old files have no checksums, so damage can
# surface anywhere.
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
    """Verifies the checksums of an archive of `torch.save`, which `torch.load` does not do.

    Every record is read once. Files that are not zip archives pass: those of old versions of torch
    have no checksums, and `torch.load` refuses others.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the archive is truncated or damaged, or a checksum is wrong.
    """
    head = _head(path)
    # A file of an old version starts with a pickle, in which anything can look like a zip archive.
    if head.startswith(b"\x80"):
        return
    problem = "truncated"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                problem = _bad_record(archive)
        elif head != _ZIP:
            return
    except _BROKEN_ZIP as error:
        problem = f"{error}"
    if problem:
        raise ValueError(
            f"{path} is damaged ({problem}); copy or download it again, or use an earlier "
            "checkpoint"
        )


def _head(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(_ZIP))


def _bad_record(archive: zipfile.ZipFile) -> str:
    """The problem of the first bad record of an archive; "" if there is none."""
    for record in archive.infolist():
        # torch.save does not compress. torch uses one of the sizes, Python the other.
        if record.compress_type == zipfile.ZIP_STORED and record.file_size != record.compress_size:
            return f"record {record.filename} has two sizes"
        # torch would read it as empty, and leave the tensor uninitialised.
        if record.external_attr & _FOLDER:
            return f"record {record.filename} is marked as a folder"
    name = archive.testzip()
    return "" if name is None else f"the checksum of record {name} is wrong"


def load_checked(path: str | Path, map_location: Any = "cpu") -> Any:
    """Loads a file of `torch.save` or safetensors; all weight files are read by this function.

    Checksums are verified (`check_archive`), and `weights_only=True` prevents code execution. A
    file whose name ends in `.safetensors` has no code, and a checksum if it is of
    `safetensors_bytes`.

    Args:
        path: the file.
        map_location: as in `torch.load`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, in another format, or contains more than tensors and plain
            values.
    """
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(path, map_location)
    check_archive(path)
    refused = f"{path} cannot be read as weights (damaged, or contains more than tensors): "
    if _head(path) != _ZIP and tarfile.is_tarfile(path):
        # In these, torch before 2.6 executes code even with weights_only: CVE-2025-32434.
        raise ValueError(f"{refused}a tar archive")
    try:
        with warnings.catch_warnings():  # the error below has the same information
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True)
    except _BROKEN_FILE as error:
        raise ValueError(f"{refused}{_why(error)}") from error


def _load_safetensors(path: str | Path, device: Any) -> dict[str, Tensor]:
    need_safetensors(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get(_CHECKSUM)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({one_line(error, 120)}); copy or download it again"
        ) from error
    if checksum not in (None, _crc32(found)):
        raise ValueError(
            f"{path} is damaged (the checksum of its tensors is wrong); copy or download it again"
        )
    return {name: tensor.to(device) for name, tensor in found.items()}


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file, with a checksum, which the format itself does not have.

    Args:
        tensors: by name; tensors that share memory are stored separately.
    """
    import safetensors.torch as writer

    # Clones, since tensors that share memory are refused.
    own = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()
    }
    content: bytes = writer.save(own, metadata={"format": "pt", _CHECKSUM: _crc32(own)})
    return content


def need_safetensors(path: str | Path) -> None:
    """Check that safetensors is installed.

    Raises:
        ValueError: it is not; the message names the file and the extra.
    """
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{path} needs safetensors: pip install 'mit_semseg[hub]'") from error


def _crc32(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of contiguous CPU tensors in the order of their names."""
    value = 0
    for name in sorted(tensors):
        values = tensors[name].reshape(-1)
        if values.numel():  # an empty tensor cannot be viewed as bytes
            value = zlib.crc32(values.view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _why(error: BaseException) -> str:
    """The reason in torch's message, without its advice to set weights_only=False."""
    text = str(error)
    if "TorchScript" in text:
        return "a TorchScript archive; save the model's state_dict() instead"
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it contains {named[1]}, which is not a tensor; save a state_dict() instead"
    if not text or "weights_only" in text:
        return "not a file of torch.save"
    return one_line(error, 120, named=True)


def read_state_dict(source: str | Path | Mapping[str, Any], file: str = "") -> dict[str, Tensor]:
    """The state dict of a checkpoint, without outer dicts and `module.` prefixes.

    Args:
        source: a file, read with `load_checked`, or a mapping.
        file: name for errors if `source` is a mapping.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, contains more than tensors, or contains none.
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
        raise ValueError(f"{file} contains a {type(state).__name__}, not a state dict")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            name = str(key)
            while name.startswith("module."):
                name = name[len("module.") :]
            tensors[name] = value
    if not tensors:
        raise ValueError(f"{file} contains no tensors{few([str(k) for k in state])}")
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
