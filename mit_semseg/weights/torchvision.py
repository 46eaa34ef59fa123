"""Conversion of the state dict names of torchvision's models to those used here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# A tensor name that only torchvision's MobileNetV2 has.
MOBILENET_KEY = "features.1.conv.0.0.weight"


def torchvision_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a torchvision model, with the names of the encoders here.

    Args:
        state: state dict of a classification model, or of a segmentation model.

    Returns:
        New mapping, without classifiers; other names are unchanged.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if "classifier" not in k}
        if "0.0.weight" in state:  # MobileNetV3, whose blocks are in `features` here
            state = {f"features.{k}": v for k, v in state.items()}
    if MOBILENET_KEY in state:
        return rename_torchvision_mobilenet(state)
    # The published DenseNets have the older name denselayer1.norm.1 instead of denselayer1.norm1.
    dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
    heads = ("classifier.", "fc.")
    return {dotted.sub(r"\1\2.", k): v for k, v in state.items() if not k.startswith(heads)}


def torchvision_decoder(state: Mapping[str, Tensor], file: str = "the state") -> dict[str, Tensor]:
    """The head of a torchvision model, with the names of the decoders here.

    The heads of FCN, DeepLabv3 and LR-ASPP are those of `fcn_head*`, `deeplabv3*` and `lraspp`. The
    first two layers of VGG16's classifier become the convolutions `fc6` and `fc7` of `fcn32s`,
    `fcn16s` and `fcn8s`.

    Args:
        state: state dict of the whole model.
        file: its name, for the error.

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
    elif "classifier.low_classifier.weight" in state:
        names = {
            "classifier.cbr": "cbr",
            "classifier.scale.1": "scale.0",
            "classifier.low_classifier": "conv_last_low",
            "classifier.high_classifier": "conv_last",
        }
    names |= {
        "classifier.4": "conv_last",
        "aux_classifier.0": "cbr_deepsup.0",
        "aux_classifier.1": "cbr_deepsup.1",
        "aux_classifier.4": "conv_last_deepsup",
    }
    renamed = {}
    for key, value in state.items():
        for layer, ours in names.items():
            if key.startswith(f"{layer}."):
                renamed[ours + key.removeprefix(layer)] = value
    if "conv_last.weight" not in renamed:
        raise ValueError(f"{file} has no head of torchvision's FCN, DeepLabv3, LR-ASPP or VGG16")
    return renamed


def rename_torchvision_mobilenet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts torchvision's MobileNetV2 names to the published ones, without the classifier.

    Both have the same layers in the same order. Torchvision nests each conv-BN-ReLU6 of a block
    (`conv.0.1` is the first BN), the published encoder numbers layers consecutively (`conv.1`).
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
