"""JSON configurations of tutorials and templates (`name`, `arch`, `trainer`), and our keys.

This module imports the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# The end of a dotted entry -> key. The longest end that fits counts.
_KEYS = {
    "name": "DIR",
    "save_dir": "DIR",
    "n_gpu": "the option --gpus",
    "arch.type": "MODEL.arch_encoder and MODEL.arch_decoder",
    "arch.args.num_classes": "DATASET.num_class",
    "arch.args.backbone": "MODEL.arch_encoder",
    "arch.args.pretrained": "MODEL.weights_encoder",
    "arch.args.freeze_bn": "TRAIN.fix_bn",
    "arch.args.freeze_backbone": "TRAIN.freeze",
    "loader.type": "DATASET.format",
    "args.data_dir": "DATASET.root_dataset",
    "args.split": "DATASET.list_train and DATASET.list_val",
    "args.batch_size": "TRAIN.batch_size_per_gpu",
    "args.base_size": "DATASET.imgSizes",
    "args.crop_size": "DATASET.crop_size",
    "args.scale": "DATASET.scale_jitter",
    "args.flip": "DATASET.random_flip",
    "args.rotate": "DATASET.random_rotation",
    "args.blur": "DATASET.random_blur",
    "args.augment": "DATASET.batching, crop for all of them",
    "args.num_workers": "TRAIN.workers",
    "optimizer.type": "TRAIN.optim",
    "optimizer.differential_lr": "TRAIN.lr_encoder and TRAIN.lr_decoder",
    "optimizer.args.lr": "TRAIN.lr_encoder and TRAIN.lr_decoder",
    "optimizer.args.weight_decay": "TRAIN.weight_decay",
    "optimizer.args.momentum": "TRAIN.beta1",
    "loss": "TRAIN.loss",
    "ignore_index": "DATASET.ignore_label",
    "lr_scheduler.type": "TRAIN.schedule",
    "lr_scheduler.args.milestones": "TRAIN.milestones",
    "lr_scheduler.args.gamma": "TRAIN.gamma",
    "trainer.epochs": "TRAIN.num_epoch",
    "trainer.early_stop": "TRAIN.patience",
    "trainer.save_period": "TRAIN.keep",
    "trainer.val_per_epochs": "TRAIN.eval_epochs",
    "trainer.monitor": "nothing, best.pth has the best mean IoU",
    "use_synch_bn": "nothing, BatchNorm is always synchronised",
}


def advice(file: str) -> str:
    """Which key each entry of a JSON configuration has here, for an error.

    Args:
        file: its path.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not valid JSON.
    """
    try:
        tree = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"configuration file {file} does not exist") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is neither YAML nor valid JSON: {error}") from error
    found: dict[str, list[str]] = {}
    for dotted in _leaves(tree) if isinstance(tree, Mapping) else ():
        ends = [end for end in _KEYS if dotted == end or dotted.endswith((f".{end}", f"_{end}"))]
        key = _KEYS[max(ends, key=len)] if ends else "nothing"
        found.setdefault(key, []).append(dotted)
    gone = found.pop("nothing", [])
    lines = [f"{key} for {', '.join(entries)}" for key, entries in found.items()]
    lines += [f"nothing for {', '.join(gone)}"] if gone else []
    return (
        f"{file} is a configuration of another toolkit; write a YAML file (recipes: "
        f"config/demo.yaml and others), with {'; '.join(lines) or 'KEY: value lines'}"
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all values."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
