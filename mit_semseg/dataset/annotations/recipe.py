"""The recipe of imported data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

# Sides of training images are limited to this many pixels, which a CPU trains in reasonable time.
_LONGEST_SHORT_SIDE = 480

_RECIPE = """\
# Data imported from {title} by mit-semseg data import.
# Train:    mit-semseg train --cfg recipe.yaml
# Evaluate: mit-semseg eval --cfg recipe.yaml
DIR: {folder}
DATASET:
  root_dataset: {root}
  list_train: {training}
  list_val: {validation}
  classes: {classes}
  num_class: {num_class}
  # Masks store class numbers from 0, and this value where nothing is to be learned.
  label_offset: 0
  ignore_label: {ignored}
  imgSizes: {sizes}
  imgMaxSize: {longest}
  padding_constant: 8
  segm_downsampling_rate: 2
  color_jitter: 0.4
MODEL:
  arch_encoder: "mobilenetv2dilated"
  arch_decoder: "c1_deepsup"
  fc_dim: 320
TRAIN:
  batch_size_per_gpu: 4
  num_epoch: 40
  epoch_iters: "auto"
  optim: "AdamW"
  lr_encoder: 0.0005
  lr_decoder: 0.002
  weight_decay: 0.01
  warmup_iters: 50
  # Rare classes are learned, too.
  class_weights: "sqrt"
  ema: 0.99
  precision: "auto"
  keep: 1
  eval_epochs: 5
VAL:
  checkpoint: "best.pth"
  imgSizes: [{short}]
TEST:
  checkpoint: "best.pth"
  imgSizes: [{short}]
  save: ["color", "overlay", "legend"]
"""


def recipe_of(
    title: str,
    root: Path,
    lists: Mapping[str, str],
    classes: str,
    num_class: int,
    ignored: int,
    short: int,
    folder: Path,
) -> str:
    """The text of a recipe.

    Args:
        title: the format that the data comes from.
        root: `DATASET.root_dataset`.
        lists: split -> list, relative to `root`.
        classes: class table, relative to `root`.
        num_class: number of classes.
        ignored: stored value of ignored pixels.
        short: typical short side of the images in pixels.
        folder: `DIR`.
    """
    short = max(32, min(short, _LONGEST_SHORT_SIDE))
    sizes = sorted({max(32, round(share * short)) for share in (0.75, 0.875, 1, 1.125, 1.25)})
    validation = lists.get("validation") or lists["training"]
    return _RECIPE.format(
        title=title,
        folder=json.dumps(str(folder)),
        root=json.dumps(str(root)),
        training=json.dumps(lists.get("training", validation)),
        validation=json.dumps(validation),
        classes=json.dumps(classes),
        num_class=num_class,
        ignored=ignored,
        sizes=sizes,
        longest=4 * short,
        short=short,
    )
