"""Folders of models: written atomically under the published names, read back whole."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from mit_semseg.config import Options, dump_config, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, class_table
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.external import FILE, Architecture, build, describe, save_pretrained
from mit_semseg.weights import load_into, read_state_dict

CONFIG = "config.yaml"
CLASSES = "classes.csv"
PRETRAINED = "pretrained"  # instead of a checkpoint: the weights that MODEL.arch names


def atomic_save(files: Mapping[Path, Any]) -> None:
    """torch.save each value to its path.

    Everything is written to temporary neighbours first, reaches the disk, and is then renamed, so
    that a killed run or a full disk leaves whole files: those that were there before, or the new
    ones. (Between two renames a kill may leave one of each; a resumed run writes both again.) A
    checksum of every tensor is
    part of torch's format, see `weights.check_archive`.

    Raises:
        OSError: a file cannot be written, such as on a full disk; its folder is named.
    """
    written: dict[str, Path] = {}
    try:
        for path, obj in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            written[temporary] = path
            _write(obj, handle, path)
        for temporary, path in written.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in files}:
            _sync_names(folder)
    except BaseException:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)
        raise


def _write(obj: Any, handle: int, path: Path) -> None:
    try:
        with os.fdopen(handle, "wb") as file:
            _save(obj, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = f"{error.strerror}: cannot write"
        raise OSError(error.errno, reason, str(path)) from error


def _save(obj: Any, file: IO[bytes]) -> None:
    try:
        torch.save(obj, file)
    except RuntimeError as error:
        # torch may report a failed write as a broken archive; the reason is what it replaced.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_names(folder: Path) -> None:
    """Let renamed files reach the disk; where folders cannot be opened nothing is done."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_writable(folder: str | Path, what: str) -> None:
    """Make a folder and try to write in it, before the work whose results it is to hold.

    Args:
        folder: its path.
        what: the setting or option that names it.

    Raises:
        OSError: one line with the setting, the folder and the reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{what} {folder} cannot be written to ({reason}): give another") from error


class CheckpointFolder:
    """One model's folder: `config.yaml`, `classes.csv` and `{encoder,decoder}_NAME.pth` pairs.

    NAME is `epoch_N` or `best`. What a run keeps beside them is `training.checkpoints.RunFolder`'s.
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

    def options(self) -> Options:
        """The same, typed."""
        return Options.read(self.config())

    def classes(self) -> ClassTable:
        """Class names and colours, from the folder, else from the configuration's data set."""
        file = self.path / CLASSES
        return ClassTable.load(file) if file.is_file() else class_table(self.options().DATASET)

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
                raise FileNotFoundError(f"{file} does not exist; {self._instead(checkpoint)}")
        return files

    def _instead(self, checkpoint: str) -> str:
        """What there is in place of a checkpoint that is missing, and what to do."""
        if have := ", ".join(self.names()):
            return f"{self.path} has {have}"
        if earlier := sorted(self.path.glob(f"earlier_*/encoder_{checkpoint}")):
            return f"an earlier run has left its own in {earlier[-1].parent}"
        return (
            f"{self.path} holds {_listing(self.path)}: train first, or put encoder_{checkpoint} "
            f"and decoder_{checkpoint} there"
        )

    def prepare(
        self, options: Options, classes: ClassTable, architecture: Architecture | None = None
    ) -> None:
        """Create the folder with configuration, class names and palette.

        Args:
            options: all settings.
            classes: names and colours.
            architecture: what a model of another library is.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        dump_config(options, self.path / CONFIG)
        classes.save(self.path / CLASSES)
        if architecture is not None:
            architecture.save(self.path)

    def save(self, name: str, encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
        """Write one checkpoint; `name` is `epoch_N.pth` or `best.pth`."""
        atomic_save(
            {
                self.path / f"encoder_{name}": dict(encoder),
                self.path / f"decoder_{name}": dict(decoder),
            }
        )

    def latest_epoch(self) -> int:
        """The newest epoch whose weights are there, 0 when there is none."""
        epochs = [
            int(m[1]) for name in self.names() if (m := re.fullmatch(r"epoch_(\d+)\.pth", name))
        ]
        return max(epochs, default=0)


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
        weights = read_state_dict(file)
        small = {
            k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in weights.items()
        }
        for name, tensor in small.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{file}: {name} holds values that half precision cannot: do not pack"
                )
        halves.append(small)
    options = folder.options()
    val = replace(options.VAL, checkpoint="best.pth")
    test = replace(options.TEST, checkpoint="best.pth")
    packed.prepare(replace(options, DIR=str(out), VAL=val, TEST=test), folder.classes())
    packed.save("best.pth", halves[0], halves[1])
    for name in (FILE, "metrics.jsonl", "curves.png", "log.txt"):
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, packed.path / name)
    return packed.path


def pack_for_library(source: str | Path, out: str | Path, checkpoint: str | None = None) -> Path:
    """Write one checkpoint of a model of another library as that library saves it.

    Args:
        source: a checkpoint folder.
        out: the folder to write; created.
        checkpoint: `epoch_N.pth` or `best.pth`; None takes the best, else the latest.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the model is one of this toolkit.
    """
    folder = CheckpointFolder(source)
    module = load_model(folder.config(), checkpoint or folder.best_or_latest())
    save_pretrained(module.encoder, module.decoder, Path(out), folder.classes().names)
    return Path(out)


def resolve_checkpoint(directory: str | Path, checkpoint: str) -> tuple[CheckpointFolder, str]:
    """Folder and name of a checkpoint: a bare name lies in `directory`, a path names its own."""
    path = Path(checkpoint)
    if path.name == checkpoint:
        return CheckpointFolder(directory), checkpoint
    return CheckpointFolder(path.parent), path.name


def find_checkpoint(options: Options, checkpoint: str) -> None:
    """Refuses a checkpoint that is not there; `pretrained` is taken from `MODEL.arch`.

    Raises:
        FileNotFoundError: the checkpoint does not exist; those that do are listed.
        ValueError: `pretrained`, and no model of another library is configured.
    """
    if checkpoint != PRETRAINED:
        folder, name = resolve_checkpoint(options.DIR, checkpoint)
        folder.files(name)
    elif not options.MODEL.arch:
        raise ValueError(
            f"checkpoint {PRETRAINED} is for models of other libraries: set MODEL.arch, or give "
            "epoch_N.pth or best.pth"
        )


def model_classes(options: Options, checkpoint: str) -> ClassTable:
    """Names and colours: those beside the checkpoint, else the configuration's data set's.

    Raises:
        ValueError: the table has not `DATASET.num_class` rows.
    """
    own = class_table(options.DATASET) if checkpoint == PRETRAINED else None
    if own is not None:
        names = describe(options.MODEL.arch).names
        return ClassTable(names, own.colors) if len(names) == len(own) else own
    folder, _ = resolve_checkpoint(options.DIR, checkpoint)
    file = folder.path / CLASSES
    if not file.is_file():
        return class_table(options.DATASET)
    fix = "use the configuration this checkpoint was trained with"
    return ClassTable.load(file).checked(options.DATASET.num_class, file, fix)


def load_model(cfg: Options | Config, checkpoint: str) -> SegmentationModule:
    """The model of a configuration with a checkpoint's weights, in evaluation mode on the CPU.

    Args:
        checkpoint: `epoch_N.pth` or `best.pth` in `cfg.DIR`, or with a folder in front;
            `pretrained` for the weights that `MODEL.arch` names.

    Raises:
        FileNotFoundError: the checkpoint does not exist; those that do are listed.
        ValueError: the weights do not fit the configured model.
    """
    options = Options.read(cfg)
    if checkpoint == PRETRAINED:
        return whole_model(options)
    folder, name = resolve_checkpoint(options.DIR, checkpoint)
    encoder_file, decoder_file = folder.files(name)
    described = replace(options.without_weights(), DIR=str(folder.path))
    module = ModelBuilder.from_config(described, inference=True)
    load_whole(module.encoder, encoder_file, "encoder")
    load_whole(module.decoder, decoder_file, "decoder")
    return module.eval()


def whole_model(options: Options, architecture: Architecture | None = None) -> SegmentationModule:
    """A model of another library with all of its weights, in evaluation mode on the CPU.

    Args:
        options: with `MODEL.arch`.
        architecture: what `describe` says of it, if it was asked already.

    Raises:
        ValueError: the source has no weights for a part of it, or is for other classes.
    """
    model = replace(options.MODEL, weights_encoder="", weights_decoder="")
    encoder, decoder = build(replace(options, MODEL=model), architecture, whole=True)
    decoder.use_softmax = True
    return SegmentationModule(encoder, decoder, None, normalize=encoder.normalization()).eval()


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
