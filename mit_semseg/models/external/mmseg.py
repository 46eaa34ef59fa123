"""Checkpoints of mmsegmentation (`MODEL.arch mmseg:FILE`), which itself is not needed.

FCN, PSPNet, DeepLabv3, DeepLabv3+ and UPerNet on ResNets of bottlenecks, and SegFormer. The layers
have the names that mmsegmentation gives them, and their numbers and widths are read from the
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models.decoders.base import Auxiliary
from mit_semseg.models.encoders.base import dilate
from mit_semseg.models.encoders.resnet import Bottleneck, stage
from mit_semseg.models.external.base import Architecture, ExternalDecoder, ExternalEncoder
from mit_semseg.models.external.mmseg_heads import HEADS, FCNHead
from mit_semseg.models.external.mmseg_mit import MixTransformer, read_mit
from mit_semseg.weights import read_state_dict
from mit_semseg.weights.archive import few, load_checked, not_found

LIBRARY, MODULE, EXTRA = "mmsegmentation", "torch", ""
# Weight of the auxiliary loss in its configurations.
_AUXILIARY_WEIGHT = 0.4


def check(name: str) -> None:
    """Refuses a file that does not exist."""
    if not Path(name).expanduser().is_file():
        raise FileNotFoundError(f"'mmseg:{name}': {not_found(Path(name).expanduser())}")


def describe(name: str, weights: bool) -> Architecture:
    """Description of the model in a file, and the names of its classes."""
    check(name)
    path = Path(name).expanduser()
    state = read_state_dict(path)
    config = read_shapes(state, name)
    with torch.device("meta"):
        own = MMSegNetwork(config, config["num_class"]).state_dict()
    # The auxiliary head may be of another kind: it is for training only.
    other = [
        key
        for key, value in state.items()
        if key.startswith(("backbone.", "decode_head."))
        and (key not in own or own[key].shape != value.shape)
    ]
    if other:
        raise ValueError(_another(name) + few(other))
    names = _class_names(load_checked(path))
    count = config["num_class"]
    if len(names) != count:
        names = ()
    # The shorter side of ADE20K's test images there, and of Cityscapes'.
    short = 1024 if count == 19 else 512
    return Architecture(f"mmseg:{name}", config, count, names, short=short, longest=2048)


def network(architecture: Architecture, num_class: int) -> nn.Module:
    """The network for this number of classes, with random weights."""
    return MMSegNetwork(architecture.config, num_class)


def pretrained(architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of the file."""
    return read_state_dict(Path(architecture.source.partition(":")[2]).expanduser())


def with_channels(architecture: Architecture, count: int) -> Architecture:
    """Refused.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"MODEL.arch {architecture.source} takes images of three channels only: take another "
        "model, or set MODEL.in_channels 3"
    )


def split(
    network: nn.Module, architecture: Architecture, num_class: int
) -> tuple[ExternalEncoder, ExternalDecoder]:
    """Encoder and decoder made of the network's modules."""
    whole: Any = network
    stride = architecture.config["output_stride"]
    encoder = MMSegEncoder(whole.backbone, architecture, "backbone.", stride)
    del whole.backbone
    return encoder, MMSegDecoder(whole, num_class, partial(_decoder, architecture))


def save(network: nn.Module, architecture: Architecture, folder: Path) -> None:
    """`model.pth`, as mmsegmentation writes it."""
    meta = {"CLASSES": list(architecture.names)} if architecture.names else {}
    torch.save({"meta": meta, "state_dict": network.state_dict()}, folder / "model.pth")


def _decoder(architecture: Architecture, num_class: int) -> ExternalDecoder:
    return split(network(architecture, num_class), architecture, num_class)[1]


def _class_names(saved: Any) -> tuple[str, ...]:
    """Of `meta`, in either layout."""
    meta = saved.get("meta") if isinstance(saved, Mapping) else None
    if not isinstance(meta, Mapping):
        return ()
    names = meta.get("CLASSES") or (meta.get("dataset_meta") or {}).get("classes") or ()
    return tuple(str(name) for name in names)


def _another(name: str) -> str:
    return (
        f"'mmseg:{name}' is another model than FCN, PSPNet, DeepLabv3, DeepLabv3+ and UPerNet on "
        "ResNet-50 or 101, and SegFormer"
    )


def read_shapes(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Configuration of `MMSegNetwork`, from the names and shapes of the tensors in a file.

    Raises:
        ValueError: they are of another model.
    """
    head = next((kind for kind in HEADS if HEADS[kind].sign(state, "decode_head.")), None)
    mit = "backbone.layers.3.0.projection.weight" in state
    resnet = "backbone.layer4.0.conv3.weight" in state
    classifier = state.get("decode_head.conv_seg.weight")
    if head is None or classifier is None or (head == "segformer") != mit or mit == resnet:
        raise ValueError(_another(name))
    auxiliary = "auxiliary_head.conv_seg.weight" in state
    return {
        # Dilation leaves no trace in the weights: it is that of the published configurations.
        **(read_mit(state) if mit else read_resnet(state, 32 if head == "uper" else 8)),
        "head": head,
        "head_options": HEADS[head].options(state, "decode_head."),
        "auxiliary_options": FCNHead.options(state, "auxiliary_head.") if auxiliary else None,
        "num_class": classifier.shape[0],
    }


def read_resnet(state: Mapping[str, Tensor], output_stride: int) -> dict[str, Any]:
    """Configuration of `Backbone`."""
    layers = [f"backbone.layer{i}" for i in (1, 2, 3, 4)]
    deep = "backbone.stem.0.weight" in state
    return {
        "deep_stem": deep,
        "stem": state["backbone.stem.0.weight" if deep else "backbone.conv1.weight"].shape[0],
        "stem_out": state["backbone.layer1.0.conv1.weight"].shape[1],
        "channels": [state[f"{layer}.0.conv3.weight"].shape[0] for layer in layers],
        "depths": [
            len({k.split(".")[2] for k in state if k.startswith(f"{layer}.")}) for layer in layers
        ],
        "output_stride": output_stride,
    }


class MMSegNetwork(nn.Module):
    """A backbone and heads under mmsegmentation's names."""

    def __init__(self, config: Mapping[str, Any], num_class: int) -> None:
        super().__init__()
        channels = config["channels"]
        self.backbone = MixTransformer(config) if "patches" in config else Backbone(config)
        self.decode_head = HEADS[config["head"]](channels, num_class, **config["head_options"])
        options = config["auxiliary_options"]
        self.auxiliary_head = None
        if options is not None:
            self.auxiliary_head = FCNHead(channels[:3], num_class, **options)


class Backbone(nn.Module):
    """`ResNet` and `ResNetV1c`: one 7x7 convolution, or three 3x3, before the stages."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, out, stride = config["stem"], config["stem_out"], config["output_stride"]
        self.deep = bool(config["deep_stem"])
        if self.deep:
            layers: list[nn.Module] = []
            for n_in, n_out, step in ((3, width, 2), (width, width, 1), (width, out, 1)):
                layers += [nn.Conv2d(n_in, n_out, 3, step, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels: Sequence[int] = config["channels"]
        inputs = (out, *channels[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            stage(Bottleneck, n_in, n_out, depth, step)
            for n_in, n_out, depth, step in zip(inputs, channels, config["depths"], (1, 2, 2, 2))
        )
        dilate(self.layer3, 16 // min(16, stride))
        dilate(self.layer4, 32 // stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of all stages."""
        x = self.stem(x) if self.deep else self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class MMSegEncoder(ExternalEncoder):
    """A backbone of mmsegmentation."""

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """The maps of all stages."""
        maps: list[Tensor] = self.net(images)
        return maps


class MMSegDecoder(ExternalDecoder):
    """A decode head of mmsegmentation, and its auxiliary head."""

    @property
    def auxiliary(self) -> tuple[Auxiliary, ...]:  # type: ignore[override]
        """The auxiliary head, if the file has one."""
        return () if self.net.auxiliary_head is None else (Auxiliary(_AUXILIARY_WEIGHT),)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """As `Decoder.logits`."""
        _, *maps = features
        main = self.net.decode_head(maps)
        if not self.training or self.net.auxiliary_head is None:
            return (main,)
        return (main, self.net.auxiliary_head(maps[:3]))
