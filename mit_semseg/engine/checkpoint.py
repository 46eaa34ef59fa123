"""Checkpoint folders: atomic writing under the published file names, and loading."""

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

from mit_semseg import shipped
from mit_semseg.arguments import CONFIG
from mit_semseg.config import Options, dump_config, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable, class_table
from mit_semseg.export import format_of, open_exported
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.external import FILE, Architecture, build, describe, save_pretrained
from mit_semseg.models.lora import with_adapters
from mit_semseg.weights import (
    SUFFIXES,
    load_into,
    need_safetensors,
    read_state_dict,
    safetensors_bytes,
)

CLASSES = "classes.csv"
PRETRAINED = "pretrained"  # instead of a checkpoint: the weights that MODEL.arch names


def atomic_save(files: Mapping[Path, Any]) -> None:
    """Save each value to its path with torch.save, or tensors as `.safetensors`.

    The files are written under temporary names, flushed to disk, and renamed, so that a kill or a
    full disk leaves either the old or the new file. (A kill between two renames leaves one new and
    one old file; a resumed run rewrites both.) Both formats have checksums, see
    `weights.load_checked`.

    Raises:
        OSError: a file cannot be written, for example on a full disk.
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
            if path.suffix == ".safetensors":
                file.write(safetensors_bytes(obj))
            else:
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
        # torch may report a failed write as a broken archive; the cause is in its context.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_names(folder: Path) -> None:
    """Flush renames in a folder to disk; not on systems where folders cannot be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_writable(folder: str | Path, what: str) -> None:
    """Create a folder and check that files can be written to it.

    Args:
        folder: its path.
        what: the setting or option that names it, for the error.

    Raises:
        OSError: it cannot be created or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"{what} {folder} cannot be written to ({reason}): use another folder"
        ) from error


class CheckpointFolder:
    """The folder of a model: `config.yaml`, `classes.csv` and pairs `{encoder,decoder}_NAME`.

    NAME is `epoch_N.pth` or `best.pth`, or the same as `.safetensors`.
    `training.checkpoints.RunFolder` adds the files of a training.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def config(self) -> Config:
        """The configuration of the training, with `DIR` set to this folder."""
        file = self.path / CONFIG
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: {self.path} is not a checkpoint folder"
            )
        cfg = load_config(file)
        cfg.DIR = str(self.path)
        return cfg

    def options(self) -> Options:
        """`config` as typed options."""
        return Options.read(self.config())

    def classes(self) -> ClassTable:
        """Class names and colours, from the folder or else from the configured data set."""
        file = self.path / CLASSES
        return ClassTable.load(file) if file.is_file() else class_table(self.options().DATASET)

    def names(self) -> list[str]:
        """Checkpoints with encoder and decoder file: epochs in order, the best last.

        Of two with the same name, `.pth` follows `.safetensors`.
        """
        encoders, decoders = (
            {p.name.removeprefix(part) for p in self.path.glob(f"{part}*") if p.suffix in SUFFIXES}
            for part in ("encoder_", "decoder_")
        )
        return sorted(encoders & decoders, key=_order)

    def best_or_latest(self) -> str:
        """`best.pth` or `best.safetensors` if there is one, else the latest epoch.

        Raises:
            FileNotFoundError: there is no checkpoint.
        """
        names = self.names()
        if not names:
            raise FileNotFoundError(
                f"no pair of encoder_NAME.pth and decoder_NAME.pth (or .safetensors) in "
                f"{self.path}; it contains {_listing(self.path)}"
            )
        return names[-1]

    def files(self, checkpoint: str) -> tuple[Path, Path]:
        """Encoder and decoder file of a checkpoint, such as `best.pth`.

        Raises:
            FileNotFoundError: one is missing; the error lists the checkpoints that are there.
        """
        files = self.path / f"encoder_{checkpoint}", self.path / f"decoder_{checkpoint}"
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; {self._instead(checkpoint)}")
        return files

    def _instead(self, checkpoint: str) -> str:
        """What exists instead of a missing checkpoint, for the error."""
        if have := ", ".join(self.names()):
            return f"{self.path} has {have}"
        if earlier := sorted(self.path.glob(f"earlier_*/encoder_{checkpoint}")):
            return f"that of an earlier run is in {earlier[-1].parent}"
        return (
            f"{self.path} contains {_listing(self.path)}: train first, or copy "
            f"encoder_{checkpoint} and decoder_{checkpoint} there"
        )

    def prepare(
        self, options: Options, classes: ClassTable, architecture: Architecture | None = None
    ) -> None:
        """Create the folder with configuration and class table.

        Args:
            options: all settings.
            classes: names and colours.
            architecture: description of a model of another library.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        dump_config(options, self.path / CONFIG)
        classes.save(self.path / CLASSES)
        if architecture is not None:
            architecture.save(self.path)

    def save(self, name: str, encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
        """Write one checkpoint; `name` is one of `names`."""
        atomic_save(
            {
                self.path / f"encoder_{name}": dict(encoder),
                self.path / f"decoder_{name}": dict(decoder),
            }
        )

    def latest_epoch(self) -> int:
        """The latest epoch with weights; 0 if there is none."""
        epochs = [
            int(m[1]) for name in self.names() if (m := re.fullmatch(r"epoch_(\d+)\.pth", name))
        ]
        return max(epochs, default=0)


def pack(
    source: str | Path,
    out: str | Path,
    checkpoint: str | None = None,
    *,
    suffix: str = ".pth",
    half: bool = True,
) -> Path:
    """Copy one checkpoint, in half precision, as the best of another folder.

    Convolution and linear weights are stored in float16, and converted back when they are loaded;
    buffers and biases, which are small and more sensitive, keep their type. Configuration, class
    table, log and curves are copied.

    Args:
        source: a checkpoint folder.
        out: the folder to write; created.
        checkpoint: such as `epoch_N.pth`; None for the best, else the latest.
        suffix: `.pth`, or `.safetensors`, which needs the extra `hub`.
        half: store weights in float16.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: a weight is outside the range of float16, `out` is `source`, or safetensors is
            not installed.
    """
    folder, packed = CheckpointFolder(source), CheckpointFolder(out)
    best = f"best{suffix}"
    if suffix == ".safetensors":
        need_safetensors(packed.path / best)
    if packed.path.resolve() == folder.path.resolve():
        raise ValueError(f"{out} is the source folder: give another output folder")
    halves = []
    for file in folder.files(checkpoint or folder.best_or_latest()):
        weights = read_state_dict(file)
        small = {
            k: v.half() if half and v.is_floating_point() and v.ndim > 1 else v
            for k, v in weights.items()
        }
        for name, tensor in small.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{file}: {name} has values outside the range of float16: use the original "
                    "checkpoint"
                )
        halves.append(small)
    options = folder.options()
    val = replace(options.VAL, checkpoint=best)
    test = replace(options.TEST, checkpoint=best)
    packed.prepare(replace(options, DIR=str(out), VAL=val, TEST=test), folder.classes())
    packed.save(best, halves[0], halves[1])
    for other in (FILE, "metrics.jsonl", "curves.png", "log.txt"):
        if (folder.path / other).is_file():
            shutil.copyfile(folder.path / other, packed.path / other)
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
    """Folder and name of a checkpoint, given as a name in `directory` or as a path."""
    path = Path(checkpoint)
    if path.name == checkpoint:
        return CheckpointFolder(directory), checkpoint
    return CheckpointFolder(shipped.model(path.parent)), path.name


def find_checkpoint(options: Options, checkpoint: str) -> None:
    """Checks that a checkpoint exists; `pretrained` needs `MODEL.arch`.

    Raises:
        FileNotFoundError: the checkpoint does not exist; those that do are listed.
        ValueError: `pretrained`, and no model of another library is configured.
    """
    if format_of(checkpoint) is not None:
        return
    if checkpoint != PRETRAINED:
        folder, name = resolve_checkpoint(options.DIR, checkpoint)
        folder.files(name)
    elif not options.MODEL.arch:
        raise ValueError(
            f"checkpoint {PRETRAINED} is for models of other libraries: set MODEL.arch, or give "
            "epoch_N.pth or best.pth"
        )


def model_classes(options: Options, checkpoint: str) -> ClassTable:
    """Class names and colours from the checkpoint's folder, or else of the configured data set.

    Raises:
        ValueError: the table does not have `DATASET.num_class` rows.
    """
    if format_of(checkpoint) is not None:
        return open_exported(checkpoint).description.classes
    if checkpoint == PRETRAINED:
        own = class_table(options.DATASET)
        names = describe(options.MODEL.arch).names
        return ClassTable(names, own.colors) if len(names) == len(own) else own
    folder, _ = resolve_checkpoint(options.DIR, checkpoint)
    file = folder.path / CLASSES
    if not file.is_file():
        return class_table(options.DATASET)
    fix = "use the configuration this checkpoint was trained with"
    return ClassTable.load(file).checked(options.DATASET.num_class, file, fix)


def load_model(cfg: Options | Config, checkpoint: str) -> SegmentationModule:
    """The configured model with the weights of a checkpoint, in evaluation mode on the CPU.

    Args:
        cfg: the configuration.
        checkpoint: `epoch_N.pth` or `best.pth` in `cfg.DIR`, or a path; `pretrained` for the
            weights that `MODEL.arch` names; an exported file.

    Raises:
        FileNotFoundError: the checkpoint does not exist; the message lists those that do.
        ValueError: the weights do not fit the model.
    """
    options = Options.read(cfg)
    if format_of(checkpoint) is not None:
        return open_exported(checkpoint)
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
        architecture: the result of `describe`, if it is known already.

    Raises:
        ValueError: the source has no weights for a part of the model, or other classes.
    """
    model = replace(options.MODEL, weights_encoder="", weights_decoder="")
    encoder, decoder = build(replace(options, MODEL=model), architecture, whole=True)
    decoder.use_softmax = True
    return SegmentationModule(encoder, decoder, None, normalize=encoder.normalization()).eval()


def load_whole(module: nn.Module, file: Path, what: str) -> None:
    """Load weights into a module, all of which have to be in the file.

    Args:
        module: the encoder or decoder.
        file: of the weights.
        what: "encoder" or "decoder", for the error.

    Raises:
        ValueError: weights of the module are missing in the file or have another shape.
    """
    state = with_adapters(module, read_state_dict(file))
    report = load_into(module, state, what=what, file=str(file))
    lacking = [*report.missing, *report.mismatched]
    if lacking:
        raise ValueError(
            f"{file} does not fit this {what}: {len(lacking)} tensors are missing or of another "
            f"shape, such as {lacking[0]}; check MODEL.arch_{what} and DATASET.num_class"
        )


def _order(name: str) -> tuple[int, bool, str]:
    stem, suffix = os.path.splitext(name)
    match = re.fullmatch(r"epoch_(\d+)", stem)
    number = int(match[1]) if match else 10**9 if stem == "best" else -1
    return number, suffix == ".pth", name


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "nothing: the folder does not exist"
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "no file"
