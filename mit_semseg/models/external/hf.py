"""Models of transformers (`MODEL.arch hf:NAME`): names and folders, preprocessing, weights."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mit_semseg.errors import one_line
from mit_semseg.models.external.base import (
    Architecture,
    ExternalDecoder,
    ExternalEncoder,
    read_json,
    reading,
)
from mit_semseg.models.external.hf_network import KINDS, TASK, split_network
from mit_semseg.registry import closest

LIBRARY, MODULE, EXTRA = "transformers", "transformers", "hf"
# As on the hub: OWNER/NAME.
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def check(name: str) -> None:
    """Refuses a name that is neither a folder of a model nor OWNER/NAME on the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder / 'config.json'} does not exist: 'hf:{name}' is no folder that "
                "transformers saved (save_pretrained)"
            )
        _kind(name, str(read_json(folder / "config.json").get("model_type")))
    elif not _HUB.fullmatch(name):
        raise FileNotFoundError(
            f"'hf:{name}': no such folder, and no name on huggingface.co, which is OWNER/NAME"
        )


def describe(name: str, weights: bool) -> Architecture:
    """Description of a folder, or of a name on the hub."""
    from transformers import AutoConfig

    check(name)
    with reading(partial(_unreachable, name)):
        config = AutoConfig.from_pretrained(_where(name))
        labels = [config.id2label[i] for i in range(config.num_labels)]
        preprocessing = _preprocessing(name)
    kind = KINDS[_kind(name, config.model_type)]
    if getattr(config, "is_hybrid", False):
        raise ValueError(f"'hf:{name}' is a hybrid DPT, which cannot be used; take one on a ViT")
    values = json.loads(config.to_json_string(use_diff=False))
    if kind.text:
        values[TASK] = _task(name)
    named = labels != [f"LABEL_{i}" for i in range(len(labels))]
    return Architecture(
        f"hf:{name}",
        values,
        len(labels),
        tuple(labels) if named else (),
        **preprocessing,
    )


def network(architecture: Architecture, num_class: int) -> nn.Module:
    """The library's own network for this number of classes, with random weights."""
    kind = _auto(architecture)
    built: nn.Module = kind.from_config(_config(architecture, num_class)).float()
    return built


def pretrained(architecture: Architecture) -> dict[str, Tensor]:
    """Weights of the source, without those that it lacks, such as of a head."""
    name = architecture.source.partition(":")[2]
    config = _config(architecture, architecture.num_class)
    with reading(partial(_unreachable, name)):
        loaded, info = _auto(architecture).from_pretrained(
            _where(name), config=config, output_loading_info=True
        )
    lacking = set(info["missing_keys"])
    return {k: v for k, v in loaded.float().state_dict().items() if k not in lacking}


def with_channels(architecture: Architecture, count: int) -> Architecture:
    """The same for images of so many channels; ValueError if its configuration has no number."""
    config = copy.deepcopy(architecture.config)
    parts = [config, config.get("backbone_config") or {}]
    counted = [part for part in parts if "num_channels" in part]
    if not counted:
        raise ValueError(
            f"MODEL.arch {architecture.source} takes images of three channels only: take another "
            "model, or set MODEL.in_channels 3"
        )
    for part in counted:
        part["num_channels"] = count
    return replace(architecture, config=config)


def split(
    network: nn.Module, architecture: Architecture, num_class: int
) -> tuple[ExternalEncoder, ExternalDecoder]:
    """Encoder and decoder made of the network's modules."""
    return split_network(network, architecture, num_class, partial(_decoder, architecture))


def save(network: nn.Module, architecture: Architecture, folder: Path) -> None:
    """`save_pretrained`, with the preprocessing beside it."""
    model: Any = network
    if architecture.names:
        model.config.id2label = dict(enumerate(architecture.names))
        model.config.label2id = {name: i for i, name in enumerate(architecture.names)}
    model.save_pretrained(folder)
    scale = architecture.value_range / 255
    size: dict[str, int] = {"shortest_edge": architecture.short or 512}
    if architecture.longest:
        size["longest_edge"] = architecture.longest
    values = {
        "image_mean": architecture.mean,
        "image_std": architecture.std,
        "rescale_factor": scale,
        "size": size,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    text = json.dumps(values, indent=2)
    (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def _decoder(architecture: Architecture, num_class: int) -> ExternalDecoder:
    return split(network(architecture, num_class), architecture, num_class)[1]


def _where(name: str) -> str:
    """A folder, or the name on the hub."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _kind(name: str, model_type: str) -> str:
    if model_type not in KINDS:
        raise ValueError(
            f"'hf:{name}' is a {model_type}; models that can be used are "
            f"{', '.join(KINDS)}{closest(model_type, list(KINDS))}"
        )
    return model_type


def _auto(architecture: Architecture) -> Any:
    import transformers

    if KINDS[architecture.config["model_type"]].masks:
        return transformers.AutoModelForUniversalSegmentation
    return transformers.AutoModelForSemanticSegmentation


def _config(architecture: Architecture, num_class: int) -> Any:
    from transformers import AutoConfig

    values = copy.deepcopy(architecture.config)
    values.pop(TASK, None)
    for other in ("dtype", "torch_dtype"):  # weights are float32 here, whatever they are stored in
        values.pop(other, None)
    if KINDS[values["model_type"]].text:
        values["is_training"] = False  # which would need a text for each image
    # JSON has no numbers as keys.
    values["id2label"] = {int(k): v for k, v in values["id2label"].items()}
    config = AutoConfig.for_model(**values)
    if config.num_labels != num_class:
        config.num_labels = num_class
    return config


def _unreachable(name: str, error: Exception) -> str:
    if Path(name).expanduser().is_dir():
        return f"'hf:{name}' cannot be read ({one_line(error, 200, named=True)})"
    reason = one_line(error).partition(". ")[0]
    return (
        f"'hf:{name}' cannot be downloaded ({reason[:160]}): check the name and the network, or "
        f"give a folder: where there is a network, `hf download {name} --local-dir "
        "FOLDER`, then MODEL.arch hf:FOLDER"
    )


def _preprocessing(name: str) -> dict[str, Any]:
    """Settings of the image processor of a source, as fields of `Architecture`."""
    values = _optional_json(name, "preprocessor_config.json")
    if not values:
        values = _optional_json(name, "processor_config.json").get("image_processor", {})
    found: dict[str, Any] = {}
    if values.get("do_rescale", True) is False or values.get("rescale_factor") == 1:
        found["value_range"] = 255.0
    if values.get("do_normalize", True) is False:
        found["mean"], found["std"] = (0.0,) * 3, (1.0,) * 3
    elif "image_mean" in values:
        found["mean"] = tuple(float(x) for x in values["image_mean"])
        found["std"] = tuple(float(x) for x in values["image_std"])
    size = values.get("size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": values.get("max_size")}
    short = size.get("shortest_edge") or min(size.get("height") or 0, size.get("width") or 0)
    if short:
        longest = size.get("longest_edge") or values.get("max_size")
        found |= {"short": int(short), "longest": int(longest or 4 * short)}
    return found


def _optional_json(name: str, file: str) -> dict[str, Any]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return read_json(folder / file) if (folder / file).is_file() else {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return read_json(Path(hf_hub_download(name, file)))
    except EntryNotFoundError:
        return {}


def _task(name: str) -> list[int]:
    """OneFormer's task, semantic segmentation, as its tokenizer encodes it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_where(name))
    except (OSError, ValueError) as error:
        raise OSError(
            f"'hf:{name}' is a OneFormer, whose input includes its task as a text, and its "
            f"tokenizer cannot be read ({one_line(error, 120)})"
        ) from error
    length = _optional_json(name, "config.json").get("task_seq_len", 77)
    words = tokenizer(
        "the task is semantic", padding="max_length", max_length=length, truncation=True
    )
    return [int(i) for i in words["input_ids"]]
