"""Settings as text, for `mit-semseg config` and the tables of docs/settings.md."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from mit_semseg.config.node import Config
from mit_semseg.config.options import SETTINGS, Options
from mit_semseg.config.schema import Setting

_WIDTH = 96


def listing(tree: Config, only: str = "") -> str:
    """Every key with its value, the origin of the value, default, meaning and possible values.

    Args:
        tree: from `load_config`.
        only: only keys whose name contains this text, ignoring case.

    Raises:
        ValueError: there is no such key, or an invalid combination of values.
    """
    options = Options.read(tree)
    found = [setting for name, setting in SETTINGS.items() if only.lower() in name.lower()]
    if not found:
        raise ValueError(f"--only {only}: no key contains this text; see docs/settings.md")
    return "\n".join(_entry(s, options[s.name], _origin(s, options, tree)) for s in found)


def _origin(setting: Setting, options: Options, tree: Config) -> str:
    section, _, name = setting.name.rpartition(".")
    given = (tree[section] if section else tree)[name]
    if setting.read(given) != options[setting.name]:
        return "from MODEL.arch_encoder"  # the normalisation of a timm encoder
    return tree.origins.get(setting.name, "")


def _entry(setting: Setting, value: Any, origin: str) -> str:
    where = f"{origin}; default {shown(setting.default)}" if origin else "default"
    meaning = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", setting.doc).replace("`", "")
    text = f"{meaning} [{setting.takes().replace('`', '')}]"
    lines = textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([f"{setting.name} = {shown(value)}  ({where})", *lines])


def table(section: str) -> str:
    """The keys of a section as a Markdown table; `""` for the keys outside of sections."""
    rows = [("key", "default", "values", "meaning"), ("---",) * 4]
    for name, setting in SETTINGS.items():
        if name.rpartition(".")[0] == section:
            own = name.rpartition(".")[2]
            cells = f"`{own}`", f"`{shown(setting.default)}`", setting.takes(), setting.doc
            rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(value: Any) -> str:
    """A value as written in a file."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value) if value != "" else '""'
