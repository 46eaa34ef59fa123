"""The settings that a command line chooses: configuration file, model, data, overrides."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mit_semseg import shipped
from mit_semseg.arguments import CONFIG, DEFAULT_CONFIG
from mit_semseg.compat import json_configs

if TYPE_CHECKING:
    from mit_semseg.config import Options


def settings_of(args: argparse.Namespace) -> Options:
    """The options from the configuration file or model, `KEY value` pairs and `--precision`.

    Also checks the names of the devices.
    """
    opts = [*args.opts]
    if args.precision:
        opts += [f"{args.section}.precision", args.precision]
    data = getattr(args, "data", "")
    if getattr(args, "model", None):
        options = _of_model(args.model, args.section, opts, data)
    elif data:
        raise ValueError("--data needs --model, a trained model")
    elif args.cfg:
        options = read_settings(args.cfg, opts)
    else:
        options = _of_default(args.section, opts)
    if args.section in ("VAL", "TEST") and f"{args.section}.checkpoint" not in opts[::2]:
        options = _with_weights(options, args)
    if args.devices is not None:
        from mit_semseg.utils import parse_devices

        parse_devices(args.devices)
    return options


def _of_model(source: str, section: str, opts: Sequence[str], data: str = "") -> Options:
    """The options of a trained model; prints them as a recipe if there are data."""
    from mit_semseg.engine.from_model import model_options, recipe, training_options
    from mit_semseg.utils import setup_logger

    setup_logger()
    if section != "TRAIN":
        options = model_options(source, section, opts, data)
    elif not data:
        raise ValueError("train --model needs --data, such as photos:masks")
    elif "RANK" in os.environ:
        raise ValueError("under torchrun give --cfg: train --model without torchrun writes one")
    else:
        options = training_options(source, data, opts)
    if data and os.environ.get("RANK", "0") == "0":
        unused = ("TRAIN", "TEST") if section == "VAL" else ()
        print(f"# {section} of {source} on {data}\n{recipe(options, unused)}")
    return options


def _of_default(section: str, opts: Sequence[str]) -> Options:
    """The options of the shipped model, or as published of a default model if it is there."""
    default = read_settings(DEFAULT_CONFIG, opts)
    if "DIR" in opts[::2] or os.path.isdir(default.DIR):
        return default
    if os.environ.get("RANK", "0") == "0":
        print(f"Using the shipped model {shipped.MODEL}: {shipped.ABOUT} (others: --model, --cfg)")
    return _of_model(shipped.MODEL, section, opts)


def _with_weights(options: Options, args: argparse.Namespace) -> Options:
    """With `--cfg FOLDER` or `FOLDER/config.yaml`: a checkpoint that is there."""
    if not args.cfg or os.path.basename(args.cfg) != CONFIG and not os.path.isdir(args.cfg):
        return options
    from mit_semseg.engine.pretrained import with_weights

    return with_weights(options, args.section)


def read_settings(config: str, opts: Sequence[str] = ()) -> Options:
    """Read and check a configuration, before torch is imported, which takes seconds."""
    if config.endswith(".json"):
        raise ValueError(json_configs.advice(config))
    from mit_semseg.config import load_options

    return load_options(config, opts)
