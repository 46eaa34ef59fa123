"""Fine-tuning: frozen parameters, and layer-wise learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from mit_semseg.models.activation_checkpointing import blocks_of
from mit_semseg.registry import closest


def freeze(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Exclude parts of a network from training, in place: their parameters get no gradients.

    Args:
        module: the network.
        names: names of submodules or parameters: `encoder`, `encoder.layer1`, ...

    Returns:
        The submodules, whose BatchNorm has to stay in evaluation mode.

    Raises:
        ValueError: there is no such part, or nothing is left to train.
    """
    parts, parameters = dict(module.named_modules()), dict(module.named_parameters())
    frozen = []
    for name in names:
        if name in parts and name:
            frozen.append(parts[name])
            parts[name].requires_grad_(False)
        elif name in parameters:
            parameters[name].requires_grad_(False)
        else:
            near = closest(name, [part for part in (*parts, *parameters) if part])
            raise ValueError(f"TRAIN.freeze has {name!r}, which is not in the network{near}")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(
            f"TRAIN.freeze {list(names)} freezes all parameters: remove some of these names"
        )
    return frozen


def trainable(module: nn.Module) -> str:
    """A line with the numbers of trainable and of all parameters."""
    parameters = list(module.parameters())
    every = sum(parameter.numel() for parameter in parameters)
    count = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"trainable parameters: {count:,} of {every:,} ({count / every:.2%})"


def layer_scales(
    encoder: nn.Module, decay: float, deeper: Sequence[nn.Module] = ()
) -> dict[nn.Parameter, float]:
    """Factor on the learning rate of every parameter: decay ** (number of later blocks).

    The last block and the layers after it have the factor 1. The layers before the first block form
    a block, and those between two blocks belong to the later one, as in timm's grouping of vision
    transformers.

    Papers: Clark et al. 2020 (ELECTRA), arXiv:2003.10555; Bao et al. 2022 (BEiT),
    arXiv:2106.08254.

    Args:
        encoder: its blocks (`blocks_of`) are in the order in which they are registered.
        decay: in (0, 1].
        deeper: layers of the decoder that continue the encoder (see `Decoder.encoder_layers`);
            those with submodules are blocks.

    Raises:
        ValueError: the encoder has no blocks.
    """
    blocks = blocks_of(encoder)
    blocks += [layer for layer in deeper if next(layer.children(), None) is not None]
    if not blocks and decay != 1:
        raise ValueError(
            f"TRAIN.layer_decay is {decay:g}, and {type(encoder).__name__} has no blocks in a "
            "Sequential or ModuleList: set TRAIN.layer_decay 1"
        )
    inside = {p: block for block in blocks for p in block.parameters()}
    depths: dict[nn.Parameter, int] = {}
    between: list[nn.Parameter] = []
    last, depth = None, 0
    for parameter in itertools.chain(*(part.parameters() for part in (encoder, *deeper))):
        block = inside.get(parameter)
        if block is None and depth:
            between.append(parameter)
            continue
        if block is not last:
            last, depth = block, depth + 1
        depths.update((one, depth) for one in (*between, parameter))
        between = []
    depths.update((one, depth) for one in between)
    return {parameter: decay ** (depth - own) for parameter, own in depths.items()}
