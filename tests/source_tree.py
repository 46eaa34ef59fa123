"""Which files make up the source tree: what git tracks, or would."""

import fnmatch
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def source_files():
    """Paths relative to ROOT, symlinks among them not followed, sorted.

    In a git checkout those that are tracked or neither tracked nor ignored; elsewhere, such as in
    an unpacked archive, all that `.gitignore` does not name.
    """
    if (ROOT / ".git").exists():
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
        files = {Path(name) for name in listed.split("\0") if name}
    else:
        files = set(_walk(ROOT, (ROOT / ".gitignore").read_text().split()))
    # A file deleted but not yet committed is still listed.
    return sorted(file for file in files if os.path.lexists(ROOT / file))


def git(*arguments):
    """What git answers in ROOT."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _walk(folder, ignored):
    found = []
    for entry in sorted(folder.iterdir()):
        path = entry.relative_to(ROOT)
        if any(_matches(path, pattern) for pattern in ignored):
            continue
        if entry.is_dir() and not entry.is_symlink():
            found += _walk(entry, ignored)
        else:
            found.append(path)
    return found


def _matches(path, pattern):
    # `/name` is a path from ROOT, `name` any entry called so; a trailing `/` marks folders.
    name = str(path) if pattern.startswith("/") else path.name
    return fnmatch.fnmatch(name, pattern.strip("/"))
