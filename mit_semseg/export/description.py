"""What is stored in an exported file beside the network: classes, preprocessing and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mit_semseg.config import DataOptions, Options
from mit_semseg.config.options import SETTINGS
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.transforms import fitted_size, round_up

FORMAT = "1"  # of these metadata, under the key that marks files of this toolkit
# Settings that are of no use away from the data and folders of the training.
_LOCAL = {"root_dataset", "list_train", "list_val", "classes", "transform", "checkpoint", "result"}
_SECTIONS = ("DATASET", "VAL", "TEST")


@dataclass(frozen=True, eq=False)
class Description:
    """The metadata of an exported file.

    Attributes:
        classes: names and colours.
        options: `DATASET`, `VAL` and `TEST` of the model; other sections have their defaults.
        raw: the input is normalised float32 (N, C, H, W), and the only output is `scores`.
            Otherwise the input is uint8 RGB (N, H, W, 3), and `labels` come first.
        multiple: height and width have to be multiples of this.
        size: (height, width) of all images; None: any.
        resize: images of `size` are resized in the graph to the first scale of the recipe.
        strides: of the encoder's feature maps.
        pools: a decoder that pools over the whole image, of which a tile shows a part.
        mirror_pairs: pairs of classes that a horizontal flip exchanges.
        architecture: of the network, for readers.
        int8: the network is quantised.
    """

    classes: ClassTable
    options: Options
    raw: bool = False
    multiple: int = 1
    size: tuple[int, int] | None = None
    resize: bool = False
    strides: tuple[int, ...] = (1,)
    pools: bool = False
    mirror_pairs: tuple[tuple[int, int], ...] = ()
    architecture: str = ""
    int8: bool = False

    def data(self) -> DataOptions:
        """`DATASET` with the scales of the recipe's predictions."""
        test = self.options.TEST
        return self.options.DATASET.at_scales(test.imgSizes, test.scales)

    def network_size(self) -> tuple[int, int]:
        """(height, width) of what the network computes for images of `size`."""
        assert self.size is not None
        if not self.resize:
            return self.size
        data, (height, width) = self.data(), self.size
        short, factor = (0, data.scales[0]) if data.scales else (data.imgSizes[0], 1.0)
        fitted = fitted_size(width, height, short, data.imgMaxSize, factor)
        return round_up(fitted[1], self.multiple), round_up(fitted[0], self.multiple)

    def texts(self) -> dict[str, str]:
        """The metadata as texts by name, JSON except for `mit_semseg` and `architecture`."""
        values = {
            "names": list(self.classes.names),
            "colors": self.classes.colors.tolist(),
            "preprocessing": _preprocessing(self.data()),
            "graph": {
                "raw": self.raw,
                "multiple": self.multiple,
                "size": self.size,
                "resize": self.resize,
                "strides": self.strides,
                "pools": self.pools,
                "mirror_pairs": self.mirror_pairs,
                "int8": self.int8,
            },
            "settings": _settings(self.options),
        }
        texts = {name: json.dumps(value) for name, value in values.items()}
        return {"mit_semseg": FORMAT, "architecture": self.architecture, **texts}

    @classmethod
    def read(cls, texts: Mapping[str, str], file: object) -> Description:
        """The description that `texts` wrote.

        Args:
            texts: metadata of a file.
            file: its name, for errors.

        Raises:
            ValueError: the file was not exported by this toolkit, or its metadata are damaged.
        """
        if "mit_semseg" not in texts:
            raise ValueError(
                f"{file} has no class names and preprocessing of this toolkit: export the model "
                "with `mit-semseg export`"
            )
        try:
            graph = json.loads(texts["graph"])
            colors = np.array(json.loads(texts["colors"]), dtype=np.uint8).reshape(-1, 3)
            classes = ClassTable(tuple(json.loads(texts["names"])), colors)
            settings = json.loads(texts["settings"])
            return cls(
                classes=classes,
                options=Options.read(settings),
                raw=bool(graph["raw"]),
                multiple=int(graph["multiple"]),
                size=tuple(graph["size"]) if graph["size"] else None,
                resize=bool(graph["resize"]),
                strides=tuple(graph["strides"]),
                pools=bool(graph["pools"]),
                mirror_pairs=tuple((a, b) for a, b in graph["mirror_pairs"]),
                architecture=texts.get("architecture", ""),
                int8=bool(graph["int8"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: damaged metadata ({error}); export it again") from error


def _preprocessing(data: DataOptions) -> dict[str, Any]:
    """How images become inputs, in words that do not need this toolkit's documentation."""
    return {
        "short_side": list(data.imgSizes),
        "factors_instead": list(data.scales),
        "longest_side": data.imgMaxSize,
        "multiple_of": data.padding_constant,
        "mean": list(data.mean),
        "std": list(data.std),
        "value_range": data.value_range,
        "color_order": data.color_order,
        "bands": list(data.bands),
    }


def _settings(options: Options) -> dict[str, dict[str, Any]]:
    """The settings that a prediction needs and that differ from the defaults, by section."""
    found: dict[str, dict[str, Any]] = {}
    for dotted, setting in SETTINGS.items():
        section, _, name = dotted.rpartition(".")
        value = options[dotted]
        if section in _SECTIONS and name not in _LOCAL and value != setting.default:
            found.setdefault(section, {})[name] = value
    channels = options.MODEL.in_channels
    found["MODEL"] = {
        "in_channels": channels,
        "weights_encoder": "none",
        "weights_decoder": "none",
    }
    return found
