"""Named tensors into encoders and decoders, with a report of every one."""

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
from mit_semseg.weights.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INSIDE,
    TORCHVISION,
    backbone_of,
    fetch_imagenet,
    fetch_torchvision,
    resolve,
)
from mit_semseg.weights.tfslim import convert_tfslim_mobilenet
from mit_semseg.weights.torchvision import MOBILENET_KEY, torchvision_decoder, torchvision_encoder

logger = logging.getLogger("mit_semseg")

# Bookkeeping of the published SyncBN, of no use to any other.
_BOOKKEEPING = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        what: which part of the model, e.g. "encoder".
        file: where the tensors came from.
        matched: loaded.
        missing: in the module and not in the file: left at their initial values.
        unexpected: in the file and not in the module.
        mismatched: tensors for another number of classes: left at initial values.
        by_name: tensors of which the rows of classes with equal names were loaded.
        dropped: bookkeeping of the published SyncBN.
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
            ("left over", self.unexpected),
            ("skipped, another number of classes", self.mismatched),
        ):
            parts.append(f"{len(names)} {label}{few(names)}")
        if not self.mismatched:
            parts.pop()
        if self.by_name:
            parts.append(f"{len(self.by_name)} by the names of classes{few(self.by_name)}")
        return f"{self.what} from {self.file}: {', '.join(parts)}"


def _weighty(own: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that a file has to have: counters of batches may be missing."""
    counters = (*_BOOKKEEPING, "num_batches_tracked")
    return [key for key in own if key.rsplit(".", 1)[-1] not in counters]


def _own_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, without the prefix `model.` where the module's names have none.

    Files of PIDNet and DDRNet, which were trained inside another module, have it.
    """
    names = {key: key.removeprefix("model.") for key in tensors}
    return {names[k] if k not in own and names[k] in own else k: v for k, v in tensors.items()}


@dataclass(frozen=True)
class ClassRows:
    """Which class of a file each class of a module continues.

    Attributes:
        count: classes of the file.
        rows: of each class of the module, its number in the file; None: it is new.
    """

    count: int
    rows: tuple[int | None, ...]

    @classmethod
    def by_name(cls, own: Sequence[str], theirs: Sequence[str]) -> ClassRows:
        """Classes of the same name, whatever its case; of several in the file the first.

        Names that only number classes ("class 3") say nothing.
        """
        numbers = {
            name.casefold(): i
            for i, name in reversed(list(enumerate(theirs)))
            if not re.fullmatch(r"class \d+", name)
        }
        return cls(len(theirs), tuple(numbers.get(name.casefold()) for name in own))

    @property
    def differ(self) -> bool:
        """Whether some continue, and tensors as they are would put them elsewhere."""
        same = len(self.rows) == self.count and all(
            row in (i, None) for i, row in enumerate(self.rows)
        )
        return not same and any(row is not None for row in self.rows)

    def fit(self, own: Tensor, value: Tensor, axes: Sequence[int]) -> bool:
        """Whether classes lie along these axes of the module's and of the file's tensor."""
        kept = [i for i in range(own.ndim) if i not in axes]
        return (
            own.ndim == value.ndim
            and all(own.shape[i] == len(self.rows) and value.shape[i] == self.count for i in axes)
            and all(own.shape[i] == value.shape[i] for i in kept)
        )

    def take(self, own: Tensor, value: Tensor, axes: Sequence[int]) -> Tensor:
        """The module's tensor, with what classes continue taken from the file's."""
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
    """Names of the tensors that would fit if the module told another number of classes apart."""
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
    """Loads what fits and says what matched, what was missing and what was left over.

    What is for another number of classes (see `Decoder.class_tensors`) is skipped; every other
    difference of shape is an error. Values are cast to the module's dtype. A prefix `model.` of the
    names in the file, which the module's do not have, is dropped.

    Args:
        module: takes the tensors; stays on its device.
        source: a weight file, or a mapping of names to tensors.
        what: which part of the model, for the report, e.g. "encoder".
        file: name to report when `source` is a mapping.
        strict: a missing tensor or another number of classes is an error.
        classes: which rows of a classifier are loaded into which; None: all or none.

    Returns:
        What became of every tensor; its one line is logged, or printed without logging set up.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing matches, a shape differs, a value is not finite, or `strict` and a
            tensor is missing.
    """
    tensors = read_state_dict(source, file)
    name = file or (str(source) if not isinstance(source, Mapping) else "the given tensors")
    report = LoadReport(what, name)
    own = module.state_dict()
    tensors = _own_names(own, tensors)
    other_classes = _other_classes(module, tensors)
    fitting: dict[str, Tensor] = {}
    wrong: list[str] = []

    if classes is not None and classes.differ:
        tensors = _with_rows(module, tensors, classes, report)
    for key, value in tensors.items():
        if key.rsplit(".", 1)[-1] in _BOOKKEEPING:
            report.dropped.append(key)
        elif key not in own:
            report.unexpected.append(key)
        elif value.shape == own[key].shape:
            fitting[key] = value
        elif key in other_classes:
            report.mismatched.append(key)
        else:
            wrong.append(f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}")

    if wrong:
        raise ValueError(
            f"{name} does not fit the {what}: {len(wrong)} tensors differ in shape"
            f"{few(wrong, 3)}; check the architecture, MODEL.fc_dim and MODEL.in_channels"
        )
    if not fitting and not report.mismatched:
        raise ValueError(
            f"{name} does not fit the {what}: no tensor name matches; it has{few(list(tensors))}, "
            f"the {what} has{few(list(own))}"
        )
    for key, value in fitting.items():
        if value.is_complex() != own[key].is_complex():
            raise ValueError(f"{name} does not fit the {what}: {key} is of {value.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} is damaged: {key} holds values that are not finite")

    report.matched = list(fitting)
    report.missing = [key for key in _weighty(own) if key not in tensors]
    if strict and not report.ok:
        raise ValueError(f"{report}")
    module.load_state_dict(fitting, strict=False)
    logger.log(logging.INFO if report.ok else logging.WARNING, "%s", report)
    return report


def _with_rows(
    module: nn.Module, tensors: Mapping[str, Tensor], classes: ClassRows, report: LoadReport
) -> dict[str, Tensor]:
    """The tensors, with those of classes as the module has them; the report names these."""
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
) -> LoadReport | None:
    """Initialises an encoder.

    Args:
        encoder: takes the weights.
        arch: its name, e.g. "resnet50dilated".
        weights: "" for the published ImageNet weights of `arch` (downloaded once), "none" for
            random ones, "torchvision:NAME" (see `TORCHVISION`), "torchvision:PATH" or
            "torchvision:URL" for a file under torchvision's names, "tfslim:PATH" (MobileNetV2
            trained by TF-slim, likewise), else a path or url. Torchvision's names are recognised,
            but those of MobileNetV2. Where the encoder reads further image channels and the file
            has three, filters are widened as by `encoders.base.widen_input`.
        mean: what the input is shifted by, RGB in [0, 1]; only "tfslim:" depends on it.
        std: what the input is divided by; only "tfslim:" depends on it.

    Returns:
        The report, or None for random weights.

    Raises:
        ValueError: the weights do not belong to this architecture, or half of them are missing.
        FileNotFoundError: the path does not exist.
        DownloadError: the file could not be downloaded.
    """
    text = str(weights)
    if text.lower() == "none":
        return None
    if arch.startswith("timm:"):
        return _load_timm(encoder, arch, text)
    kind, _, rest = text.partition(":")
    if kind == "torchvision":
        path = fetch_torchvision(rest, encoder=arch)
        state = torchvision_encoder(read_state_dict(path))
        return _initialise(encoder, arch, state, f"{path} (torchvision)")
    if kind == "tfslim":
        _only_mobilenet(arch, text)
        path = resolve(rest)
        state = convert_tfslim_mobilenet(read_state_dict(path), mean=mean, std=std)
        return _initialise(encoder, arch, state, f"{path} (TF-slim)")
    if text == "" and arch.lower() in INSIDE:
        inner, part = INSIDE[arch.lower()]
        return load_encoder(encoder.get_submodule(part), inner, "")
    path = resolve(text) if text else fetch_imagenet(arch)
    state = read_state_dict(path)
    renamed = _of_torchvision(path, state, encoder)
    file = str(path) if renamed is None else f"{path} (torchvision)"
    return _initialise(encoder, arch, state if renamed is None else renamed, file)


def _load_timm(encoder: Any, arch: str, weights: str) -> LoadReport:
    """Initialises the network of timm in an encoder (`encoders.timm_backbone`)."""
    if weights.startswith(("torchvision:", "tfslim:")):
        raise ValueError(
            f"MODEL.weights_encoder {weights!r} is not for {arch}: leave it out for timm's "
            "weights, or set none or a file saved by timm"
        )
    net: nn.Module = encoder.net
    if not weights:
        place, state = encoder.published_state()
        return _initialise(net, arch, state, place)
    path = resolve(weights)
    return _initialise(net, arch, timm_names(read_state_dict(path), net), str(path))


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
    """The state under the names used here, if it has torchvision's."""
    renamed = torchvision_encoder(state)
    own = encoder.state_dict().keys()
    if any(path.name.endswith(source.file) for source in TORCHVISION.values()):
        return renamed
    # A MobileNetV2 under torchvision's names may be TF-slim's, which expects another input.
    told = len(own & renamed.keys()) > len(own & state.keys()) and MOBILENET_KEY not in state
    return renamed if told else None


def _initialise(
    encoder: nn.Module, arch: str, state: Mapping[str, Tensor], file: str
) -> LoadReport:
    """Loads an initialisation, which may have fewer image channels, and may not be mostly missing.

    Raises:
        ValueError: the encoder has at least twice as many tensors as are found in the file.
    """
    own = encoder.state_dict()
    state = _own_names(own, state)
    wanted = _weighty(own)
    found = [key for key in wanted if key in state]
    if 0 < 2 * len(found) < len(wanted):
        path = file.removesuffix(" (torchvision)").removesuffix(" (TF-slim)")
        names = f", or to 'torchvision:{path}' or 'tfslim:{path}' if it is under such names"
        raise ValueError(
            f"{file} does not fit encoder {arch}: it has {len(found)} of its {len(wanted)} tensors"
            f" (it has {len(state)}{few(list(state), 2)}): set MODEL.weights_encoder to weights "
            f"of {arch}{'' if arch.startswith('timm:') else names}"
        )
    fitting = {k: _widened(v, own[k].shape) if k in own else v for k, v in state.items()}
    return load_into(encoder, fitting, what="encoder", file=file)


def _widened(value: Tensor, shape: torch.Size) -> Tensor:
    """Filters of red, green and blue with what an encoder for further image channels adds."""
    further = shape[1] - 3 if len(shape) == 4 else 0
    if further <= 0 or value.shape != (shape[0], 3, *shape[2:]):
        return value
    return torch.cat([value, value.mean(1, keepdim=True).expand(-1, further, -1, -1)], dim=1)


def load_decoder(
    decoder: nn.Module, arch: str, weights: str | Path, classes: ClassRows | None = None
) -> LoadReport | None:
    """Initialises a decoder.

    Args:
        decoder: takes the weights.
        arch: its name, e.g. "ppm_deepsup".
        weights: "" or "none" leaves it random; "torchvision:NAME" takes the head of a model in
            `TORCHVISION`, "torchvision:PATH" or "torchvision:URL" that in a file of one;
            else a path or url.
        classes: which of a path's classes continue as which (see `load_into`).

    Returns:
        The report, or None for random weights.

    Raises:
        ValueError: the weights do not belong to this decoder.
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
            f"{weights!r} holds a MobileNetV2 and cannot initialise encoder {arch!r}; use it "
            f"with mobilenetv2dilated"
        )
