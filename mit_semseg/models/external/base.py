"""What models of other libraries have in common: a description, and the two halves of a network."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm2d

from mit_semseg.dataset.transforms import Normalize
from mit_semseg.models.decoders.base import Auxiliary, Decoder, crop
from mit_semseg.models.encoders.base import Encoder
from mit_semseg.models.layers import replace_modules, synchronized
from mit_semseg.weights import IMAGENET_MEAN, IMAGENET_STD

FILE = "architecture.json"


@dataclass(frozen=True)
class Architecture:
    """A network of another library, as far as it can be described without its weights.

    Kept as `architecture.json` in the checkpoint folder, so that the folder can be read where the
    source is not.

    Attributes:
        source: `MODEL.arch`.
        config: what the library builds the network from.
        num_class: classes that the source tells apart; 0 where it has no head.
        names: of the classes; empty where the source has none.
        mean, std, color_order, value_range: what its input is normalised with, as in `DATASET`.
        short, longest: sides in pixels that its images are resized to; 0 where it does not say.
    """

    source: str
    config: dict[str, Any] = field(default_factory=dict)
    num_class: int = 0
    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    color_order: str = "RGB"
    value_range: float = 1.0
    short: int = 0
    longest: int = 0

    def normalization(self) -> Normalize:
        """What makes its input of bytes."""
        return Normalize(self.mean, self.std, self.color_order, self.value_range)

    def save(self, folder: Path) -> None:
        """Write `architecture.json`."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Architecture | None:
        """What `save` wrote, None where it wrote nothing.

        Raises:
            ValueError: the file is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        values = read_json(file)
        try:
            lists = {name: tuple(values[name]) for name in ("names", "mean", "std")}
            return cls(**{**values, **lists})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}); copy it from a backup") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it does not.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object; download it again")
    return values


class Library(Protocol):
    """What there is to know of a library; each is a module of this package."""

    LIBRARY: str  # as its users call it
    MODULE: str  # what is imported
    EXTRA: str  # of this package, that installs it

    def check(self, name: str) -> None:
        """Refuses a name that cannot be one, without importing the library.

        Raises:
            ValueError: with the reason.
            FileNotFoundError: it is a path, and there is nothing.
        """

    def describe(self, name: str, weights: bool) -> Architecture:
        """What a name, or a folder, is; `weights`: those of the source will be used.

        Raises:
            ValueError: no model, or none that is known here.
            OSError: it cannot be read or downloaded.
        """

    def network(self, architecture: Architecture, num_class: int) -> nn.Module:
        """The library's own network, with random weights."""

    def pretrained(self, architecture: Architecture) -> dict[str, Tensor]:
        """Weights of the source, under the names of its network.

        Raises:
            OSError: they cannot be read or downloaded.
        """

    def halves(
        self, network: nn.Module, architecture: Architecture, num_class: int
    ) -> tuple[ExternalEncoder, ExternalDecoder]:
        """The network in two, which from now on belongs to these."""

    def save(self, network: nn.Module, architecture: Architecture, folder: Path) -> None:
        """Write a network with weights as the library does."""


class ExternalEncoder(Encoder):
    """The part of a network of another library that turns images into features.

    The first of the features are the images themselves: decoders of other libraries ask for their
    size. The others may be of any shape.

    Attributes:
        architecture: what it is a part of.
        prefix: of the names of its tensors in the library's network; here it is `net.`.
        fixed_size: (height, width) that images must have; None: any multiple of the stride.
    """

    spare_parameters = True  # final norms and mask tokens, which nothing here reads

    def __init__(
        self,
        net: nn.Module,
        architecture: Architecture,
        prefix: str,
        stride: int,
        fixed_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.net = over_devices(net)
        self.architecture, self.prefix = architecture, prefix
        self.channels, self.strides = (), (stride,)
        self.fixed_size = fixed_size

    def normalization(self) -> Normalize:
        """What makes its input of bytes, whatever `DATASET` says."""
        return self.architecture.normalization()

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The images, and all features.

        Raises:
            ValueError: the network does not take images of this size.
        """
        size, (stride,) = (images.shape[-2], images.shape[-1]), self.strides
        if self.fixed_size is not None and size != self.fixed_size:
            fixed = list(self.fixed_size)
            raise ValueError(
                f"{self.architecture.source} takes images of {fixed[0]} x {fixed[1]} only, got "
                f"{size[0]} x {size[1]}: set DATASET.batching crop, DATASET.crop_size {fixed}"
            )
        if size[0] % stride or size[1] % stride:
            raise ValueError(
                f"{self.architecture.source} takes images whose sides are multiples of {stride}, "
                f"got {size[0]} x {size[1]}: set DATASET.padding_constant {stride}"
            )
        return [images, *self.features(images)]

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """What the decoder takes, of images of a size that fits."""
        raise NotImplementedError(f"{type(self).__name__} must implement features")


class ExternalDecoder(Decoder):
    """The rest of such a network.

    Attributes:
        net: the library's network without the encoder's part.
        make: `make(num_class)` -> a decoder for another number of classes.
        further_scores: names of what its classifier scores beside the classes, after these.
    """

    further_scores: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, net: nn.Module, num_class: int, make: Callable[[int], ExternalDecoder]
    ) -> None:
        super().__init__((), num_class=num_class)
        self.net: Any = over_devices(net)  # of the library's own type
        self.make = make

    def with_classes(self, num_class: int) -> ExternalDecoder:
        """A new decoder of this kind for another number of classes."""
        return self.make(num_class)


class MaskClassifier(ExternalDecoder):
    """A decoder that classifies masks, and has a loss of its own.

    The score of a class at a pixel is the log of the sum over the masks of the probability of the
    class times that of the mask. In training, `logits` returns these and what the loss takes.
    """

    trains_scores = False
    further_scores = ("no object",)

    @property
    def auxiliary(self) -> tuple[Auxiliary, ...]:  # type: ignore[override]
        """The loss of matched masks, of all layers."""
        return (Auxiliary(1.0, loss=self.matched, denominator=self.counts),)

    def matched(self, predictions: Any, label: Tensor) -> Tensor:
        """(2,): the means of the losses over queries, and over masks.

        Args:
            predictions: the second of what `logits` returns.
            label: (B, h, w) int64, -1 ignored: in no mask.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement matched")

    def counts(self, label: Tensor) -> Tensor:
        """(2,): what those means divide by, the weights of the queries, and the masks."""
        raise NotImplementedError(f"{type(self).__name__} must implement counts")

    def log_probabilities(
        self,
        features: list[Tensor],
        size: tuple[int, int] | None = None,
        image: tuple[int, int] | None = None,
    ) -> tuple[Any, ...]:
        """As `Decoder.log_probabilities`; in training what the loss takes comes second."""
        if not self.training:
            return super().log_probabilities(features, size, image)
        scores, predictions = self.logits(features)
        with torch.no_grad():
            main = self._scores(crop(scores, image), size, True).log_softmax(dim=1)
        return main, predictions

    @staticmethod
    def scored(classes: Tensor, masks: Tensor) -> Tensor:
        """(B, C, h, w) of class scores (B, Q, C + 1), "no object" last, and masks (B, Q, h, w)."""
        found = classes.softmax(-1)[..., :-1], masks.sigmoid()
        sums = torch.einsum("bqc,bqhw->bchw", *found)
        return sums.clamp(min=torch.finfo(sums.dtype).tiny).log()


def joined(encoder: ExternalEncoder, decoder: ExternalDecoder) -> dict[str, Tensor]:
    """The tensors of both halves under the names of the library's network."""
    mine = {encoder.prefix + _inner(k): v for k, v in encoder.state_dict().items()}
    return mine | {_inner(k): v for k, v in decoder.state_dict().items()}


def parted(
    tensors: dict[str, Tensor], encoder: ExternalEncoder, decoder: ExternalDecoder
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the library's network as those of the halves; `joined` the other way round."""
    own = encoder.state_dict().keys()
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, value in tensors.items():
        inner = f"net.{name.removeprefix(encoder.prefix)}"
        if name.startswith(encoder.prefix) and inner in own:
            first[inner] = value
        else:
            second[f"net.{name}"] = value
    return first, second


def _inner(name: str) -> str:
    return name.removeprefix("net.")


def over_devices(net: nn.Module) -> nn.Module:
    """The network with its BatchNorms over all devices of a training; names and values stay."""
    own: dict[nn.Module, nn.Module] = {
        layer: synchronized(layer)
        for layer in net.modules()
        if type(layer) is BatchNorm2d
        or (isinstance(layer, BatchNorm2d) and hasattr(layer, "act"))  # timm's
    }
    if net in own:
        return own[net]
    replace_modules(net, own)
    return net


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the lines of the hub's client about each of its attempts: an error follows."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
