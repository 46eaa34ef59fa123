"""The configuration as a yacs tree, generated from the fields of the sections."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from mit_semseg.config.options import SECTIONS, SETTINGS, Options
from mit_semseg.config.schema import Setting, warn_renamed
from mit_semseg.errors import one_line
from mit_semseg.registry import closest
from mit_semseg.shipped import HOME

RECIPES = Path("config")  # in a clone, and as shipped

# Written to the tree at run time by the published training script; old files may contain them.
OBSOLETE = {
    "TRAIN.max_iters",
    "TRAIN.running_lr_encoder",
    "TRAIN.running_lr_decoder",
    "TRAIN.log_fmt",
}
# Earlier names of keys -> setting.
_RENAMED = {
    f"{dotted.rpartition('.')[0]}.{old}": setting
    for dotted, setting in SETTINGS.items()
    for old in setting.old
}


class Config(CN):
    """A yacs tree (`merge_from_file`, `merge_from_list`, `clone`).

    Values are checked and converted when they are merged: an unknown key, a wrong type or a value
    out of range raises a ValueError with file, key, value and fix.
    """

    @property
    def origins(self) -> dict[str, str]:
        """Origin of the merged values by key: a file, or `command line`."""
        origins: dict[str, str] = self.__dict__.setdefault("__origins__", {})
        return origins

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merge a YAML file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: not valid YAML, or a wrong key or value.
        """
        path = Path(cfg_filename)
        if not path.is_file():
            raise FileNotFoundError(_no_file(path))
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506, a safe one
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from error
        if tree is None:
            return
        if not isinstance(tree, Mapping):
            raise ValueError(f"{path} must contain `KEY: value` lines, not {type(tree).__name__}")
        self._merge(_leaves(tree), str(path))

    def merge_from_list(self, cfg_list: list[str]) -> None:
        """Merge `[KEY, value, KEY, value, ...]` with dotted keys, as on the command line."""
        for word in cfg_list[::2]:
            if str(word).startswith("--"):
                raise ValueError(f"{word} is after KEY value pairs; put options before them")
        if len(cfg_list) % 2:
            raise ValueError(f"overrides are KEY value pairs; {cfg_list[-1]!r} has no value")
        pairs = ((str(key), value) for key, value in zip(cfg_list[::2], cfg_list[1::2]))
        self._merge(pairs, "command line")

    def _merge(self, pairs: Iterator[tuple[str, Any]], source: str) -> None:
        renamed: dict[str, str] = {}
        for dotted, value in pairs:
            if dotted in OBSOLETE:
                continue
            old = dotted.rpartition(".")[2]
            if setting := _RENAMED.get(dotted):
                given, value = value, setting.read_old(old, value, source)
                converted = setting.old[old] is not None
                name = f"{dotted} {given}" if converted else dotted
                renamed[name] = f"{setting.name} {value}" if converted else setting.name
            else:
                setting = self._setting(dotted, source)
                value = setting.read(value, source)
            section, _, name = setting.name.rpartition(".")
            (self[section] if section else self)[name] = _plain(value)
            self.origins[setting.name] = source
        warn_renamed(renamed, source)

    def _setting(self, dotted: str, source: str) -> Setting:
        if isinstance(self.get(dotted), CN):
            raise ValueError(f"{source}: {dotted} is a section, not a key")
        if dotted not in SETTINGS:
            raise ValueError(f"{source}: unknown key {dotted}{closest(dotted, list(SETTINGS))}")
        return SETTINGS[dotted]


def tree_of(options: Options) -> Config:
    """The yacs tree of options, with lists for tuples."""
    tree = Config()
    for dotted in SETTINGS:
        section, _, name = dotted.rpartition(".")
        node = tree.setdefault(section, Config()) if section else tree
        node[name] = _plain(options[dotted])
    return tree


def keys(node: CN, prefix: str = "") -> list[str]:
    """All dotted keys of a tree, in order."""
    return [dotted for dotted, _ in _leaves(node, prefix)]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if value is None and dotted in SECTIONS:
            continue  # a section whose keys are all commented out
        if isinstance(value, Mapping) and dotted not in SETTINGS and (value or name in SECTIONS):
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value


def _plain(value: Any) -> Any:
    """A value with lists for tuples."""
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _no_file(path: Path) -> str:
    """The error for a configuration file that does not exist."""
    if path.is_dir():
        return f"{path} is a folder, not a configuration file{_yaml_files(path)}"
    if path.exists():
        return f"{path} is a pipe or a device, not a configuration file"
    stems = {file.stem: RECIPES / file.name for file in sorted((HOME / RECIPES).glob("*.yaml"))}
    stems |= {file.stem: file for file in sorted(path.parent.glob("*.yaml"))}
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), stems, n=1, cutoff=0.7)
    if near:
        return f"configuration file {path} does not exist; did you mean {stems[near[0]]}?"
    return f"configuration file {path} does not exist{_yaml_files(path.parent)}"


def _yaml_files(folder: Path) -> str:
    """The configuration files of a folder, for the error."""
    names = sorted(file.name for file in folder.glob("*.yaml"))
    if 0 < len(names) <= 8:
        return f"; {folder} has {', '.join(names)}"
    if names:
        return f"; {folder} has {len(names)} configuration files, such as {names[0]}"
    return f"; recipes have names such as {RECIPES}/demo.yaml"


class _Loader(yaml.SafeLoader):
    """Raises for a duplicate key, of which PyYAML silently uses the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
