"""Folders of checkpoints: written atomically under the published names, read back whole."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mit_semseg.config import dump_config, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, class_table
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.weights import load_into

CONFIG = "config.yaml"
CLASSES = "classes.csv"
# What a training leaves beside configuration and class table.
RUN_FILES = (
    *("encoder_*.pth", "decoder_*.pth", "history_epoch_*.pth", "state_epoch_*.pth"),
    *("metrics.jsonl", "curves.png"),
)


def atomic_save(files: Mapping[Path, Any]) -> None:
    """torch.save each value to its path, all or none of them.

    Everything is written to temporary neighbours first and then renamed, so that a killed run
    leaves no half file, and no encoder of one step beside a decoder of another.
    """
    written: dict[str, Path] = {}
    try:
        for path, obj in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written[temporary] = path
            with os.fdopen(handle, "wb") as file:
                torch.save(obj, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        for temporary, path in written.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)
        raise


class CheckpointFolder:
    """One model's folder: `config.yaml`, `classes.csv` and `{encoder,decoder}_NAME.pth` pairs.

    NAME is `epoch_N` or `best`; `history_epoch_N.pth` holds the curves and `state_epoch_N.pth`
    what a resumed run needs beside the weights.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def config(self) -> Config:
        """The configuration the model was trained with, DIR set to this folder."""
        file = self.path / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: {self.path} is no checkpoint folder")
        cfg = load_config(file)
        cfg.DIR = str(self.path)
        return cfg

    def classes(self) -> ClassTable:
        """Class names and colours, from the folder, else from the configuration's data set."""
        file = self.path / CLASSES
        return ClassTable.load(file) if file.is_file() else class_table(self.config().DATASET)

    def names(self) -> list[str]:
        """Checkpoints for which both halves are there: epochs in order, `best.pth` last."""
        encoders = {p.name.removeprefix("encoder_") for p in self.path.glob("encoder_*.pth")}
        decoders = {p.name.removeprefix("decoder_") for p in self.path.glob("decoder_*.pth")}
        return sorted(encoders & decoders, key=_order)

    def best_or_latest(self) -> str:
        """`best.pth` when there is one, else the latest epoch; FileNotFoundError when empty."""
        names = self.names()
        if not names:
            raise FileNotFoundError(
                f"{self.path} holds no encoder_NAME.pth with a decoder_NAME.pth; "
                f"it holds {_listing(self.path)}"
            )
        return names[-1]

    def files(self, checkpoint: str) -> tuple[Path, Path]:
        """Encoder and decoder file of `epoch_N.pth` or `best.pth`.

        Raises:
            FileNotFoundError: one is missing; the error lists the checkpoints that are there.
        """
        files = self.path / f"encoder_{checkpoint}", self.path / f"decoder_{checkpoint}"
        for file in files:
            if not file.is_file():
                have = ", ".join(self.names()) or f"no checkpoint but {_listing(self.path)}"
                raise FileNotFoundError(f"{file} does not exist; {self.path} has {have}")
        return files

    def prepare(self, cfg: Config, classes: ClassTable) -> None:
        """Create the folder with configuration, class names and palette."""
        self.path.mkdir(parents=True, exist_ok=True)
        dump_config(cfg, self.path / CONFIG)
        classes.save(self.path / CLASSES)

    def set_aside(self) -> Path | None:
        """Move an earlier run's files to `earlier_N` below, so that a new one neither mixes with
        nor destroys them; None when there are none."""
        files = [f for pattern in RUN_FILES for f in self.path.glob(pattern)]
        if not any(file.suffix == ".pth" for file in files):
            return None
        number = 1
        while (self.path / f"earlier_{number}").exists():
            number += 1
        aside = self.path / f"earlier_{number}"
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        for name in (CONFIG, CLASSES):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, aside / name)
        return aside

    def save(self, name: str, encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
        """Write one checkpoint; `name` is `epoch_N.pth` or `best.pth`."""
        atomic_save(
            {
                self.path / f"encoder_{name}": dict(encoder),
                self.path / f"decoder_{name}": dict(decoder),
            }
        )

    def save_history(self, epoch: int, history: Mapping[str, Any]) -> None:
        """Write the curves up to an epoch."""
        atomic_save({self.path / f"history_epoch_{epoch}.pth": dict(history)})

    def save_state(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Write what a resumed run needs; only the newest is kept, since it is large."""
        newest = self.path / f"state_epoch_{epoch}.pth"
        atomic_save({newest: dict(state)})
        for old in self.path.glob("state_epoch_*.pth"):
            if old != newest:
                old.unlink()

    def load_state(self, epoch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(history, state) of an epoch; state is empty where only weights were saved."""
        history, state = (self.path / f"{kind}_epoch_{epoch}.pth" for kind in ("history", "state"))
        return (
            torch.load(history, map_location="cpu", weights_only=True) if history.is_file() else {},
            torch.load(state, map_location="cpu", weights_only=True) if state.is_file() else {},
        )

    def latest_epoch(self) -> int:
        """The newest epoch that can be continued from, 0 when there is none.

        An epoch whose state is there comes first: a newer one without it was cut off halfway.
        """
        epochs = [
            int(m[1]) for name in self.names() if (m := re.fullmatch(r"epoch_(\d+)\.pth", name))
        ]
        whole = [n for n in epochs if (self.path / f"state_epoch_{n}.pth").is_file()]
        return max(whole or epochs, default=0)

    def drop_epochs(self, keep: int) -> None:
        """Remove all but the newest `keep` epoch checkpoints; 0 keeps all."""
        epochs = [name for name in self.names() if name.startswith("epoch_")]
        for name in epochs[:-keep] if keep else []:
            for kind in ("encoder", "decoder", "history"):
                (self.path / f"{kind}_{name}").unlink(missing_ok=True)


def pack(source: str | Path, out: str | Path, checkpoint: str | None = None) -> Path:
    """Copy one checkpoint of a folder, small enough to hand on, as `best.pth` of another.

    Convolution and linear weights are stored in half precision, which every loader here casts
    back; running statistics and biases, small and more sensitive, stay as they are. Class names,
    palette, configuration, log and curves come along.

    Args:
        source: a checkpoint folder.
        out: the folder to write; created.
        checkpoint: `epoch_N.pth` or `best.pth`; None takes the best, else the latest.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a weight does not fit half precision, or `out` is the source.
    """
    folder, packed = CheckpointFolder(source), CheckpointFolder(out)
    if packed.path.resolve() == folder.path.resolve():
        raise ValueError(f"{out} is the source itself; name another folder to pack into")
    halves = []
    for file in folder.files(checkpoint or folder.best_or_latest()):
        weights = torch.load(file, map_location="cpu", weights_only=True)
        small = {
            k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in weights.items()
        }
        for name, tensor in small.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{file}: {name} holds values that half precision cannot: do not pack"
                )
        halves.append(small)
    cfg = folder.config()
    cfg.DIR = str(out)
    cfg.VAL.checkpoint = cfg.TEST.checkpoint = "best.pth"
    packed.prepare(cfg, folder.classes())
    packed.save("best.pth", halves[0], halves[1])
    for name in ("metrics.jsonl", "curves.png", "log.txt"):
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, packed.path / name)
    return packed.path


def resolve_checkpoint(directory: str | Path, checkpoint: str) -> tuple[CheckpointFolder, str]:
    """Folder and name of a checkpoint: a bare name lies in `directory`, a path names its own."""
    path = Path(checkpoint)
    if path.name == checkpoint:
        return CheckpointFolder(directory), checkpoint
    return CheckpointFolder(path.parent), path.name


def load_model(cfg: Config, checkpoint: str) -> SegmentationModule:
    """The model of a configuration with a checkpoint's weights, in evaluation mode on the CPU.

    Args:
        checkpoint: `epoch_N.pth` or `best.pth` in `cfg.DIR`, or with a folder in front.

    Raises:
        FileNotFoundError: the checkpoint does not exist; those that do are listed.
        ValueError: the weights do not fit the configured model.
    """
    folder, name = resolve_checkpoint(cfg.DIR, checkpoint)
    encoder_file, decoder_file = folder.files(name)
    bare = cfg.clone()
    bare.MODEL.weights_encoder = bare.MODEL.weights_decoder = "none"
    module = ModelBuilder.from_config(bare, inference=True)
    load_whole(module.encoder, encoder_file, "encoder")
    load_whole(module.decoder, decoder_file, "decoder")
    return module.eval()


def load_whole(module: nn.Module, file: Path, what: str) -> None:
    """Load a file that must fit entirely: a trained model with a random part predicts nonsense.

    Raises:
        ValueError: weights of the module are missing in the file, or have another shape.
    """
    report = load_into(module, file, what=what)
    lacking = [*report.missing, *report.mismatched]
    if lacking:
        raise ValueError(
            f"{file} does not fit this {what}: {len(lacking)} tensors are missing or of another "
            f"shape, such as {lacking[0]}; check MODEL.arch_{what} and DATASET.num_class"
        )


def _order(name: str) -> tuple[int, str]:
    match = re.fullmatch(r"epoch_(\d+)\.pth", name)
    return (int(match[1]), name) if match else (10**9 if name == "best.pth" else -1, name)


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "nothing: the folder does not exist"
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "no file"
