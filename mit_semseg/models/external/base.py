"""Base classes of models of other libraries: description, encoder and decoder."""

from __future__ import annotations

import json
import logging
import pickle
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
    """Description of a network of another library, without its weights.

    Saved as `architecture.json` in the checkpoint folder, so that the folder can be read where the
    source is not.

    Attributes:
        source: `MODEL.arch`.
        config: what the library builds the network from.
        num_class: number of classes of the source; 0 if it has no head.
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
        """The normalisation of its uint8 input."""
        return Normalize(self.mean, self.std, self.color_order, self.value_range)

    def save(self, folder: Path) -> None:
        """Write `architecture.json`."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Architecture | None:
        """What `save` wrote; None if there is no file.

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
    """Interface of the modules of this package, one for each library."""

    LIBRARY: str  # its usual name
    MODULE: str  # the module to import
    EXTRA: str  # the extra of this package that installs it

    def check(self, name: str) -> None:
        """Refuses an invalid name, without importing the library.

        Raises:
            ValueError: with the reason.
            FileNotFoundError: it is a path that does not exist.
        """

    def describe(self, name: str, weights: bool) -> Architecture:
        """Description of a name or folder; `weights`: those of the source will be used.

        Raises:
            ValueError: no model, or one that is not supported.
            OSError: it cannot be read or downloaded.
        """

    def network(self, architecture: Architecture, num_class: int) -> nn.Module:
        """The library's own network, with random weights."""

    def pretrained(self, architecture: Architecture) -> dict[str, Tensor]:
        """Weights of the source, under the names of its network.

        Raises:
            OSError: they cannot be read or downloaded.
        """

    def with_channels(self, architecture: Architecture, count: int) -> Architecture:
        """The same for images of so many channels.

        Raises:
            ValueError: it takes three only.
        """

    def split(
        self, network: nn.Module, architecture: Architecture, num_class: int
    ) -> tuple[ExternalEncoder, ExternalDecoder]:
        """Encoder and decoder made of the network's modules; the network is then incomplete."""

    def save(self, network: nn.Module, architecture: Architecture, folder: Path) -> None:
        """Write a network with weights as the library does."""


class ExternalEncoder(Encoder):
    """The backbone of a network of another library.

    The first of its features are the images themselves, as decoders of other libraries read their
    size. The others may have any shape.

    Attributes:
        architecture: description of the whole network.
        prefix: of the names of its tensors in the library's network; here they begin with `net.`.
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
        self.net = synchronize_norms(net)
        self.architecture, self.prefix = architecture, prefix
        self.channels, self.strides = (), (stride,)
        self.fixed_size = fixed_size

    def normalization(self) -> Normalize:
        """The normalisation of its uint8 input, which replaces that of `DATASET`."""
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
        """Features for the decoder, of images of a valid size."""
        raise NotImplementedError(f"{type(self).__name__} must implement features")


class ExternalDecoder(Decoder):
    """The network of another library without its backbone.

    Attributes:
        net: the library's network without the encoder's modules.
        make: `make(num_class)` -> a decoder for another number of classes.
        further_scores: names of what its classifier scores after the classes.
    """

    further_scores: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, net: nn.Module, num_class: int, make: Callable[[int], ExternalDecoder]
    ) -> None:
        super().__init__((), num_class=num_class)
        self.net: Any = synchronize_norms(net)  # of the library's own type
        self.make = make

    def with_classes(self, num_class: int) -> ExternalDecoder:
        """A new decoder of this kind for another number of classes."""
        return self.make(num_class)


class MaskClassifier(ExternalDecoder):
    """A decoder that classifies masks, with its own loss.

    The score of a class at a pixel is the log of the sum over the masks of the probability of the
    class times that of the mask. In training, `logits` returns these and the input of the loss.
    """

    trains_scores = False
    further_scores = ("no object",)

    @property
    def auxiliary(self) -> tuple[Auxiliary, ...]:  # type: ignore[override]
        """The loss of the masks, summed over all layers."""
        return (Auxiliary(1.0, loss=self.mask_loss, denominator=self.counts),)

    def mask_loss(self, predictions: Any, label: Tensor) -> Tensor:
        """(2,): mean of the loss over queries, and mean of the losses over masks.

        Args:
            predictions: the second of what `logits` returns.
            label: (B, h, w) int64; pixels with -1 are in no mask.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement mask_loss")

    def counts(self, label: Tensor) -> Tensor:
        """(2,): denominators of those means: weights of the queries, and number of masks."""
        raise NotImplementedError(f"{type(self).__name__} must implement counts")

    def log_probabilities(
        self,
        features: list[Tensor],
        size: tuple[int, int] | None = None,
        image: tuple[int, int] | None = None,
    ) -> tuple[Any, ...]:
        """As `Decoder.log_probabilities`; in training the input of the loss comes second."""
        if not self.training:
            return super().log_probabilities(features, size, image)
        scores, predictions = self.logits(features)
        with torch.no_grad():
            main = self._scores(crop(scores, image), size, True).log_softmax(dim=1)
        return main, predictions

    @staticmethod
    def class_scores(classes: Tensor, masks: Tensor) -> Tensor:
        """(B, C, h, w) of class scores (B, Q, C + 1), "no object" last, and masks (B, Q, h, w)."""
        found = classes.softmax(-1)[..., :-1], masks.sigmoid()
        sums = torch.einsum("bqc,bqhw->bchw", *found)
        return sums.clamp(min=torch.finfo(sums.dtype).tiny).log()


def merge_tensors(encoder: ExternalEncoder, decoder: ExternalDecoder) -> dict[str, Tensor]:
    """The tensors of encoder and decoder under the names of the library's network."""
    mine = {encoder.prefix + _inner(k): v for k, v in encoder.state_dict().items()}
    return mine | {_inner(k): v for k, v in decoder.state_dict().items()}


def split_tensors(
    tensors: dict[str, Tensor], encoder: ExternalEncoder, decoder: ExternalDecoder
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the library's network as those of encoder and decoder: undoes `merge_tensors`."""
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


def synchronize_norms(net: nn.Module) -> nn.Module:
    """The network with synchronised BatchNorms, under the same names and with the same values."""
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
def reading(message: Callable[[Exception], str]) -> Iterator[None]:
    """Context in which a library reads or downloads a source; its errors become an `OSError`.

    The hub's client does not log its attempts: an error follows.

    Args:
        message: the library's error -> the message of the `OSError`.
    """
    from huggingface_hub import errors
    from safetensors import SafetensorError

    # Missing or damaged files, and configurations that the library or the weights do not fit.
    expected = (OSError, ValueError, TypeError, LookupError, RuntimeError, pickle.UnpicklingError)
    invalid = getattr(errors, "StrictDataclassError", SafetensorError)  # of newer versions
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (*expected, SafetensorError, invalid) as error:
        raise OSError(message(error)) from error
    finally:
        logger.setLevel(before)
