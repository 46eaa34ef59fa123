"""Settings inferred from a trained model and data, for `--model` and `--data`.

Data are `images_dir:masks_dir`, `images_dir:FILE.json` (COCO), a list FILE.odgt, or a public data
set: its name, or `NAME:FOLDER`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mit_semseg.config import DataOptions, EvalOptions, Options, PredictOptions, TrainOptions
from mit_semseg.config.node import tree_of
from mit_semseg.config.options import SETTINGS
from mit_semseg.dataset.base import FORMATS, DataFormat
from mit_semseg.dataset.checking import check
from mit_semseg.dataset.listing import make_odgt
from mit_semseg.engine.checkpoint import PRETRAINED, resolve_checkpoint
from mit_semseg.engine.pretrained import locate
from mit_semseg.export import format_of

RECIPE = "recipe.yaml"
# Stored values that customarily mean "ignored" in masks.
IGNORED = 255


def model_options(
    model: str, section: str, overrides: Sequence[str] = (), data: str = ""
) -> Options:
    """Settings for evaluating a trained model or predicting with it.

    Args:
        model: as for `load_pretrained`, with its errors.
        section: `VAL` or `TEST`, whose `checkpoint` is that of the model.
        overrides: `[KEY, value, ...]`.
        data: what to evaluate on; "": what the model was trained on.

    Raises:
        ValueError: `data` names no data.
    """
    options, checkpoint = locate(model)
    part = replace(getattr(options, section), checkpoint=checkpoint)
    options = replace(options, **{section: part})
    if data:
        options = replace(options, DATASET=on_data(options.DATASET, data))
    return _overridden(options, overrides)


def training_options(model: str, data: str, overrides: Sequence[str] = ()) -> Options:
    """Settings for fine-tuning a trained model on other data.

    For two folders, lists with a tenth of the images for validation are written to `DIR/lists`, and
    the classes follow from the values in the masks. `DIR/recipe.yaml` has the settings.

    Args:
        model: as for `load_pretrained`, with its errors.
        data: what to train on.
        overrides: `[KEY, value, ...]`.

    Raises:
        FileNotFoundError, ValueError: there are no such data, or they cannot be used.
    """
    options, checkpoint = locate(model)
    if format_of(checkpoint) is not None:
        raise ValueError(f"{model} is for prediction only: train the model it was exported from")
    given = dict(zip(overrides[::2], overrides[1::2]))
    folder = given.get("DIR") or f"ckpt/{_name(model)}-{_name(data.partition(':')[0])}"
    network = options.MODEL
    if checkpoint != PRETRAINED:
        where, name = resolve_checkpoint(options.DIR, checkpoint)
        encoder, decoder = map(str, where.files(name))
        network = replace(network, weights_encoder=encoder, weights_decoder=decoder)
    best: dict[str, Any] = {"checkpoint": "best.pth", "imgSizes": options.TEST.imgSizes}
    best["scales"] = options.TEST.scales
    found = Options(
        DIR=folder,
        DATASET=_training_data(options.DATASET, data, Path(folder) / "lists"),
        MODEL=network,
        TRAIN=TrainOptions(
            optim="AdamW",
            lr_encoder=0.0001,
            lr_decoder=0.001,
            weight_decay=0.01,
            warmup_iters=20,
            num_epoch=20,
            epoch_iters="auto",
            deep_sup_scale=options.TRAIN.deep_sup_scale,
            precision="auto",
            eval_epochs=1,
            keep=1,
        ),
        VAL=EvalOptions(**best),
        TEST=PredictOptions(**best),
    )
    return _overridden(found, overrides)


def on_data(options: DataOptions, data: str) -> DataOptions:
    """The options with other data for training and validation; classes are those of the options.

    Raises:
        ValueError: `data` names no data.
    """
    name, _, place = data.partition(":")
    public = FORMATS.get(name)() if name in FORMATS.names() else None
    if public is not None and public.source is not None:
        return _public(options, name, public, place)
    if data.endswith(".odgt"):
        root, kind = check(data, progress=False)["root"], "odgt"
    elif place:
        root, kind = ".", "coco" if place.lower().endswith(".json") else "folder"
    else:
        raise ValueError(
            f"--data is {data!r}; give images_dir:masks_dir, images_dir:FILE.json, a list "
            "FILE.odgt, or the name of a public data set (`mit-semseg data download --help`)"
        )
    return replace(options, format=kind, root_dataset=root, list_train=data, list_val=data)


def recipe(options: Options, without: Collection[str] = ()) -> str:
    """The settings that differ from the defaults, as the text of a configuration file.

    Args:
        options: the settings.
        without: sections that are left out.
    """
    tree: dict[str, Any] = {}
    for dotted, setting in SETTINGS.items():
        value = options[dotted]
        section, _, key = dotted.rpartition(".")
        if value != setting.default and section not in without:
            (tree.setdefault(section, {}) if section else tree)[key] = _listed(value)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=10**6)


def _training_data(options: DataOptions, data: str, lists: Path) -> DataOptions:
    found = replace(on_data(options, data), batching="aspect", crop_size=(), classes="")
    if found.format != "folder":
        return found
    images, _, masks = data.partition(":")
    made = make_odgt(images, masks, lists, overwrite=True)
    if not made["validation"]:
        raise ValueError(f"--data {data} has one image; training needs more, some for validation")
    values = check(made["training"], made["root"])["stored_values"]
    return replace(
        found,
        format="odgt",
        root_dataset=made["root"],
        list_train=made["training"],
        list_val=made["validation"],
        **classes_of({int(value) for value in values}),
    )


def classes_of(values: Collection[int]) -> dict[str, Any]:
    """Settings of `DATASET` for the values that masks store.

    255 is ignored unless it is the only value beside 0. Values without large gaps are classes, from
    0 if there is a 0, otherwise from 1; others are numbered in their order.

    Raises:
        ValueError: there are fewer than two classes.
    """
    ignored = IGNORED in values and len(values) > 2
    named = sorted(set(values) - ({IGNORED} if ignored else set()))
    if len(named) < 2:
        raise ValueError(f"the masks store {sorted(values)}, but a training needs two classes")
    offset = min(named[0], 1)
    settings: dict[str, Any] = {"label_map": (), "ignore_label": (), "label_offset": offset}
    if named[-1] - offset + 1 > 2 * len(named):
        pairs = tuple((value, number) for number, value in enumerate(named))
        pairs += ((IGNORED, -1),) if ignored else ()
        return {**settings, "label_offset": 1, "num_class": len(named), "label_map": pairs}
    if ignored:
        settings["ignore_label"] = (IGNORED,)
    return {**settings, "num_class": named[-1] - offset + 1}


def _public(options: DataOptions, name: str, found: DataFormat, place: str) -> DataOptions:
    assert found.source is not None
    return replace(
        options,
        format=name,
        root_dataset=place or f"./data/{found.source.folder or name}",
        list_train="train",
        list_val="val",
        num_class=found.num_class or options.num_class,
        label_map=(),
        ignore_label=(),
        classes="",
    )


def _overridden(options: Options, overrides: Sequence[str]) -> Options:
    tree = tree_of(options)
    tree.merge_from_list(list(overrides))
    return Options.read(tree)


def _name(source: str) -> str:
    """The last part of a path or name, for the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", source.rstrip("/").rpartition("/")[2]).strip("_.") or "model"


def _listed(value: Any) -> Any:
    return [_listed(one) for one in value] if isinstance(value, tuple) else value
