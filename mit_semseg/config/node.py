"""The configuration tree: yacs nodes whose merging explains every mistake."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from mit_semseg.arguments import PRECISIONS
from mit_semseg.errors import one_line
from mit_semseg.registry import closest

RECIPES = Path("config")  # below the working folder, in a checkout

# Written into the tree by the published training script at run time; old dumps may carry them.
OBSOLETE = {
    "TRAIN.max_iters",
    "TRAIN.running_lr_encoder",
    "TRAIN.running_lr_decoder",
    "TRAIN.log_fmt",
}

# What keys were called in earlier dumps of this version.
RENAMED = {"TRAIN.timeout": "TRAIN.stall_seconds", "TRAIN.keep_checkpoints": "TRAIN.keep"}

# Keys that take a second form beside the type of their default.
ALTERNATIVES: dict[str, tuple[type, ...]] = {
    "TRAIN.epoch_iters": (str,),
    "TRAIN.class_weights": (list,),
    "DATASET.list_train": (list,),
    "DATASET.list_val": (list,),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "DATASET.on_error": ("stop", "skip"),
    "DATASET.batching": ("aspect", "crop"),
    "TRAIN.on_nan": ("stop", "skip"),
    "DATASET.color_order": ("RGB", "BGR"),
    "TRAIN.parallel": ("auto", "processes", "replicas"),
    "TRAIN.optim": ("SGD", "Adam", "AdamW"),
    "TRAIN.precision": PRECISIONS,
    "VAL.precision": PRECISIONS,
    "TEST.precision": PRECISIONS,
}
SAVE_KINDS = ("color", "index", "overlay", "prob", "side", "legend")

POSITIVE = (
    "DATASET.num_class",
    "DATASET.imgMaxSize",
    "DATASET.padding_constant",
    "DATASET.segm_downsampling_rate",
    "MODEL.fc_dim",
    "TRAIN.batch_size_per_gpu",
    "TRAIN.num_epoch",
    "TRAIN.accumulate",
    "TRAIN.disp_iter",
    "TRAIN.stall_seconds",
    "VAL.batch_size",
    "VAL.timeout",
    "TEST.batch_size",
    "TEST.timeout",
)

NOT_NEGATIVE = (
    *("TRAIN.start_epoch", "TRAIN.lr_encoder", "TRAIN.lr_decoder", "TRAIN.lr_pow"),
    *("TRAIN.warmup_iters", "TRAIN.weight_decay", "TRAIN.deep_sup_scale", "TRAIN.ema"),
    *("TRAIN.clip_grad", "TRAIN.workers", "TRAIN.eval_epochs", "TRAIN.keep"),
    "TRAIN.checkpoint_minutes",
    "TRAIN.seed",
)


class Config(CN):
    """A yacs tree with the published calls (`merge_from_file`, `merge_from_list`, `clone`).

    Values are checked and coerced when they are merged: an unknown key, a wrong type or a value
    outside its choices raises a ValueError that names file, key, value and fix.
    """

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merge a yaml file; ValueError or FileNotFoundError with one clear line otherwise."""
        path = Path(cfg_filename)
        if not path.is_file():
            raise FileNotFoundError(_no_file(path))
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506, a safe one
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no valid yaml: {one_line(error)}") from error
        if tree is None:
            return
        if not isinstance(tree, Mapping):
            raise ValueError(f"{path} must hold `KEY: value` lines, not {type(tree).__name__}")
        self.merge_tree(tree, source=str(path))

    def merge_from_list(self, cfg_list: list[str]) -> None:
        """Merge `[KEY, value, KEY, value, ...]`, keys with dots, as on the command line."""
        for word in cfg_list[::2]:
            if str(word).startswith("--"):
                raise ValueError(f"{word} comes after KEY value pairs; put options before them")
        if len(cfg_list) % 2:
            raise ValueError(f"overrides come as KEY value pairs; {cfg_list[-1]!r} stands alone")
        for key, value in zip(cfg_list[::2], cfg_list[1::2]):
            self._set(str(key), value, source="command line")

    def merge_tree(self, tree: Mapping[str, Any], *, source: str, prefix: str = "") -> None:
        """Merge nested mappings; `source` is named in errors."""
        for key, value in tree.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, Mapping):
                default = self._node(dotted)
                if default is not None and not isinstance(default, CN):
                    kind = _kind(type(default))
                    raise ValueError(f"{source}: {dotted} is {dict(value)!r:.80}; it takes {kind}")
                if default is None:
                    raise ValueError(_unknown(self, dotted, source))
                self.merge_tree(value, source=source, prefix=f"{dotted}.")
            else:
                self._set(dotted, value, source=source)

    def _node(self, dotted: str) -> Any:
        node: Any = self
        for part in dotted.split("."):
            if not isinstance(node, CN) or part not in node:
                return None
            node = node[part]
        return node

    def _set(self, dotted: str, value: Any, *, source: str) -> None:
        if dotted in OBSOLETE:
            return
        dotted = RENAMED.get(dotted, dotted)
        default = self._node(dotted)
        if default is None:
            raise ValueError(_unknown(self, dotted, source))
        if isinstance(default, CN):
            raise ValueError(f"{source}: {dotted} is a section, not a key")
        *parents, leaf = dotted.split(".")
        node = self._node(".".join(parents)) if parents else self
        node[leaf] = coerce(dotted, default, value, source)


def _no_file(path: Path) -> str:
    """What to say of a configuration file that is none."""
    if path.is_dir():
        inside = path / "config.yaml"  # as in a checkpoint folder
        if inside.is_file():
            return f"{path} is a folder, not a configuration file; give {inside}"
        return f"{path} is a folder, not a configuration file{_yaml_files(path)}"
    if path.exists():
        return f"{path} is a pipe or a device, not a configuration file"
    beside = [file for place in {path.parent, RECIPES} for file in place.glob("*.yaml")]
    stems = {file.stem: file for file in sorted(beside)}
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), stems, n=1, cutoff=0.7)
    if near:
        return f"configuration file {path} does not exist; did you mean {stems[near[0]]}?"
    return f"configuration file {path} does not exist{_yaml_files(path.parent)}"


def _yaml_files(folder: Path) -> str:
    """What configuration files are in a folder, and else where there are some."""
    names = sorted(file.name for file in folder.glob("*.yaml"))
    if 0 < len(names) <= 8:
        return f"; {folder} holds {', '.join(names)}"
    if names:
        return f"; {folder} holds {len(names)} configuration files, such as {names[0]}"
    return f"; recipes are in the folder {RECIPES} of the repository"


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which the last would win in silence."""

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


def keys(node: CN, prefix: str = "") -> list[str]:
    """All dotted keys of a tree, in order."""
    found: list[str] = []
    for name, value in node.items():
        if isinstance(value, CN):
            found += keys(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def _unknown(node: CN, dotted: str, source: str) -> str:
    hint = closest(dotted, keys(node))
    return f"{source}: unknown key {dotted}{hint}"


def _literal(value: Any) -> Any:
    """Read "(300, 375)", "0.02" or "True" as Python writes them; anything else stays a string."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return {"true": True, "false": False}.get(value.lower(), value)


def coerce(key: str, default: Any, value: Any, source: str) -> Any:
    """`value` in the type of `default`; ValueError naming source, key and value otherwise."""
    text, value = value, _literal(value)
    if isinstance(value, tuple):
        value = list(value)
    wanted: type = str if key in ALTERNATIVES and not _is_number(default) else type(default)
    if key == "TRAIN.epoch_iters":
        if value == "auto" or (_is_number(value) and value >= 1):
            return value if value == "auto" else int(value)
        raise ValueError(f"{source}: {key} is {value!r}; give a number of steps or auto")
    if key == "TRAIN.channels_last":
        if value == "auto" or isinstance(value, bool):
            return value
        raise ValueError(f"{source}: {key} is {value!r}; give True, False or auto")
    if key == "TRAIN.shape_bucket":
        if value in ("auto", "off") or (_is_number(value) and value >= 1 and value == int(value)):
            return value if isinstance(value, str) else int(value)
        raise ValueError(f"{source}: {key} is {value!r}; give auto, off or pixels, such as 32")
    if key in ("VAL.tile", "TEST.tile"):
        if value in ("auto", "off") or (_is_number(value) and value >= 64):
            return value if isinstance(value, str) else int(value)
        raise ValueError(f"{source}: {key} is {value!r}; give auto, off or a side of 64 or more")
    if key == "DATASET.depth_scale":
        if value in ("auto", "sunrgbd") or (_is_number(value) and 0 < value <= sys.float_info.max):
            return value if isinstance(value, str) else float(value)
        raise ValueError(
            f"{source}: {key} is {value!r}; give stored units in a metre (1000), sunrgbd or auto"
        )
    if isinstance(value, list) and list in ALTERNATIVES.get(key, ()):
        return value
    if wanted is str and isinstance(text, str) and not isinstance(value, str):
        value = text  # a text that reads as something else: "None", or a folder called 2024_10
    coerced = _as_type(wanted, value)
    if coerced is None:
        raise ValueError(f"{source}: {key} is {value!r}; it takes {_kind(wanted)}")
    _check_value(key, coerced, source)
    return coerced


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_type(wanted: type, value: Any) -> Any:
    if wanted is bool:
        return value if isinstance(value, bool) else None
    if wanted in (int, float):
        if not _is_number(value) or not abs(value) <= sys.float_info.max:  # NaN fails, too
            return None
        return wanted(value) if wanted is float or value == int(value) else None
    if wanted is list:
        if isinstance(value, str):
            # As typed in a shell: [color, index], (color) or color,index.
            words = value.strip("[]() ").split(",")
            return [word.strip() for word in words if word.strip()]
        if isinstance(value, bool):
            return None
        return value if isinstance(value, list) else [] if value is None else [value]
    if value is None:
        return ""
    return str(value) if not isinstance(value, (list, dict)) else None


def _kind(wanted: type) -> str:
    return {bool: "True or False", int: "a whole number", float: "a number", list: "a list"}.get(
        wanted, "a text"
    )


def _check_value(key: str, value: Any, source: str) -> None:
    if key in CHOICES and value not in CHOICES[key]:
        hint = closest(value, list(CHOICES[key]))
        raise ValueError(
            f"{source}: {key} is {value!r}{hint}; it is one of {', '.join(CHOICES[key])}"
        )
    if key in POSITIVE and value < 1:
        raise ValueError(f"{source}: {key} is {value}; it must be at least 1")
    if key in NOT_NEGATIVE and value < 0:
        raise ValueError(f"{source}: {key} is {value}; it must not be negative")
    if key == "DATASET.depth_std" and value <= 0:
        raise ValueError(f"{source}: {key} is {value}; metres above 0, such as 1.235")
    if key == "MODEL.in_channels" and value not in (3, 4):
        raise ValueError(f"{source}: {key} is {value}; it is 3, or 4 with DATASET.depth")
    if key == "TRAIN.label_smoothing" and not 0 <= value <= 1:
        raise ValueError(f"{source}: {key} is {value}; it is a share within [0, 1]")
    if key == "TRAIN.ema" and value >= 1:
        raise ValueError(f"{source}: {key} is {value}; a decay lies below 1, such as 0.999")
    if key.endswith("imgSizes") and not all(_is_number(v) and v >= 1 for v in value):
        raise ValueError(
            f"{source}: {key} is {value}; give short sides in pixels, such as (300, 450)"
        )
    if key == "TEST.save":
        for kind in value:
            if kind not in SAVE_KINDS:
                raise ValueError(
                    f"{source}: {key} has {kind!r}; it takes any of {', '.join(SAVE_KINDS)}"
                )
    if key in ("VAL.window", "TEST.window") and not (
        len(value) in (0, 2) and all(_is_number(v) and v >= 64 and v == int(v) for v in value)
    ):
        raise ValueError(
            f"{source}: {key} is {value}; give (height, width) of 64 pixels or more, or () for none"
        )
    if key in ("VAL.stride", "TEST.stride") and not 0 < value <= 1:
        raise ValueError(f"{source}: {key} is {value}; a share of the window, such as 0.667")
    if key == "TRAIN.aux_weights" and not all(
        _is_number(v) and 0 <= v <= sys.float_info.max for v in value
    ):
        raise ValueError(
            f"{source}: {key} is {value}; give a weight of 0 or more for each auxiliary head, or "
            "() for those of the decoder"
        )
    if key == "DATASET.random_scale" and not (
        len(value) == 2 and all(map(_is_number, value)) and 0 < value[0] <= value[1]
    ):
        raise ValueError(
            f"{source}: {key} is {value}; give the least and the greatest factor, as (0.5, 2.0)"
        )
    if key == "DATASET.random_rotation" and not 0 <= value <= 180:
        raise ValueError(f"{source}: {key} is {value}; degrees within [0, 180]")
    if key == "DATASET.random_blur" and not 0 <= value <= 1:
        raise ValueError(f"{source}: {key} is {value}; a probability within [0, 1]")
    if key == "DATASET.crop_size" and len(value) not in (0, 2):
        raise ValueError(
            f"{source}: {key} is {value}; give (height, width), or () for whole images"
        )
    if key == "DATASET.ignore_label" and not all(isinstance(v, int) for v in value):
        raise ValueError(
            f"{source}: {key} is {value}; give one stored mask value, or several as (0, 255)"
        )
    if key in ("DATASET.mean", "DATASET.std") and not (
        len(value) == 3 and all(map(_is_number, value))
    ):
        raise ValueError(
            f"{source}: {key} is {value}; give one number per colour channel, three in all"
        )
