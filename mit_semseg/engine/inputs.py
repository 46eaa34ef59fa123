"""Finding the images of a prediction, and the names of its output files.

An output file has the name of its image, `street.png` for `street.jpg`, and the same relative path
below the result folder. With several kinds in `TEST.save` the kind is appended: `street_color.png`,
`street_index.png`, `street_prob.npy`. If two images differ only in their extension, or an image has
the name of an output file, the extension is added, `street_jpg.png`, so that no file is
overwritten.
"""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mit_semseg.dataset.records import find_depth, image_extensions, is_depth
from mit_semseg.dataset.sources import file_name
from mit_semseg.download import DownloadError, fetch
from mit_semseg.errors import counted, one_line
from mit_semseg.files import PathLike

# Pillow knows these formats but has no decoder for them.
UNDECODABLE = {".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg"}


@dataclass(frozen=True)
class Fetched:
    """Entries of `find_images`, of which some are images from elsewhere.

    Attributes:
        entries: the entries, with files in place of urls and `-`.
        names: the url, or `standard input`, of each of these files.
        errors: why a url could not be downloaded, by its file, which is empty.
    """

    entries: list[PathLike]
    names: dict[Path, str]
    errors: dict[Path, str]


def fetched(imgs: PathLike | Iterable[PathLike], folder: Path) -> Fetched:
    """Store images that are not files in a folder: those of urls, and bytes on standard input.

    Args:
        imgs: entries of `find_images`, `http:`, `https:` and `file:` urls, and `-`.
        folder: an empty folder.

    Raises:
        ValueError: standard input is empty, or given twice.
    """
    found = Fetched([], {}, {})
    for number, entry in enumerate([imgs] if isinstance(imgs, (str, os.PathLike)) else imgs):
        text = os.fspath(entry)
        if text == "-":
            file = folder / str(number) / "stdin"
            file.parent.mkdir()
            file.write_bytes(sys.stdin.buffer.read())
            if not file.stat().st_size:
                raise ValueError("- is an image on standard input, which is empty or read already")
            found.names[file] = "standard input"
        elif text.startswith(("http://", "https://", "file://")):
            file = folder / str(number) / "image"
            try:
                file = file.with_name(file_name(text))
                fetch(text, file)
            except (DownloadError, ValueError) as error:
                reason = error.reason if isinstance(error, DownloadError) else one_line(error)
                found.errors[file] = reason.replace(f"{text}: ", "")
                file.parent.mkdir(exist_ok=True)
                file.touch()
            found.names[file] = text
        else:
            found.entries.append(entry)
            continue
        found.entries.append(file)
    return found


def find_images(
    imgs: PathLike | Iterable[PathLike],
    skip: PathLike = "",
    elsewhere: Collection[PathLike] = (),
) -> tuple[list[Path], Path]:
    """Find images.

    Args:
        imgs: a file (with any extension), a folder (searched recursively), a glob, or a list of
            these.
        skip: a result folder, which is not searched.
        elsewhere: entries whose folder does not count.

    Returns:
        The files without duplicates, and the folder to which the paths of outputs are relative: the
        given folder, the folder of a file, or the deepest common folder of several entries.

    Raises:
        FileNotFoundError: there are no images; the message says what there is instead.
    """
    entries = [imgs] if isinstance(imgs, (str, os.PathLike)) else list(imgs)
    if not entries:
        raise FileNotFoundError("found 0 images: no path was given")
    found: dict[str, Path] = {}
    bases = []
    for entry in entries:
        base, files = _expand(os.fspath(entry), Path(skip).resolve() if skip else None)
        if entry not in elsewhere:
            bases.append(base)
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), common_base(bases or [os.curdir])


def without_depths(files: Sequence[Path]) -> list[Path]:
    """The files that are not depth images.

    Raises:
        FileNotFoundError: none of them has a depth image.
    """
    images = [file for file in files if not is_depth(file)]
    if not any(find_depth(file) for file in images):
        raise FileNotFoundError(
            f"no depth image found for {counted(len(images), 'image')}, as needed with "
            "DATASET.depth: put x_depth.png beside x.jpg, or depth/x.png beside the folder of x.jpg"
        )
    return images


def _expand(entry: str, skip: Path | None) -> tuple[Path, list[Path]]:
    """The base folder of an entry and its images."""
    path = Path(entry).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        base, files = path, _walk(path, skip)
    elif glob.has_magic(str(path)):
        base = Path(*_plain_parts(path))
        files = []
        for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
            files += _walk(match, skip) if match.is_dir() else [match]
    else:
        raise FileNotFoundError(f"{entry}: no such file or folder")
    known = image_extensions() - UNDECODABLE
    images = [file for file in files if file.suffix.lower() in known]
    if not images:
        kinds = Counter(file.suffix.lower() or "extensionless" for file in files)
        saw = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        raise FileNotFoundError(f"{entry}: found 0 images; saw {saw or 'no files'}")
    return base, images


def _walk(folder: Path, skip: Path | None) -> list[Path]:
    """All files below a folder, without hidden files and the folder `skip`."""
    root = folder.resolve()
    files = []
    for directory, names, contents in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        here = Path(directory).resolve()
        if skip is not None and here != root and here == skip:
            names.clear()
            continue
        files += [Path(directory, name) for name in sorted(contents) if not name.startswith(".")]
    return files


def _plain_parts(path: Path) -> list[str]:
    """The leading folders of a glob without wildcards."""
    parts: list[str] = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def common_base(folders: Iterable[PathLike]) -> Path:
    """The deepest folder that contains all of these."""
    absolute = [os.path.abspath(folder) for folder in folders]
    return Path(os.path.commonpath(absolute))


def output_stems(
    files: Sequence[PathLike],
    base: PathLike,
    out: PathLike,
    endings: Sequence[str],
    inputs: Iterable[PathLike] | None = None,
    elsewhere: Collection[PathLike] = (),
) -> list[Path]:
    """Output paths of images, to which `endings` are appended.

    Args:
        files: the images.
        base: folder to which the output paths are relative.
        out: folder of the results.
        endings: for example `[".png"]` or `["_color.png", "_legend.png"]`.
        inputs: files that must not be overwritten; default `files`.
        elsewhere: files of which the name alone is used, not the folder.

    Returns:
        One path per file: `out/relative/stem`, or `out/relative/stem_ext` (and `_2`, `_3`, ...) if
        the stem is not unique or an output would overwrite an input. Names are compared without
        regard to case, as on many file systems.
    """

    def key(path: str) -> str:
        return os.path.realpath(path).casefold()

    relatives = [
        Path(os.path.basename(file))
        if file in elsewhere
        else Path(os.path.relpath(os.path.abspath(file), os.path.abspath(base)))
        for file in files
    ]
    shared = Counter(str(relative.with_suffix("")).casefold() for relative in relatives)
    taken = {key(os.fspath(file)) for file in (files if inputs is None else inputs)}
    stems = []
    for relative in relatives:
        plain = os.path.join(out, relative.with_suffix(""))
        marked = f"{plain}_{relative.suffix.lstrip('.') or 'file'}"
        alone = shared[str(relative.with_suffix("")).casefold()] == 1
        for stem in _candidates(plain, marked, alone):
            results = {key(stem + ending) for ending in endings}
            if not results & taken:
                break
        taken |= results
        stems.append(Path(stem))
    return stems


def _candidates(plain: str, marked: str, alone: bool) -> Iterator[str]:
    if alone:
        yield plain
    yield marked
    number = 2
    while True:
        yield f"{marked}_{number}"
        number += 1


def result_endings(kinds: Sequence[str], index: str = ".png") -> dict[str, str]:
    """Kind -> ending of the file name; includes the kind for a legend or if there are several.

    Args:
        kinds: `TEST.save`.
        index: suffix of class ids.
    """
    several = len([kind for kind in kinds if kind != "legend"]) > 1
    endings = {}
    for kind in kinds:
        mark = f"_{kind}" if several or kind == "legend" else ""
        endings[kind] = mark + {"prob": ".npy", "index": index}.get(kind, ".png")
    return endings
