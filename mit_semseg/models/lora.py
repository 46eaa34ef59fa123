"""LoRA: low-rank adapters on linear layers of a pretrained network, by peft.

An adapter adds `alpha / rank * B A` to a weight, with A of `rank` rows, random at first, and B of
`rank` columns, 0 at first. Only A and B are trained. Weights are saved with these sums, under the
names of the network without adapters, and predictions are computed with them: only a training
needs peft.

Paper: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models.layers import replace_modules
from mit_semseg.models.module import SegmentationModule
from mit_semseg.registry import closest


def add_adapters(
    module: SegmentationModule, rank: int, alpha: float, targets: Sequence[str] = ()
) -> list[nn.Module]:
    """Freeze a pretrained encoder and put adapters on its linear layers, in place.

    Layers of the decoder that were pretrained with it (`Decoder.encoder_layers`) are treated like
    the encoder's. What an encoder adds to the network of another library, such as a pyramid, is
    trained as usual.

    Args:
        module: the network.
        rank: of the adapters.
        alpha: their scale, times the rank.
        targets: ends of the names of the layers, as `target_modules` of peft; empty: all linear
            layers inside modules whose names contain `attn` or `attention`.

    Returns:
        The frozen parts, whose BatchNorm has to stay in evaluation mode.

    Raises:
        ValueError: peft is not installed, there are no such layers, or the network reads the
            weight of one without calling it, so that an adapter would have no effect.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"TRAIN.lora_rank {rank} needs peft: pip install 'mit_semseg[lora]'"
        ) from error
    encoder: Any = module.encoder
    parts: list[nn.Module] = [getattr(encoder, "net", encoder), *module.decoder.encoder_layers()]
    linear = [
        [name for name, layer in part.named_modules() if isinstance(layer, nn.Linear)]
        for part in parts
    ]
    every = [name for names in linear for name in names]
    for target in targets:
        if not any(_matches(name, (target,)) for name in every):
            ends = sorted({name.rpartition(".")[2] for name in every})
            raise ValueError(
                f"TRAIN.lora_targets names {target!r}, and {type(encoder).__name__} has no such "
                f"linear layer{closest(target, ends)}"
            )
    if not any(_matches(name, targets) for name in every):
        raise ValueError(
            f"TRAIN.lora_rank is {rank}, and {type(encoder).__name__} has no linear layers of "
            "attention: take a vision transformer, name other layers in TRAIN.lora_targets, or set "
            "TRAIN.lora_rank 0"
        )
    for part, names in zip(parts, linear, strict=True):
        part.requires_grad_(False)
        chosen = [name for name in names if _matches(name, targets)]
        if chosen:
            _let_call(part)
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen)  # type: ignore[arg-type]
            inject_adapter_in_model(config, part)
    _check_called(module)
    return parts


def _matches(name: str, targets: Sequence[str]) -> bool:
    if targets:
        return any(f".{name}".endswith(f".{target}") for target in targets)
    outer, _, own = name.rpartition(".")
    # Numbered ones are of networks that compute the bias of positions.
    return ("attn" in outer or "attention" in outer) and not own.isdigit()


def _let_call(part: nn.Module) -> None:
    """Have timm add biases of queries and values to what it gets by calling a layer."""
    layer: Any
    for layer in part.modules():
        if hasattr(layer, "qkv_bias_separate"):
            layer.qkv_bias_separate = True


@torch.no_grad()
def _check_called(module: SegmentationModule) -> None:
    """Raises a ValueError if the network does not call a layer with an adapter."""
    encoder, training = module.encoder, module.training
    adapted = {layer: name for name, layer in module.named_modules() if _is_adapted(layer)}
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda x, *_: called.add(x)) for layer in adapted]
    side = 2 * math.lcm(*encoder.strides)
    size = encoder.fixed_size or (side, side)
    try:
        image = torch.zeros(1, encoder.in_channels, *size)
        module.eval().logits(image.to(next(module.parameters())))
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    ends = [{adapted[x].rpartition(".")[2] for x in some} for some in (adapted, called)]
    if never := sorted(ends[0] - ends[1]):
        raise ValueError(
            f"{type(encoder).__name__} reads the weights of {', '.join(never)} without calling "
            "these layers, so that adapters have no effect: set TRAIN.lora_targets to others, such "
            f"as {', '.join(sorted(ends[1])) or 'fc1, fc2'}"
        )


def _is_adapted(layer: nn.Module) -> bool:
    """Whether it is a layer of peft's with adapters, found without importing peft."""
    return isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)


@torch.no_grad()
def merge_adapters(module: nn.Module) -> None:
    """Add the adapters to the weights and remove them, in place."""
    adapted: dict[nn.Module, nn.Module] = {}
    for layer in filter(_is_adapted, module.modules()):
        peft_layer: Any = layer
        peft_layer.merge()
        adapted[layer] = peft_layer.get_base_layer()
    replace_modules(module, adapted)


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict with the adapters added to the weights, as of the module without adapters."""
    state: dict[str, Tensor] = module.state_dict()
    if not any(map(_is_adapted, module.modules())):
        return state
    merged = {}
    for key, value in state.items():
        layer, _, own = key.rpartition(".base_layer.")
        if layer and own == "weight":
            adapted: Any = module.get_submodule(layer)
            value = value + adapted.get_delta_weight("default")
        if ".lora_" not in key:
            merged[f"{layer}.{own}" if layer else key] = value
    return merged


def with_adapters(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `merged_state` under the names of a module with adapters, which stay."""
    own = module.state_dict()
    names = {key.replace(".base_layer.", "."): key for key in own}
    kept = {key: value for key, value in own.items() if ".lora_" in key}
    return {names.get(key, key): value for key, value in state.items()} | kept
