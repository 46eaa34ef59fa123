"""Loading state dicts into encoders and decoders, with a report."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.weights.archive import few, read_state_dict
from mit_semseg.weights.channels import adapted
from mit_semseg.weights.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SUBMODULES,
    TORCHVISION,
    backbone_of,
    fetch_imagenet,
    fetch_torchvision,
    resolve,
)
from mit_semseg.weights.tfslim import convert_tfslim_mobilenet
from mit_semseg.weights.torchvision import MOBILENET_KEY, torchvision_decoder, torchvision_encoder

logger = logging.getLogger("mit_semseg")

# Internal buffers of the published SyncBN, which no other implementation uses.
_BOOKKEEPING = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")


@dataclass
class LoadReport:
    """Names of the tensors that were loaded and of those that were not.

    Attributes:
        what: part of the model, for example "encoder".
        file: origin of the tensors.
        matched: loaded.
        missing: in the module, but not in the file; they keep their initial values.
        unexpected: in the file, but not in the module.
        mismatched: for another number of classes; they keep their initial values.
        by_name: tensors whose rows were loaded for classes with equal names.
        dropped: internal buffers of the published SyncBN.
    """

    what: str
    file: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    by_name: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every tensor of the module was loaded."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors matched"]
        for label, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("skipped, another number of classes", self.mismatched),
        ):
            parts.append(f"{len(names)} {label}{few(names)}")
        if not self.mismatched:
            parts.pop()
        if self.by_name:
            parts.append(f"{len(self.by_name)} by the names of classes{few(self.by_name)}")
        return f"{self.what} from {self.file}: {', '.join(parts)}"


def _required(own: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that a file must have: all except counters of batches."""
    counters = (*_BOOKKEEPING, "num_batches_tracked")
    return [key for key in own if key.rsplit(".", 1)[-1] not in counters]


def _own_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, without the prefix `model.` if the module's names do not have it.

    Files of PIDNet and DDRNet have it, because they were trained inside another module.
    """
    names = {key: key.removeprefix("model.") for key in tensors}
    return {names[k] if k not in own and names[k] in own else k: v for k, v in tensors.items()}


@dataclass(frozen=True)
class ClassRows:
    """Correspondence of the classes of a module with those of a file.

    Attributes:
        count: number of classes in the file.
        rows: index in the file of each class of the module; None: a new class.
    """

    count: int
    rows: tuple[int | None, ...]

    @classmethod
    def by_name(cls, own: Sequence[str], theirs: Sequence[str]) -> ClassRows:
        """Matches classes with equal names, ignoring case; of several in the file the first.

        Numbered names ("class 3") are not matched.
        """
        numbers = {
            name.casefold(): i
            for i, name in reversed(list(enumerate(theirs)))
            if not re.fullmatch(r"class \d+", name)
        }
        return cls(len(theirs), tuple(numbers.get(name.casefold()) for name in own))

    @property
    def differ(self) -> bool:
        """Whether some classes match, but not all at the same index."""
        same = len(self.rows) == self.count and all(
            row in (i, None) for i, row in enumerate(self.rows)
        )
        return not same and any(row is not None for row in self.rows)

    def fit(self, own: Tensor, value: Tensor, axes: Sequence[int]) -> bool:
        """Whether these axes of both tensors are over the classes, and the others are equal."""
        kept = [i for i in range(own.ndim) if i not in axes]
        return (
            own.ndim == value.ndim
            and all(own.shape[i] == len(self.rows) and value.shape[i] == self.count for i in axes)
            and all(own.shape[i] == value.shape[i] for i in kept)
        )

    def take(self, own: Tensor, value: Tensor, axes: Sequence[int]) -> Tensor:
        """The module's tensor, with the entries of matching classes from the file's."""
        if not axes:
            return value.to(own)
        axis, *rest = axes
        rest = [i - (i > axis) for i in rest]
        parts = [own.select(axis, i) for i in range(len(self.rows))]
        for i, row in enumerate(self.rows):
            if row is not None:
                parts[i] = self.take(parts[i], value.select(axis, row), rest)
        return torch.stack(parts, axis)


def _other_classes(module: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that would match if the module had another number of classes."""
    own = module.state_dict()
    shapes = {k: (own[k].shape, v.shape) for k, v in tensors.items() if k in own}
    differing = {k: (ours, theirs) for k, (ours, theirs) in shapes.items() if ours != theirs}
    find: Callable[[], dict[str, tuple[int, ...]]] | None = getattr(module, "class_tensors", None)
    if not differing or find is None:
        return set()
    by_class = find()
    return {
        key
        for key, (ours, theirs) in differing.items()
        if len(ours) == len(theirs)
        and all(ours[i] == theirs[i] or i in by_class.get(key, ()) for i in range(len(ours)))
    }


def load_into(
    module: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    what: str,
    file: str = "",
    strict: bool = False,
    classes: ClassRows | None = None,
) -> LoadReport:
    """Loads a state dict into a module, as far as names match.

    Tensors for another number of classes (`Decoder.class_tensors`) are skipped; any other
    difference in shape is an error. Values are cast to the module's dtype. The prefix `model.` is
    removed from names if the module's names do not have it.

    Args:
        module: the module; stays on its device.
        source: a weight file, or a mapping of names to tensors.
        what: part of the model, for the report, for example "encoder".
        file: name for the report if `source` is a mapping.
        strict: raise an error if tensors are missing or for another number of classes.
        classes: correspondence of the rows of the classifier; None: rows are not reordered.

    Returns:
        The report, which is also logged.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: no name matches, a shape differs, a value is non-finite, or `strict` and a
            tensor is missing.
    """
    tensors = read_state_dict(source, file)
    name = file or (str(source) if not isinstance(source, Mapping) else "the given tensors")
    report = LoadReport(what, name)
    own = module.state_dict()
    tensors = _own_names(own, tensors)
    other_classes = _other_classes(module, tensors)
    matching: dict[str, Tensor] = {}
    wrong: list[str] = []

    if classes is not None and classes.differ:
        tensors = _with_rows(module, tensors, classes, report)
    for key, value in tensors.items():
        if key.rsplit(".", 1)[-1] in _BOOKKEEPING:
            report.dropped.append(key)
        elif key not in own:
            report.unexpected.append(key)
        elif value.shape == own[key].shape:
            matching[key] = value
        elif key in other_classes:
            report.mismatched.append(key)
        else:
            wrong.append(f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}")

    if wrong:
        raise ValueError(
            f"{name} does not fit the {what}: {len(wrong)} tensors differ in shape"
            f"{few(wrong, 3)}; check the architecture, MODEL.fc_dim and MODEL.in_channels"
        )
    if not matching and not report.mismatched:
        raise ValueError(
            f"{name} does not fit the {what}: no tensor name matches; it has{few(list(tensors))}, "
            f"the {what} has{few(list(own))}"
        )
    for key, value in matching.items():
        if value.is_complex() != own[key].is_complex():
            raise ValueError(f"{name} does not fit the {what}: {key} is {value.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} is damaged: {key} contains non-finite values")

    report.matched = list(matching)
    report.missing = [key for key in _required(own) if key not in tensors]
    if strict and not report.ok:
        raise ValueError(f"{report}")
    module.load_state_dict(matching, strict=False)
    logger.log(logging.INFO if report.ok else logging.WARNING, "%s", report)
    return report


def _with_rows(
    module: nn.Module, tensors: Mapping[str, Tensor], classes: ClassRows, report: LoadReport
) -> dict[str, Tensor]:
    """The tensors, with class rows reordered as in the module; the report lists them."""
    own, found = module.state_dict(), dict(tensors)
    find: Callable[[], dict[str, tuple[int, ...]]] = getattr(module, "class_tensors", dict)
    for key, axes in find().items():
        if key in found and classes.fit(own[key], found[key], axes):
            found[key] = classes.take(own[key], found[key], axes)
            report.by_name.append(key)
    return found


def load_encoder(
    encoder: nn.Module,
    arch: str,
    weights: str | Path,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    bands: Sequence[str] = (),
) -> LoadReport | None:
    """Loads pretrained weights into an encoder.

    Args:
        encoder: the encoder.
        arch: its name, for example "resnet50dilated".
        weights: "": the published ImageNet weights of `arch` (downloaded once); "none": random;
            "torchvision:NAME" (see `TORCHVISION`); "torchvision:PATH" or "torchvision:URL": a file
            with torchvision's names; "tfslim:PATH": a MobileNetV2 trained with TF-slim, with
            torchvision's names; otherwise a path or URL. Torchvision's names are also recognised
            in other files, except for MobileNetV2. If the encoder has other input channels than the
            three of the file, its filters are made by `channels.adapted`.
        mean: mean of the input normalisation, RGB in [0, 1]; used by "tfslim:" only.
        std: standard deviation of the input normalisation; used by "tfslim:" only.
        bands: `DATASET.bands`.

    Returns:
        The report, or None for random weights.

    Raises:
        ValueError: the weights are of another architecture, or more than half are missing.
        FileNotFoundError: the path does not exist.
        DownloadError: the file could not be downloaded.
    """
    text = str(weights)
    if text.lower() == "none":
        return None
    if arch.startswith("timm:"):
        return _load_timm(encoder, arch, text, bands)
    kind, _, rest = text.partition(":")
    if kind == "torchvision":
        path = fetch_torchvision(rest, encoder=arch)
        state = torchvision_encoder(read_state_dict(path))
        return _initialise(encoder, arch, state, f"{path} (torchvision)", bands)
    if kind == "tfslim":
        _only_mobilenet(arch, text)
        path = resolve(rest)
        state = convert_tfslim_mobilenet(read_state_dict(path), mean=mean, std=std)
        return _initialise(encoder, arch, state, f"{path} (TF-slim)", bands)
    if text == "" and arch.lower() in SUBMODULES:
        inner, part = SUBMODULES[arch.lower()]
        return load_encoder(encoder.get_submodule(part), inner, "", bands=bands)
    path = resolve(text) if text else fetch_imagenet(arch)
    state = read_state_dict(path)
    renamed = _of_torchvision(path, state, encoder)
    file = str(path) if renamed is None else f"{path} (torchvision)"
    return _initialise(encoder, arch, state if renamed is None else renamed, file, bands)


def _load_timm(encoder: Any, arch: str, weights: str, bands: Sequence[str]) -> LoadReport:
    """Initialises the network of timm in an encoder (`encoders.timm_backbone`)."""
    if weights.startswith(("torchvision:", "tfslim:")):
        raise ValueError(
            f"MODEL.weights_encoder {weights!r} is not for {arch}: leave it out for timm's "
            "weights, or set none or a file saved by timm"
        )
    net: nn.Module = encoder.net
    if not weights:
        place, state = encoder.published_state()
        return _initialise(net, arch, state, place, bands)
    path = resolve(weights)
    return _initialise(net, arch, timm_names(read_state_dict(path), net), str(path), bands)


def timm_names(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """A timm classifier's tensors under the names that they have in its network of features.

    timm joins the names of the first two levels there ("stages.0" becomes "stages_0"), or has the
    whole network inside another ("model.blocks"). Names of an encoder saved here begin with "net.".

    Args:
        state: of a classifier, of a network of features, or of an encoder.
        net: the network of features.
    """
    own = net.state_dict().keys()
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        names = (key, key.replace(".", "_", 1), f"model.{key}", key.removeprefix("net."))
        renamed[next((name for name in names if name in own), key)] = value
    return renamed


def _of_torchvision(
    path: Path, state: Mapping[str, Tensor], encoder: nn.Module
) -> dict[str, Tensor] | None:
    """The state with the names used here, if it has torchvision's; otherwise None."""
    renamed = torchvision_encoder(state)
    own = encoder.state_dict().keys()
    if any(path.name.endswith(source.file) for source in TORCHVISION.values()):
        return renamed
    # A MobileNetV2 with torchvision's names may be TF-slim's, whose input normalisation differs.
    recognised = len(own & renamed.keys()) > len(own & state.keys()) and MOBILENET_KEY not in state
    return renamed if recognised else None


def _initialise(
    encoder: nn.Module, arch: str, state: Mapping[str, Tensor], file: str, bands: Sequence[str]
) -> LoadReport:
    """Loads pretrained weights, which may have other input channels.

    Raises:
        ValueError: the file has fewer than half of the encoder's tensors.
    """
    own = encoder.state_dict()
    state = _own_names(own, state)
    wanted = _required(own)
    found = [key for key in wanted if key in state]
    if 0 < 2 * len(found) < len(wanted):
        path = file.removesuffix(" (torchvision)").removesuffix(" (TF-slim)")
        names = f", or to 'torchvision:{path}' or 'tfslim:{path}' if it is under such names"
        raise ValueError(
            f"{file} does not fit encoder {arch}: {len(found)} of its {len(wanted)} tensors are "
            f"in the file, which has {len(state)}{few(list(state), 2)}; set MODEL.weights_encoder "
            f"to weights of {arch}{'' if arch.startswith('timm:') else names}"
        )
    return load_into(encoder, adapted(state, own, bands), what="encoder", file=file)


def load_decoder(
    decoder: nn.Module, arch: str, weights: str | Path, classes: ClassRows | None = None
) -> LoadReport | None:
    """Loads pretrained weights into a decoder.

    Args:
        decoder: the decoder.
        arch: its name, for example "ppm_deepsup".
        weights: "" or "none": random; "torchvision:NAME": the head of a model in `TORCHVISION`;
            "torchvision:PATH" or "torchvision:URL": the head in such a file; otherwise a path or
            URL.
        classes: correspondence of classes for a path or URL (see `load_into`).

    Returns:
        The report, or None for random weights.

    Raises:
        ValueError: the weights are of another decoder.
        FileNotFoundError: the path does not exist.
        DownloadError: the file could not be downloaded.
    """
    text = str(weights)
    if text.lower() in ("", "none"):
        return None
    what = f"decoder {arch}"
    kind, _, rest = text.partition(":")
    if kind == "torchvision":
        path = fetch_torchvision(rest, decoder=arch)
        file = f"{path} (torchvision)"
        return load_into(
            decoder, torchvision_decoder(read_state_dict(path), file), what=what, file=file
        )
    return load_into(decoder, resolve(text), what=what, classes=classes)


def _only_mobilenet(arch: str, weights: str) -> None:
    if backbone_of(arch) != "mobilenetv2":
        raise ValueError(
            f"{weights!r} is a MobileNetV2 and cannot initialise encoder {arch!r}: set "
            "MODEL.arch_encoder mobilenetv2dilated"
        )
