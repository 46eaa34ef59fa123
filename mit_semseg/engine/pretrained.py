"""Trained models by name or folder: published checkpoints, and those of other libraries."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mit_semseg import shipped
from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.dataset import ClassTable, class_table
from mit_semseg.engine import hub
from mit_semseg.engine.checkpoint import (
    CONFIG,
    PRETRAINED,
    CheckpointFolder,
    load_model,
    model_classes,
    whole_model,
)
from mit_semseg.export import format_of, open_exported
from mit_semseg.models import SegmentationModule
from mit_semseg.models.external import LIBRARIES, describe
from mit_semseg.models.external.base import read_json
from mit_semseg.registry import closest
from mit_semseg.weights import MODELS, PublishedModel, cache_dir, fetch_published


class Pretrained(NamedTuple):
    """A trained model.

    Attributes:
        module: in evaluation mode on the CPU.
        classes: names and colours.
        options: its settings, including the scales of the input.
    """

    module: SegmentationModule
    classes: ClassTable
    options: Options


def load_pretrained(source: str | os.PathLike[str]) -> Pretrained:
    """A trained model of this toolkit or of another library.

    Args:
        source: a checkpoint folder; an exported file; a folder that transformers or
            segmentation_models.pytorch saved; "hub:USER/NAME" or "hub:USER/NAME@REVISION" for one
            of this toolkit on the Hugging Face Hub; "hf:NAME" for transformers; "smp:FOLDER";
            "mmseg:FILE"; `shipped.MODEL`, or a name in `weights.MODELS`.

    Raises:
        FileNotFoundError: no such folder or name.
        ValueError: it has no trained weights, or a library is not installed.
        OSError: it cannot be read or downloaded.
    """
    found = _of_this_toolkit(source)
    if found is None:
        return _of_library(_arch(source))
    options, checkpoint = found
    module = load_model(options, checkpoint)
    return Pretrained(module, model_classes(options, checkpoint), options)


def locate(source: str | os.PathLike[str]) -> tuple[Options, str]:
    """Settings and checkpoint of a trained model, for `load_model`; arguments and errors as above.

    A published model is downloaded.
    """
    found = _of_this_toolkit(source)
    return (_of_library(_arch(source)).options, PRETRAINED) if found is None else found


def with_weights(options: Options, section: str) -> Options:
    """Options whose checkpoint is the best, or latest, of their folder if it lacks its own.

    Args:
        options: of a configuration file in a checkpoint folder.
        section: `VAL` or `TEST`.
    """
    folder, part = CheckpointFolder(options.DIR), getattr(options, section)
    names = folder.names()
    if os.path.dirname(part.checkpoint) or part.checkpoint in (*names, PRETRAINED) or not names:
        return options
    return replace(options, **{section: replace(part, checkpoint=folder.best_or_latest())})


def _of_this_toolkit(source: str | os.PathLike[str]) -> tuple[Options, str] | None:
    """Settings and checkpoint; None: a model of another library."""
    name = os.fspath(source)
    if name.startswith(hub.PREFIX):
        folder = CheckpointFolder(hub.fetch(name))
        options = folder.options()
        # Training would import and call it: a model of others must not choose code.
        return replace(
            options, DATASET=replace(options.DATASET, transform="")
        ), folder.best_or_latest()
    path = shipped.model(Path(name).expanduser())
    if format_of(path) is not None:
        return open_exported(path).description.options, str(path)
    if (path / CONFIG).is_file():
        folder = CheckpointFolder(path)
        return folder.options(), folder.best_or_latest()
    if name in MODELS:
        return _published(name, MODELS[name])
    return None


def _arch(source: str | os.PathLike[str]) -> str:
    """`MODEL.arch` of a model of another library."""
    name = os.fspath(source)
    description = Path(name).expanduser() / "config.json"
    if description.is_file():
        return f"{'smp' if '_model_class' in read_json(description) else 'hf'}:{name}"
    if name.partition(":")[0] in LIBRARIES:
        return name
    known = [shipped.MODEL, *MODELS]
    raise FileNotFoundError(
        f"{name} is neither a folder with config.yaml or config.json, nor hub:USER/NAME or "
        f"hf:NAME, nor a model with a name{closest(name, known)}; `mit-semseg models` lists these"
    )


def _published(name: str, model: PublishedModel) -> tuple[Options, str]:
    """A published checkpoint, downloaded once into the cache of weights."""
    folder = cache_dir() / "published" / name
    fetch_published(name, folder, image=False)
    options = Options(
        DIR=str(folder),
        DATASET=DataOptions(padding_constant=model.multiple),
        MODEL=ModelOptions(
            arch_encoder=model.encoder, arch_decoder=model.decoder, fc_dim=model.fc_dim
        ),
    )
    return options, f"epoch_{model.epoch}.pth"


def _of_library(arch: str) -> Pretrained:
    architecture = describe(arch)
    if not architecture.num_class:
        raise ValueError(
            f"{arch} is an architecture without trained weights: give a folder, or train it with "
            f"MODEL.arch {arch}"
        )
    short = architecture.short or 512
    data = DataOptions(
        num_class=architecture.num_class,
        imgSizes=(short,),
        imgMaxSize=architecture.longest or 4 * short,
    )
    options = Options(MODEL=ModelOptions(arch=arch), DATASET=data)
    module = whole_model(options, architecture)
    data = replace(data, padding_constant=module.encoder.strides[0])
    options = replace(options, DATASET=data)
    names = architecture.names
    classes = class_table(data)  # ADE20K's for 150 classes
    if names and names != classes.names:
        same = len(names) == 150 and names[0] == classes.names[0]
        classes = ClassTable(names, classes.colors) if same else ClassTable.of(names)
    return Pretrained(module, classes, options)
