"""Networks of transformers as an encoder, the backbone, and a decoder, the rest of the network.

In the decoder the backbone is replaced by a module that returns the features of the encoder, so
that scores and losses are computed by the library's code.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.losses.mask_classification import MaskClassificationLoss, classes_there
from mit_semseg.models.decoders.base import Auxiliary
from mit_semseg.models.external.base import (
    Architecture,
    ExternalDecoder,
    ExternalEncoder,
    MaskClassifier,
)
from mit_semseg.models.pyramid import without_autocast


@dataclass(frozen=True)
class Kind:
    """A kind of network, by its `model_type`.

    Attributes:
        path: name of the backbone in the network; "": its first layers are the backbone.
        emits: the field of the backbone's output that holds the features.
        masks: it classifies masks (`...ForUniversalSegmentation`), not pixels.
        stride: sides of images must be multiples of it; 0: of the patch size.
        fixed: images must have the size `config.image_size`.
        square: images must be square; the size of the image processor is used.
        text: the task is an input, as a tokenised text.
    """

    path: str
    emits: str = "feature_maps"
    masks: bool = False
    stride: int = 32
    fixed: bool = False
    square: bool = False
    text: bool = False


_PIXELS = "model.pixel_level_module.encoder"
KINDS: dict[str, Kind] = {
    "segformer": Kind("segformer", "hidden_states"),
    "upernet": Kind("backbone"),
    "dpt": Kind("dpt", "hidden_states", stride=0, square=True),
    "beit": Kind("beit", "hidden_states", stride=0, fixed=True),
    "maskformer": Kind(_PIXELS, masks=True),
    "mask2former": Kind(_PIXELS, masks=True),
    "oneformer": Kind(_PIXELS, masks=True, text=True),
    "eomt": Kind("", masks=True, stride=0, fixed=True),
    "eomt_dinov3": Kind("", masks=True, stride=0, fixed=True),
}
# Key in `Architecture.config` of OneFormer's tokenised task.
TASK = "semseg_task"


class Backbone(ExternalEncoder):
    """A backbone of transformers."""

    def __init__(self, net: nn.Module, architecture: Architecture, kind: Kind, config: Any) -> None:
        prefix = f"{kind.path}." if kind.path else ""
        stride = kind.stride or int(config.patch_size)
        side = int(config.image_size) if kind.fixed or kind.square else 0
        if kind.square and architecture.short:
            side = architecture.short // stride * stride
        super().__init__(net, architecture, prefix, stride, (side, side) if side else None)
        self.emits = kind.emits

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Feature maps, or hidden states of all layers."""
        if isinstance(self.net, FirstLayers):
            found: list[Tensor] = self.net(images)
            return found
        options = {"output_hidden_states": True} if self.emits == "hidden_states" else {}
        maps: Sequence[Tensor] = getattr(self.net(images, **options), self.emits)
        return maps


class FirstLayers(nn.Module):
    """The layers of an EoMT before its queries are added."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.embeddings = network.embeddings
        blocks = network.config.num_blocks
        self.layers = nn.ModuleList(network.layers[: len(network.layers) - blocks])
        self.dropout = getattr(network, "dropout", nn.Identity())
        self.rope_embeddings = getattr(network, "rope_embeddings", None)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, tokens, channels), and the rotary embeddings if any, which are random in training."""
        tokens: Tensor = self.dropout(self.embeddings(images))
        if self.rope_embeddings is None:
            for layer in self.layers:
                tokens = layer(tokens)
            return [tokens]
        places = self.rope_embeddings(images.to(tokens.dtype))
        for layer in self.layers:
            tokens = layer(tokens, position_embeddings=places)
        return [tokens, *places]


class _Precomputed(nn.Module):
    """Replaces a module whose output is known."""

    output: Any = None  # set in the copy for a call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    forward_with_filtered_kwargs = forward


class _Skipped(nn.Module):
    """Replaces a layer that was already applied to its input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class Head(ExternalDecoder):
    """A network of transformers that classifies pixels, without its backbone."""

    def __init__(
        self,
        net: Any,
        num_class: int,
        make: Callable[[int], ExternalDecoder],
        kind: Kind,
        task: Sequence[int] = (),
    ) -> None:
        super().__init__(net, num_class, make)
        self.emits, self.path, self.task = kind.emits, kind.path or "embeddings", tuple(task)
        self.has_auxiliary = getattr(net, "auxiliary_head", None) is not None

    @property
    def auxiliary(self) -> tuple[Auxiliary, ...]:  # type: ignore[override]
        """The auxiliary head, if the network has one."""
        if not self.has_auxiliary:
            return ()
        return (Auxiliary(float(self.net.config.auxiliary_loss_weight)),)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """As `Decoder.logits`."""
        net, inputs = self.prepared(features)
        found: list[Tensor] = []
        if self.has_auxiliary:
            head = None  # in evaluation the network would compute it for nothing
            if self.training:
                head = copy.copy(net.auxiliary_head)
                head.forward = partial(_recorded, head, found)
            net = _with_modules(net, {"auxiliary_head": head})
        return (net(**inputs).logits, *found)

    def prepared(self, features: list[Tensor]) -> tuple[Any, dict[str, Any]]:
        """A copy of the network that uses the encoder's feature maps, and its inputs.

        The network itself does not change: several threads may run it, as evaluation on a CPU does.
        """
        images, *maps = features
        if self.path == "backbone":  # scores are resized to the images: keep them at the first map
            images = images[..., : maps[0].shape[-2], : maps[0].shape[-1]]
        inputs: dict[str, Any] = {"pixel_values": images}
        if self.task:
            task = torch.tensor(self.task, device=images.device)
            inputs["task_inputs"] = task.expand(len(images), -1)
        modules: dict[str, nn.Module | None] = {}
        for path, output in self.precomputed(maps).items():
            modules[path] = module = copy.copy(self.net.get_submodule(path))
            module.output = output
        return _with_modules(self.net, modules), inputs

    def precomputed(self, maps: list[Tensor]) -> dict[str, Any]:
        """Name of each replaced module -> its output, from the encoder's feature maps."""
        if self.path == "embeddings":
            places = {"rope_embeddings": tuple(maps[1:])} if len(maps) > 1 else {}
            return {"embeddings": maps[0], **places}
        found = SimpleNamespace(hidden_states=None, feature_maps=None, attentions=None)
        setattr(found, self.emits, tuple(maps))
        return {self.path: found}


class MaskHead(MaskClassifier, Head):
    """A network of transformers that classifies masks, without its backbone.

    The class with the highest score is that of the library's
    `post_process_semantic_segmentation`; the losses are the library's.
    """

    def logits(self, features: list[Tensor]) -> tuple[Any, ...]:
        """Scores, (B, num_class, h, w); in training also the input of the losses."""
        net, inputs = self.prepared(features)
        if not self.training:
            return (self._class_scores(net(**inputs)),)
        calls: list[dict[str, Any]] = []
        signature = inspect.signature(net.get_loss_dict)

        def note(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            calls.append(signature.bind(*args, **kwargs).arguments)
            return {}

        net.get_loss_dict = note  # which is called only if there are labels
        found = net(**inputs, mask_labels=[], class_labels=[])
        with torch.no_grad():
            scores = self._class_scores(found)
        return scores, calls

    def mask_loss(self, predictions: Any, label: Tensor) -> Tensor:
        """As `MaskClassifier.mask_loss`; predictions are arguments of `get_loss_dict`."""
        there = classes_there(label, self.num_class)
        classes = [row.nonzero()[:, 0] for row in there]
        masks = [(one == ids[:, None, None]).float() for one, ids in zip(label, classes)]
        sums = torch.zeros(2, dtype=torch.float32, device=label.device)
        with without_autocast(label.device):
            for call in predictions:
                given = {**_in_float32(call), "mask_labels": masks, "class_labels": classes}
                for name, loss in self.net.get_loss_dict(**given).items():
                    sums = sums + loss * sums.new_tensor(
                        [1.0, 0.0] if "cross_entropy" in name else [0.0, 1.0]
                    )
        return sums

    def counts(self, label: Tensor) -> Tensor:
        """As `MaskClassifier.counts`."""
        config = self.net.config
        queries = getattr(config, "num_queries", None) or config.decoder_config.num_queries
        loss = MaskClassificationLoss(no_object=config.no_object_weight)
        return loss.counts(label, self.num_class, queries)

    def _class_scores(self, found: Any) -> Tensor:
        return self.class_scores(found.class_queries_logits, found.masks_queries_logits)


def _with_modules(net: Any, modules: Mapping[str, nn.Module | None]) -> Any:
    """A shallow copy of a network with some submodules, by their paths, replaced."""
    net = copy.copy(net)
    for path, module in modules.items():
        *parents, name = path.split(".")
        node = net
        for parent in parents:
            child = copy.copy(node._modules[parent])
            node._modules = {**node._modules, parent: child}
            node = child
        node._modules = {**node._modules, name: module}
    return net


def _recorded(head: Any, found: list[Tensor], *args: Any) -> Tensor:
    """The output of a head, which is also appended to a list."""
    found.append(type(head).forward(head, *args))
    return found[-1]


def _in_float32(x: Any) -> Any:
    """All floating tensors in nested dicts and lists, in float32 at least."""
    if isinstance(x, Tensor):
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if isinstance(x, dict):
        return {key: _in_float32(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_in_float32(value) for value in x]
    return x


def split_network(
    network: Any,
    architecture: Architecture,
    num_class: int,
    make: Callable[[int], ExternalDecoder],
) -> tuple[Backbone, Head]:
    """Encoder and decoder made of a network's modules."""
    config = network.config
    kind = KINDS[config.model_type]
    backbone: nn.Module
    if kind.path:
        backbone = network.get_submodule(kind.path)
        network.set_submodule(kind.path, _Precomputed())
    else:
        backbone = FirstLayers(network)
        place = _Precomputed()
        place.num_prefix_tokens = network.embeddings.num_prefix_tokens
        network.embeddings = place
        if backbone.rope_embeddings is not None:
            network.rope_embeddings = _Precomputed()
        for i in range(len(backbone.layers)):
            network.layers[i] = _Skipped()
    task = architecture.config.get(TASK, ())
    head = (MaskHead if kind.masks else Head)(network, num_class, make, kind, task)
    return Backbone(backbone, architecture, kind, config), head
