"""What fine-tuning asks of parameters: some stay as they are, others learn more slowly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from mit_semseg.models.activation_checkpointing import find_blocks
from mit_semseg.registry import closest


def freeze(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Take the gradients from parts of a network, in place.

    Args:
        module: the network.
        names: of submodules or parameters in it: `encoder`, `encoder.layer1`, ...

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
            raise ValueError(f"TRAIN.freeze names {name!r}, which the network does not have{near}")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"TRAIN.freeze {list(names)} leaves nothing to train: freeze less")
    return frozen


def layer_scales(
    encoder: nn.Module, decay: float, deeper: Sequence[nn.Module] = ()
) -> dict[nn.Parameter, float]:
    """Factor on the learning rate of every parameter: `decay` once for each block after it.

    The last block and what follows it have the factor 1. The layers before the first block count
    as one, and those between two blocks belong to the later one. This is timm's grouping of vision
    transformers.

    Papers: Clark et al. 2020 (ELECTRA), arXiv:2003.10555; Bao et al. 2022 (BEiT),
    arXiv:2106.08254.

    Args:
        encoder: its blocks are found by `find_blocks`, unless it names them by a method
            `checkpoint_blocks`. They follow each other in the order they are registered in.
        decay: within (0, 1]; 1 gives every parameter the factor 1.
        deeper: layers of a decoder that follow (see `Decoder.encoder_layers`): those with layers of
            their own are blocks.

    Raises:
        ValueError: the encoder has no blocks.
    """
    declared = getattr(encoder, "checkpoint_blocks", None)
    blocks = list(find_blocks(encoder) if declared is None else declared())
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
