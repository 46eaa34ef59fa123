"""Trained models by name or folder: published checkpoints, and those of other libraries."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.dataset import ClassTable, class_table
from mit_semseg.engine.checkpoint import CONFIG, CheckpointFolder, load_model, whole_model
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
        source: a checkpoint folder; a folder that transformers or segmentation_models.pytorch
            saved; "hf:NAME" for transformers; "smp:FOLDER"; "mmseg:FILE"; or a name in
            `weights.MODELS`.

    Raises:
        FileNotFoundError: no such folder or name.
        ValueError: it has no trained weights, or a library is not installed.
        OSError: it cannot be read or downloaded.
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file():
        return _of_folder(CheckpointFolder(folder))
    if (folder / "config.json").is_file():
        prefix = "smp" if "_model_class" in read_json(folder / "config.json") else "hf"
        return _of_library(f"{prefix}:{name}")
    if name.partition(":")[0] in LIBRARIES:
        return _of_library(name)
    if name in MODELS:
        return _published(name, MODELS[name])
    raise FileNotFoundError(
        f"{name} is neither a folder with config.yaml or config.json, nor hf:NAME, nor a published "
        f"model{closest(name, list(MODELS))}; `mit-semseg models` lists these"
    )


def _of_folder(folder: CheckpointFolder) -> Pretrained:
    options = folder.options()
    return Pretrained(load_model(options, folder.best_or_latest()), folder.classes(), options)


def _published(name: str, model: PublishedModel) -> Pretrained:
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
    module = load_model(options, f"epoch_{model.epoch}.pth")
    return Pretrained(module, class_table(options.DATASET), options)


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
