"""Whole models (`MODEL.arch`), of or on other libraries, as an encoder and a decoder."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import nn

from mit_semseg.config import Options
from mit_semseg.models.external.base import (
    FILE,
    Architecture,
    ExternalDecoder,
    ExternalEncoder,
    Library,
    merge_tensors,
    split_tensors,
)
from mit_semseg.registry import closest
from mit_semseg.weights import ClassRows, LoadReport, load_into, resolve
from mit_semseg.weights.channels import adapted

__all__ = [
    "FILE",
    "Architecture",
    "ExternalDecoder",
    "ExternalEncoder",
    "build",
    "check",
    "describe",
    "save_pretrained",
]

log = logging.getLogger("mit_semseg")

# Prefix of MODEL.arch -> module of this package.
LIBRARIES = ("hf", "smp", "mmseg", "eomt")


def library_of(arch: str) -> tuple[Library, str]:
    """The library that `MODEL.arch` names, and the rest of it.

    Raises:
        ValueError: no such library, or it is not installed.
    """
    prefix, _, name = arch.partition(":")
    if prefix not in LIBRARIES or not name:
        known = " or ".join(f"{prefix}:NAME" for prefix in LIBRARIES)
        raise ValueError(
            f"MODEL.arch is {arch!r}; it is {known}, or empty for MODEL.arch_encoder and "
            f"MODEL.arch_decoder{closest(prefix, list(LIBRARIES))}"
        )
    library = cast(Library, importlib.import_module(f"{__name__}.{prefix}"))
    if importlib.util.find_spec(library.MODULE) is None:
        raise ValueError(
            f"MODEL.arch {arch} needs {library.LIBRARY}: pip install 'mit_semseg[{library.EXTRA}]'"
        )
    return library, name


def check(options: Options) -> None:
    """Refuses an invalid `MODEL.arch`; nothing is imported or downloaded.

    The source need not exist if the checkpoint folder (`DIR`) has its description.

    Raises:
        ValueError, FileNotFoundError: with the reason.
    """
    library, name = library_of(options.MODEL.arch)
    if _saved(options) is None:
        library.check(name)


def _saved(options: Options) -> Architecture | None:
    """The description of `MODEL.arch` in the checkpoint folder."""
    saved = Architecture.load(Path(options.DIR))
    return saved if saved and saved.source == options.MODEL.arch else None


def describe(arch: str, weights: bool = True) -> Architecture:
    """Description of `MODEL.arch`.

    Args:
        arch: `MODEL.arch`.
        weights: those of the source will be used.

    Raises:
        ValueError: no model, or one that is not supported.
        OSError: it cannot be read or downloaded.
    """
    library, name = library_of(arch)
    return library.describe(name, weights)


def build(
    options: Options,
    architecture: Architecture | None = None,
    whole: bool = False,
    classes: Sequence[str] = (),
) -> tuple[ExternalEncoder, ExternalDecoder]:
    """Encoder and decoder of `MODEL.arch`, with the weights that the options ask for.

    `MODEL.weights_encoder` and `MODEL.weights_decoder` are "" for those of the source, "none" for
    random ones, or a path or url of a file of this toolkit. If none of the source's are used, the
    description in the checkpoint folder (`DIR`) suffices.

    Args:
        options: the whole configuration.
        architecture: the result of `describe`, if known.
        whole: refuse weights that leave something at its initial values.
        classes: names of the classes; rows of the source's classifier are loaded by name.

    Raises:
        ValueError: weights that do not fit.
        OSError: the source, or a file, cannot be read or downloaded.
    """
    arch, count = options.MODEL.arch, options.DATASET.num_class
    library, _ = library_of(arch)
    wanted = options.MODEL.weights_encoder, options.MODEL.weights_decoder
    if architecture is None and "" not in wanted:
        architecture = _saved(options)
    architecture = architecture or describe(arch, "" in wanted)
    source, channels = architecture, options.MODEL.in_channels
    if channels != 3:
        architecture = library.with_channels(source, channels)
    network = library.network(architecture, count)
    encoder, decoder = library.split(network, architecture, count)
    encoder.in_channels = channels
    parts: tuple[tuple[str, nn.Module], ...] = ("encoder", encoder), ("decoder", decoder)
    states = (
        ({}, {})
        if "" not in wanted
        else split_tensors(library.pretrained(source), encoder, decoder)
    )
    for (what, part), weights, state in zip(parts, wanted, states, strict=True):
        state = adapted(state, part.state_dict(), options.DATASET.bands)
        if weights == "" and (state or whole):
            rows = _rows(architecture, decoder, classes) if part is decoder else None
            report = load_into(part, state, what=what, file=arch, classes=rows) if state else None
            if whole and (report is None or not report.ok):
                raise ValueError(_incomplete(architecture, what, report))
        elif weights == "":
            log.info("%s: the source has no weights for the %s, which are random", arch, what)
        elif weights.lower() not in ("", "none"):
            load_into(part, resolve(weights), what=what)
    return encoder, decoder


def _rows(
    architecture: Architecture, decoder: ExternalDecoder, classes: Sequence[str]
) -> ClassRows | None:
    """Correspondence of classes by name; None if no name is equal."""
    known = {name.casefold() for name in architecture.names}
    if not any(name.casefold() in known for name in classes):
        return None
    rest = decoder.further_scores
    return ClassRows.by_name((*classes, *rest), (*architecture.names, *rest))


def save_pretrained(
    encoder: nn.Module, decoder: nn.Module, folder: Path, names: tuple[str, ...] = ()
) -> None:
    """Write a model for its own library, whose `from_pretrained` reads the folder.

    Args:
        encoder, decoder: what `build` gave.
        folder: made if it does not exist.
        names: of the classes.

    Raises:
        ValueError: the model is one of this toolkit.
    """
    if not (isinstance(encoder, ExternalEncoder) and isinstance(decoder, ExternalDecoder)):
        raise ValueError(
            f"{type(encoder).__name__} with {type(decoder).__name__} is not a model of another "
            "library: it can only be saved as a checkpoint folder"
        )
    architecture = encoder.architecture
    library, _ = library_of(architecture.source)
    network = library.network(architecture, decoder.num_class)
    network.load_state_dict(merge_tensors(encoder, decoder))
    folder.mkdir(parents=True, exist_ok=True)
    library.save(network, replace(architecture, names=names or architecture.names), folder)


def _incomplete(architecture: Architecture, what: str, report: LoadReport | None) -> str:
    """Why a source cannot be used without training."""
    if report is not None and report.mismatched:
        return (
            f"{architecture.source} is for {architecture.num_class} classes: set "
            f"DATASET.num_class {architecture.num_class}, or train it for yours"
        )
    lacking = "no weights" if report is None else f"not all weights ({report.missing[0]}, ...)"
    return (
        f"{architecture.source} has {lacking} for the {what}: train it first, with mit-semseg train"
    )
