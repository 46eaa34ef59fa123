"""What mkdocs adds to the pages of this folder: those of the top folder, and the reference.

Pages are written to be read in the repository; links to what is not on the site become plain text.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mit_semseg.arguments import build_parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "build" / "package"
SURFACE = ROOT / "tests" / "api_surface.json"
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:]+)\)")
log = get_plugin_logger("hooks")


def on_startup(command: str, dirty: bool) -> None:
    """Build the package as it is installed, which the reference is read from.

    mkdocstrings looks for the folder when the configuration is complete, so it must exist earlier.
    """
    shutil.rmtree(PACKAGE, ignore_errors=True)
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(PACKAGE)]
    subprocess.run(build, cwd=ROOT, check=True, stderr=subprocess.PIPE)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add pages and images."""
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for image in sorted(ROOT.glob("weights/*/*.png")):
        path = image.relative_to(ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(image)))
    contents: list[Any] = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    contents.append({"Commands": "reference/commands.md"})
    for room, content in reference().items():
        files.append(File.generated(config, f"reference/{room}.md", content=content))
        contents.append({f"mit_semseg.{room}": f"reference/{room}.md"})


def commands() -> str:
    """The help of every command."""
    text = "# Commands\n"
    parsers = [build_parser()]
    while parsers:
        parser = parsers.pop(0)
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=84)
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [each for action in inner for each in action.choices.values()] + parsers
        text += f"\n## {parser.prog}\n\n```text\n{parser.format_help()}```\n"
    return text


def reference() -> dict[str, str]:
    """Each room's page: its public names, which `tests/api_surface.json` lists."""
    pages: dict[str, str] = {}
    for module, names in sorted(json.loads(SURFACE.read_text("utf-8"))["modules"].items()):
        _, _, inside = module.partition(".")
        members = [name for name in names if "." not in name]
        if inside and members:
            room = inside.partition(".")[0]
            block = f"::: {module}\n    options:\n      members: {json.dumps(members)}\n"
            pages[room] = pages.get(room, f"# mit_semseg.{room}\n") + "\n" + block
    return pages


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site."""
    here = {page: source for source, page in TOP.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(here if here else f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path, mark, anchor = target.partition("#")
        if not path:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / path).exists():
            log.warning(f"{here or page.file.src_uri}: {target} does not exist")
        path = TOP.get(path, path.removeprefix("docs/"))
        if path not in files.src_uris:
            return text
        path = posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({path}{mark}{anchor})"

    return LINK.sub(moved, markdown)
