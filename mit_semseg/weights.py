"""Names, paths and urls of weights -> a verified local file -> loaded tensors, with a report."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import struct
import tarfile
import urllib.parse
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.download import DownloadError, fetch
from mit_semseg.registry import closest

logger = logging.getLogger("mit_semseg")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIRROR = "MIT_SEMSEG_MIRROR"

_HOST = "http://sceneparsing.csail.mit.edu/model/"
_ZIP = b"PK\x03\x04"  # how an archive of torch.save begins
# What Python raises on broken archives, by where they are broken. RuntimeError: a flag that was
# flipped claims encryption, or a method of compression nobody knows.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    OverflowError,
)
# What torch.load raises on damaged or foreign files; old ones, without checksums, take it anywhere.
_BROKEN_FILE = (
    *_BROKEN_ZIP,
    pickle.UnpicklingError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
)
# Bookkeeping of the published SyncBN, of no use to any other.
_BOOKKEEPING = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")


# ------------------------------------------------------------------------------- provenance
@dataclass(frozen=True)
class WeightSource:
    """Where ImageNet weights come from and what they expect.

    Attributes:
        file: name in the cache.
        urls: mirrors, in order of preference.
        sha256: digest or its first digits; None where none was published.
        licence: of the weights, as far as their publisher states one.
        paper: of the architecture.
        mean: subtracted from RGB in [0, 1].
        std: divided by.
        data: what they were trained on.
    """

    file: str
    urls: tuple[str, ...]
    sha256: str | None
    licence: str
    paper: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    data: str = "ImageNet-1k classification (ILSVRC 2012)"


def _csail(file: str, paper: str) -> WeightSource:
    url = f"{_HOST}pretrained_resnet/{file}"
    return WeightSource(
        file=file,
        urls=(url,),  # http only: the host's certificate is for another name
        sha256=None,
        licence="BSD-3-Clause (the published toolkit's; none is stated for the file itself)",
        paper=paper,
    )


@dataclass(frozen=True)
class TorchvisionSource(WeightSource):
    """Weights of torchvision, under its names (see `torchvision_encoder`, `torchvision_decoder`).

    Attributes:
        encoder: the backbone that takes them.
        decoders: those that take the head, or some layers of it; empty where it is not used.
    """

    encoder: str = ""
    decoders: tuple[str, ...] = ()

    @property
    def segments(self) -> bool:
        """Whether it is a segmentation model, and not one of ImageNet's classes."""
        return self.data != WeightSource.data


def _torchvision(
    file: str,
    encoder: str,
    paper: str,
    decoders: tuple[str, ...] = (),
    data: str = WeightSource.data,
) -> TorchvisionSource:
    return TorchvisionSource(
        file=file,
        urls=(f"https://download.pytorch.org/models/{file}",),
        sha256=_digest_in_name(file),
        licence="BSD-3-Clause (torchvision's; none is stated for the file itself)",
        paper=paper,
        data=data,
        encoder=encoder,
        decoders=decoders,
    )


def _digest_in_name(name: str) -> str | None:
    """`mobilenet_v2-b0353104.pth` -> `b0353104`, torch hub's convention."""
    match = re.search(r"-([0-9a-f]{8,64})\.(pth|pt|bin)$", name)
    return match[1] if match else None


_RESNET = "He et al. 2016, arXiv:1512.03385"
_VGG = "Simonyan & Zisserman 2015, arXiv:1409.1556"
_DENSENET = "Huang et al. 2017, arXiv:1608.06993"
_FCN = "Long et al. 2015, arXiv:1411.4038"
_DEEPLAB = "Chen et al. 2017, arXiv:1706.05587"
_COCO = "COCO train2017, images with the 20 classes of Pascal VOC; 21 classes with background"
_on_coco = partial(_torchvision, data=_COCO)
_VGG_HEADS = ("fcn32s", "fcn16s", "fcn8s")
_FCN_HEADS = ("fcn_head", "fcn_head_deepsup")
_DEEPLAB_HEADS = ("deeplabv3", "deeplabv3_deepsup")

TORCHVISION: dict[str, TorchvisionSource] = {
    "vgg16": _torchvision("vgg16-397923af.pth", "vgg16", _VGG, _VGG_HEADS),
    "vgg16_bn": _torchvision("vgg16_bn-6c64b313.pth", "vgg16_bn", _VGG, _VGG_HEADS),
    "resnet18": _torchvision("resnet18-f37072fd.pth", "torchvision_resnet18", _RESNET),
    "resnet34": _torchvision("resnet34-b627a593.pth", "resnet34", _RESNET),
    "resnet50": _torchvision("resnet50-0676ba61.pth", "torchvision_resnet50", _RESNET),
    "resnet101": _torchvision("resnet101-63fe2227.pth", "torchvision_resnet101", _RESNET),
    "resnet152": _torchvision("resnet152-394f9c45.pth", "resnet152", _RESNET),
    "resnext50_32x4d": _torchvision(
        "resnext50_32x4d-7cdf4587.pth", "resnext50", "Xie et al. 2017, arXiv:1611.05431"
    ),
    "densenet121": _torchvision("densenet121-a639ec97.pth", "densenet121", _DENSENET),
    "densenet161": _torchvision("densenet161-8d451a50.pth", "densenet161", _DENSENET),
    "densenet169": _torchvision("densenet169-b2777c0a.pth", "densenet169", _DENSENET),
    "densenet201": _torchvision("densenet201-c1103571.pth", "densenet201", _DENSENET),
    "mobilenet_v2": _torchvision(
        "mobilenet_v2-b0353104.pth", "mobilenetv2", "Sandler et al. 2018, arXiv:1801.04381"
    ),
    "mobilenet_v3_large": _torchvision(
        "mobilenet_v3_large-8738ca79.pth",
        "mobilenetv3_large",
        "Howard et al. 2019, arXiv:1905.02244",
    ),
    "fcn_resnet50": _on_coco(
        "fcn_resnet50_coco-1167a1af.pth", "torchvision_resnet50", _FCN, _FCN_HEADS
    ),
    "fcn_resnet101": _on_coco(
        "fcn_resnet101_coco-7ecb50ca.pth", "torchvision_resnet101", _FCN, _FCN_HEADS
    ),
    "deeplabv3_resnet50": _on_coco(
        "deeplabv3_resnet50_coco-cd0a2569.pth", "torchvision_resnet50", _DEEPLAB, _DEEPLAB_HEADS
    ),
    "deeplabv3_resnet101": _on_coco(
        "deeplabv3_resnet101_coco-586e9e4e.pth", "torchvision_resnet101", _DEEPLAB, _DEEPLAB_HEADS
    ),
    "deeplabv3_mobilenet_v3_large": _on_coco(
        "deeplabv3_mobilenet_v3_large-fc3c493d.pth",
        "mobilenetv3_large",
        _DEEPLAB,
        ("deeplabv3_wide_deepsup",),
    ),
}
"""Torchvision's weights by its names, the first of each: `MODEL.weights_encoder torchvision:NAME`.

Those of a segmentation model are for encoder and decoder both, and the encoder has output stride 8
(`torchvision_resnet50dilated`) or, for MobileNetV3, 16 (`mobilenetv3_large_dilated16`). Its 21
classes are those of Pascal VOC in their order, as in the class table of data format voc2012: 0 is
background, then come aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow,
diningtable, dog, horse, motorbike, person, pottedplant, sheep, sofa, train and, 20, tvmonitor.
"""

WEIGHTS: dict[str, WeightSource] = {
    "resnet18": _csail("resnet18-imagenet.pth", "He et al. 2016, arXiv:1512.03385"),
    "resnet50": _csail("resnet50-imagenet.pth", "He et al. 2016, arXiv:1512.03385"),
    "resnet101": _csail("resnet101-imagenet.pth", "He et al. 2016, arXiv:1512.03385"),
    "resnext101": _csail("resnext101-imagenet.pth", "Xie et al. 2017, arXiv:1611.05431"),
    "mobilenetv2": _csail("mobilenet_v2.pth.tar", "Sandler et al. 2018, arXiv:1801.04381"),
    "hrnetv2": _csail("hrnetv2_w48-imagenet.pth", "Wang et al. 2020, arXiv:1908.07919"),
    "drn_c_26": WeightSource(
        file="drn_c_26-ddedf421.pth",
        urls=("http://dl.yf.io/drn/drn_c_26-ddedf421.pth",),
        sha256="ddedf421",
        licence="BSD-3-Clause (the published code's; none is stated for the file itself)",
        paper="Yu et al. 2017, arXiv:1705.09914",
    ),
}
"""Published ImageNet weights by backbone; dilation does not change the weights.

Where the published toolkit has none, they are torchvision's.
"""
for _source in TORCHVISION.values():
    if not _source.segments:
        WEIGHTS.setdefault(_source.encoder, _source)


# Encoders of several branches, one of which is a published backbone: that, and its name in them.
_INSIDE = {
    "bisenet_resnet18": ("resnet18", "context"),
    "icnet_resnet50": ("resnet50", "backbone"),
}


def _backbone(arch: str) -> str:
    """`resnet50dilated`, ... -> `resnet50`; `vgg16_bn_indices` -> `vgg16_bn`."""
    return re.sub(r"(_?dilated(8|16)?|_indices)$", "", arch.lower())


def imagenet_weights(arch: str) -> WeightSource:
    """Where the published ImageNet weights of an encoder are.

    Raises:
        ValueError: none are published for this encoder.
    """
    name = _backbone(arch)
    if name not in WEIGHTS:
        raise ValueError(
            f"no ImageNet weights are published for encoder {arch!r} (they are for "
            f"{', '.join(sorted(WEIGHTS))}): set MODEL.weights_encoder to 'none', a path or a url"
            f"{closest(name, list(WEIGHTS))}"
        )
    return WEIGHTS[name]


def cache_dir() -> Path:
    """Folder of downloaded weights: `checkpoints` under the torch hub folder (TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _mirrored(path: str, urls: Sequence[str]) -> list[str]:
    """The urls, after the user's own mirror where MIT_SEMSEG_MIRROR names its base url."""
    base = os.environ.get(MIRROR, "").rstrip("/")
    return ([f"{base}/{path}"] if base else []) + list(urls)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://", "file://"))


def resolve(source: str | Path) -> Path:
    """Turns an encoder name, a path or a url into a local file, downloading it when needed.

    Args:
        source: a backbone or encoder name (its published ImageNet weights), a url, or a path.

    Returns:
        Path of an existing file.

    Raises:
        FileNotFoundError: the path does not exist; lists the weight files beside it.
        DownloadError: the file could not be downloaded.
    """
    text = str(source)
    if _is_url(text):
        name = urllib.parse.urlsplit(text).path.rsplit("/", 1)[-1] or "weights.pth"
        # Many urls end in the same name (encoder_epoch_20.pth).
        return fetch(
            text,
            cache_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-{name}",
            sha256=_digest_in_name(name),
        )
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if isinstance(source, str) and _backbone(text) in WEIGHTS:
        return _fetch_imagenet(text)
    raise FileNotFoundError(_not_found(path))


def _not_found(path: Path) -> str:
    what = "is a folder, not a weight file" if path.is_dir() else "does not exist"
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    files = sorted(
        f.name for f in folder.iterdir() if f.name.endswith((".pth", ".pt", ".pth.tar", ".bin"))
    )
    shown = ", ".join(files[:20]) + (", ..." if len(files) > 20 else "") if files else "none"
    return f"weight file {path} {what}; weight files in {folder.resolve()}: {shown}"


# ---------------------------------------------------------------------------------- loading
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
        dropped: bookkeeping of the published SyncBN.
    """

    what: str
    file: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
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
            parts.append(f"{len(names)} {label}{_few(names)}")
        if not self.mismatched:
            parts.pop()
        return f"{self.what} from {self.file}: {', '.join(parts)}"


def _few(names: Sequence[str], count: int = 5) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:count])}{', ...' if len(names) > count else ''})"


def _say(line: str, problem: bool) -> None:
    """Logs; prints where nobody has set logging up, since the user is to see it either way."""
    if not logger.hasHandlers():
        print(line)
    elif problem:
        logger.warning(line)
    else:
        logger.info(line)


def check_archive(path: str | Path) -> None:
    """Refuses a damaged archive of `torch.save`, whose checksums `torch.load` does not look at.

    Every record is read once, at the speed of the disk or of CRC-32. Files that are no zip archive
    pass: those of old versions of torch have no checksums, and `torch.load` judges the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the archive is cut short, its structure is broken, or a record's checksum is
            wrong; the file is named.
    """
    head = _head(path)
    # An old file begins with a pickle, and may hold anything that looks like the end of an archive.
    whole = not head.startswith(b"\x80") and zipfile.is_zipfile(path)
    if not whole and head != _ZIP:
        return
    wrong = "cut short: its end is missing"
    if whole:
        try:
            with zipfile.ZipFile(path) as archive:
                wrong = _wrong_record(archive)
        except _BROKEN_ZIP as error:
            wrong = f"{error}"
    if wrong:
        raise ValueError(
            f"{path} is damaged ({wrong}); copy or download it again, or use an earlier checkpoint"
        )


def _head(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(_ZIP))


def _wrong_record(archive: zipfile.ZipFile) -> str:
    """What is wrong with the first bad record of an archive; "" when none is."""
    for record in archive.infolist():
        # Nobody compresses weights, and torch reads by the one size, Python by the other.
        if record.compress_type == zipfile.ZIP_STORED and record.file_size != record.compress_size:
            return f"record {record.filename} has two sizes"
    name = archive.testzip()
    return "" if name is None else f"the checksum of record {name} is wrong"


def load_checked(path: str | Path, map_location: Any = "cpu") -> Any:
    """What `torch.save` wrote: the only way files of weights or states are read here.

    Checksums are compared (`check_archive`), and `weights_only=True` lets the file run no code.

    Args:
        path: the file.
        map_location: where its tensors go, as of `torch.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind, or holds more than tensors and plain values.
    """
    check_archive(path)
    refused = f"{path} cannot be read as weights (damaged, or holding more than tensors): "
    if _head(path) != _ZIP and tarfile.is_tarfile(path):
        # torch before 2.6 ran the code of these, whatever it was told: CVE-2025-32434.
        raise ValueError(f"{refused}a tar archive")
    try:
        with warnings.catch_warnings():  # the error says what torch warns of first
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True)
    except _BROKEN_FILE as error:
        raise ValueError(f"{refused}{_why(error)}") from error


def _why(error: BaseException) -> str:
    """The reason in torch's message, without its advice to run the code of the file."""
    text = str(error)
    if "TorchScript" in text:
        return "a TorchScript archive; save the model's state_dict() instead"
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {named[1]}, which is no tensor; save a state_dict() instead"
    if not text or "weights_only" in text:
        return "no file of torch.save"
    return f"{type(error).__name__}: {text.strip().splitlines()[0][:100]}"


def read_state_dict(source: str | Path | Mapping[str, Any], file: str = "") -> dict[str, Tensor]:
    """The named tensors of a checkpoint, without wrappers and `module.` prefixes.

    Args:
        source: a file, read with `weights_only=True` so that it can run no code, or a mapping.
        file: name to give in errors when `source` is a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds more than tensors, or holds none.
    """
    if isinstance(source, Mapping):
        state: Any = source
        file = file or "the given tensors"
    else:
        path = Path(source)
        file = str(path)
        if not path.is_file():
            raise FileNotFoundError(_not_found(path))
        state = load_checked(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} holds a {type(state).__name__}, not named tensors")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            name = str(key)
            while name.startswith("module."):
                name = name[len("module.") :]
            tensors[name] = value
    if not tensors:
        raise ValueError(f"{file} holds no tensors{_few([str(k) for k in state])}")
    return tensors


def _weighty(own: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that a file has to have: counters of batches may be missing."""
    counters = (*_BOOKKEEPING, "num_batches_tracked")
    return [key for key in own if key.rsplit(".", 1)[-1] not in counters]


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
) -> LoadReport:
    """Loads what fits and says what matched, what was missing and what was left over.

    What is for another number of classes (see `Decoder.class_tensors`) is skipped; every other
    difference of shape is an error. Values are cast to the module's dtype.

    Args:
        module: takes the tensors; stays on its device.
        source: a weight file, or a mapping of names to tensors.
        what: which part of the model, for the report, e.g. "encoder".
        file: name to report when `source` is a mapping.
        strict: a missing tensor or another number of classes is an error.

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
    other_classes = _other_classes(module, tensors)
    fitting: dict[str, Tensor] = {}
    wrong: list[str] = []

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
            f"{_few(wrong, 3)}; check the architecture, MODEL.fc_dim and MODEL.in_channels"
        )
    if not fitting and not report.mismatched:
        raise ValueError(
            f"{name} does not fit the {what}: no tensor name matches; it has{_few(list(tensors))}, "
            f"the {what} has{_few(list(own))}"
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
    _say(str(report), problem=not report.ok)
    return report


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
    kind, _, rest = text.partition(":")
    if kind == "torchvision":
        path = _torchvision_file(rest, encoder=arch)
        state = torchvision_encoder(read_state_dict(path))
        return _start(encoder, arch, state, f"{path} (torchvision)")
    if kind == "tfslim":
        _only_mobilenet(arch, text)
        path = resolve(rest)
        state = convert_tfslim_mobilenet(read_state_dict(path), mean=mean, std=std)
        return _start(encoder, arch, state, f"{path} (TF-slim)")
    if text == "" and arch.lower() in _INSIDE:
        inner, part = _INSIDE[arch.lower()]
        return load_encoder(encoder.get_submodule(part), inner, "")
    path = resolve(text) if text else _fetch_imagenet(arch)
    state = read_state_dict(path)
    renamed = _of_torchvision(path, state, encoder)
    file = str(path) if renamed is None else f"{path} (torchvision)"
    return _start(encoder, arch, state if renamed is None else renamed, file)


def _of_torchvision(
    path: Path, state: Mapping[str, Tensor], encoder: nn.Module
) -> dict[str, Tensor] | None:
    """The state under the names used here, if it has torchvision's."""
    renamed = torchvision_encoder(state)
    own = encoder.state_dict().keys()
    if any(path.name.endswith(source.file) for source in TORCHVISION.values()):
        return renamed
    # A MobileNetV2 under torchvision's names may be TF-slim's, which expects another input.
    told = len(own & renamed.keys()) > len(own & state.keys()) and _MOBILENET not in state
    return renamed if told else None


def _start(encoder: nn.Module, arch: str, state: Mapping[str, Tensor], file: str) -> LoadReport:
    """Loads an initialisation, which may have fewer image channels, and may not be mostly missing.

    Raises:
        ValueError: the encoder has at least twice as many tensors as are found in the file.
    """
    own = encoder.state_dict()
    wanted = _weighty(own)
    found = [key for key in wanted if key in state]
    if 0 < 2 * len(found) < len(wanted):
        path = file.removesuffix(" (torchvision)").removesuffix(" (TF-slim)")
        raise ValueError(
            f"{file} does not fit encoder {arch}: it has {len(found)} of its {len(wanted)} tensors"
            f" (it has {len(state)}{_few(list(state), 2)}): set MODEL.weights_encoder to weights "
            f"of {arch}, or to 'torchvision:{path}' or 'tfslim:{path}' if it is under such names"
        )
    fitting = {k: _widened(v, own[k].shape) if k in own else v for k, v in state.items()}
    return load_into(encoder, fitting, what="encoder", file=file)


def _widened(value: Tensor, shape: torch.Size) -> Tensor:
    """Filters of red, green and blue with what an encoder for further image channels adds."""
    further = shape[1] - 3 if len(shape) == 4 else 0
    if further <= 0 or value.shape != (shape[0], 3, *shape[2:]):
        return value
    return torch.cat([value, value.mean(1, keepdim=True).expand(-1, further, -1, -1)], dim=1)


def load_decoder(decoder: nn.Module, arch: str, weights: str | Path) -> LoadReport | None:
    """Initialises a decoder.

    Args:
        decoder: takes the weights.
        arch: its name, e.g. "ppm_deepsup".
        weights: "" or "none" leaves it random; "torchvision:NAME" takes the head of a model in
            `TORCHVISION`, "torchvision:PATH" or "torchvision:URL" that in a file of one;
            else a path or url.

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
        path = _torchvision_file(rest, decoder=arch)
        file = f"{path} (torchvision)"
        return load_into(
            decoder, torchvision_decoder(read_state_dict(path), file), what=what, file=file
        )
    return load_into(decoder, resolve(text), what=what)


def _fetch_imagenet(arch: str) -> Path:
    known = imagenet_weights(arch)
    try:
        return fetch(
            _mirrored(known.file, known.urls), cache_dir() / known.file, sha256=known.sha256
        )
    except DownloadError as e:
        other = ", 'torchvision:mobilenet_v2'" if _backbone(arch) == "mobilenetv2" else ""
        raise DownloadError(
            e.reason,
            f"{str(e).removeprefix(e.reason)}; or set MODEL.weights_encoder to 'none' (random)"
            f"{other} or a file you have",
        ) from e


# ---------------------------------------------------------------------------- torchvision's names
def _torchvision_file(name: str, *, encoder: str = "", decoder: str = "") -> Path:
    """The file behind "torchvision:NAME", which must hold weights of this encoder or decoder."""
    if _is_url(name) or Path(name).expanduser().exists():
        return resolve(name)
    if name not in TORCHVISION:
        raise ValueError(
            f"unknown weights 'torchvision:{name}' (known: {', '.join(sorted(TORCHVISION))}; "
            f"a file of them as 'torchvision:PATH'){closest(name, list(TORCHVISION))}"
        )
    source = TORCHVISION[name]
    if encoder and _backbone(encoder) != source.encoder:
        raise ValueError(
            f"'torchvision:{name}' cannot initialise encoder {encoder!r}: "
            f"{_other_stem(name, encoder)}set MODEL.arch_encoder to {source.encoder} or a dilated "
            f"form of it"
        )
    if decoder and decoder not in source.decoders:
        fix = "MODEL.weights_decoder to 'none': it holds ImageNet weights"
        if source.segments:
            fix = f"MODEL.arch_decoder to {' or '.join(source.decoders)}"
        raise ValueError(f"'torchvision:{name}' cannot initialise decoder {decoder!r}: set {fix}")
    return fetch(
        _mirrored(source.file, source.urls), cache_dir() / source.file, sha256=source.sha256
    )


def _other_stem(name: str, encoder: str) -> str:
    """Why two ResNets that have nearly the same name are not the same."""
    deep = ("resnet18", "resnet50", "resnet101", "resnext101")
    if not name.startswith("res") or _backbone(encoder) not in deep:
        return ""
    return "torchvision's ResNets begin with one 7x7 convolution, this one with three 3x3; "


_MOBILENET = (
    "features.1.conv.0.0.weight"  # only torchvision's MobileNetV2 has a tensor of this name
)


def torchvision_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a torchvision model, under the names that the encoders here have.

    Args:
        state: of a classification model, or of a segmentation model with a backbone.

    Returns:
        New mapping, without classifiers; a model under other names comes back as it is.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if "classifier" not in k}
        if "0.0.weight" in state:  # MobileNetV3, whose blocks are numbered in `features`
            state = {f"features.{k}": v for k, v in state.items()}
    if _MOBILENET in state:
        return rename_torchvision_mobilenet(state)
    # The published DenseNets are older than their module names: denselayer1.norm.1 is norm1 now.
    dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
    heads = ("classifier.", "fc.")
    return {dotted.sub(r"\1\2.", k): v for k, v in state.items() if not k.startswith(heads)}


def torchvision_decoder(state: Mapping[str, Tensor], file: str = "the state") -> dict[str, Tensor]:
    """The head of a torchvision model, under the names of the decoders here.

    FCN's and DeepLabv3's for `fcn_head*` and `deeplabv3*`; the first two layers of VGG16's
    classifier, as convolutions, for `fcn32s`, `fcn16s` and `fcn8s`.

    Args:
        state: of the whole model.
        file: to name in the error.

    Raises:
        ValueError: there is no such head.
    """
    first = state.get("classifier.0.weight")
    if first is not None and first.ndim == 2 and first.shape[1] % (7 * 7) == 0:  # VGG's
        return {
            "fc6.weight": first.unflatten(1, (-1, 7, 7)),
            "fc6.bias": state["classifier.0.bias"],
            "fc7.weight": state["classifier.3.weight"][:, :, None, None],
            "fc7.bias": state["classifier.3.bias"],
        }
    names = {"classifier.0": "cbr.0", "classifier.1": "cbr.1"}
    if "classifier.0.project.0.weight" in state:
        names = {"classifier.0": "aspp", "classifier.1": "cbr.0", "classifier.2": "cbr.1"}
    names |= {
        "classifier.4": "conv_last",
        "aux_classifier.0": "cbr_deepsup.0",
        "aux_classifier.1": "cbr_deepsup.1",
        "aux_classifier.4": "conv_last_deepsup",
    }
    renamed = {}
    for key, value in state.items():
        layer = ".".join(key.split(".")[:2])
        if layer in names:
            renamed[names[layer] + key.removeprefix(layer)] = value
    if "conv_last.weight" not in renamed:
        raise ValueError(f"{file} holds no head of torchvision's FCN, DeepLabv3 or VGG16")
    return renamed


# ------------------------------------------------------------------- MobileNetV2 from elsewhere
def _only_mobilenet(arch: str, weights: str) -> None:
    if _backbone(arch) != "mobilenetv2":
        raise ValueError(
            f"{weights!r} holds a MobileNetV2 and cannot initialise encoder {arch!r}; use it "
            f"with mobilenetv2dilated"
        )


def rename_torchvision_mobilenet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's MobileNetV2 names -> the published ones; the classifier is left out.

    Both have the same layers in the same order. Torchvision nests each conv-BN-ReLU6 of a block
    (`conv.0.1` is the BN of the first), the published encoder counts them through (`conv.1`).
    """
    nested = re.compile(r"features\.(\d+)\.conv\.(\d+)\.(\d+)\.(\w+)")
    plain = re.compile(r"features\.(\d+)\.conv\.(\d+)\.(\w+)")
    triples: dict[str, int] = {}
    for key in state:
        if m := nested.fullmatch(key):
            triples[m[1]] = max(triples.get(m[1], 0), int(m[2]) + 1)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(("features.18.", "classifier.")):
            continue
        if m := nested.fullmatch(key):
            key = f"features.{m[1]}.conv.{3 * int(m[2]) + int(m[3])}.{m[4]}"
        elif (m := plain.fullmatch(key)) and m[1] in triples:
            key = f"features.{m[1]}.conv.{int(m[2]) + 2 * triples[m[1]]}.{m[3]}"
        renamed[key] = value
    return renamed


def convert_tfslim_mobilenet(
    state: Mapping[str, Tensor],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> dict[str, Tensor]:
    """A TF-slim MobileNetV2 (torchvision's names) -> the published names and input convention.

    TF-slim feeds z = 2x - 1 for RGB x in [0, 1]; this project y = (x - mean) / std, so that
    z = 2 std y + (2 mean - 1). The factor goes into the first convolution and the constant into
    the running mean that follows it. TF-slim's BatchNorm adds 1e-3 to the variance, torch's 1e-5:
    the difference is added to the stored variances. In evaluation mode this is exact wherever
    no zero padding is seen; padding stands for grey there and for the mean colour here. (On even
    sizes TF's "SAME" padding also samples stride-2 convolutions one pixel further on; nothing
    makes up for that, and fine-tuning does not mind.)

    Args:
        state: the tensors.
        mean: (3,) of this project's input.
        std: (3,) likewise.

    Returns:
        New tensors, float32.
    """
    out = rename_torchvision_mobilenet(state)
    first, shift = "features.0.0.weight", "features.0.1.running_mean"
    if first not in out or shift not in out:
        raise ValueError(f"not a MobileNetV2: {first} or {shift} is missing")
    weight = out[first].double()  # (32, 3, 3, 3)
    scale = 2.0 * torch.tensor(list(std), dtype=torch.float64)
    constant = 2.0 * torch.tensor(list(mean), dtype=torch.float64) - 1.0
    out[first] = (weight * scale.view(1, 3, 1, 1)).float()
    out[shift] = (out[shift].double() - (weight.sum((2, 3)) * constant).sum(1)).float()
    for key, value in out.items():
        if key.endswith("running_var"):
            out[key] = (value.double() + (1e-3 - 1e-5)).float()
    return out


# ------------------------------------------------------------------------ published checkpoints
PUBLISHED: dict[str, int] = {
    "ade20k-mobilenetv2dilated-c1_deepsup": 20,
    "ade20k-resnet18dilated-c1_deepsup": 20,
    "ade20k-resnet18dilated-ppm_deepsup": 20,
    "ade20k-resnet50dilated-ppm_deepsup": 20,
    "ade20k-resnet101dilated-ppm_deepsup": 25,
    "ade20k-resnet50-upernet": 30,
    "ade20k-resnet101-upernet": 50,
    "ade20k-hrnetv2-c1": 30,
}
"""Configurations with published ADE20K checkpoints, and the epoch that was scored."""

SAMPLE_IMAGE = (
    "http://sceneparsing.csail.mit.edu/data/ADEChallengeData2016/images/validation/"
    "ADE_val_00001519.jpg"
)


def published_checkpoint(config_name: str) -> tuple[list[str], list[str]]:
    """Urls of the encoder and of the decoder of a published ADE20K model.

    Args:
        config_name: e.g. "ade20k-resnet50dilated-ppm_deepsup".

    Raises:
        ValueError: nothing is published under this name.
    """
    # The recipe's file name is shorter than the published folder's.
    config_name = {"ade20k-hrnetv2": "ade20k-hrnetv2-c1"}.get(config_name, config_name)
    if config_name not in PUBLISHED:
        raise ValueError(
            f"no checkpoint is published for {config_name!r}; there are "
            f"{', '.join(sorted(PUBLISHED))}{closest(config_name, list(PUBLISHED))}"
        )
    urls = []
    for part in ("encoder", "decoder"):
        path = f"{config_name}/{part}_epoch_{PUBLISHED[config_name]}.pth"
        urls.append(_mirrored(path, [f"{_HOST}pytorch/{path}"]))
    return urls[0], urls[1]


def fetch_published(name: str, dest_dir: str | Path, *, image: bool = True) -> list[Path]:
    """Downloads a published ADE20K model, and the sample image, into a folder.

    Args:
        name: e.g. "ade20k-resnet50dilated-ppm_deepsup".
        dest_dir: takes `encoder_epoch_N.pth`, `decoder_epoch_N.pth` and `ADE_val_00001519.jpg`.
        image: fetch the sample image too.

    Returns:
        Paths of the encoder, the decoder and the image.

    Raises:
        ValueError: nothing is published under this name.
        DownloadError: a file could not be downloaded.
    """
    dest = Path(dest_dir)
    paths = []
    for urls in published_checkpoint(name):
        path = fetch(urls, dest / urls[-1].rsplit("/", 1)[-1])
        read_state_dict(path)  # no digest is published: at least a whole file of tensors
        paths.append(path)
    if image:
        paths.append(
            fetch(_mirrored("ADE_val_00001519.jpg", [SAMPLE_IMAGE]), dest / "ADE_val_00001519.jpg")
        )
    return paths
