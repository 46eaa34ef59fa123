"""Activation checkpointing: the activations of an encoder's blocks are recomputed in backward.

Only the input of a block is stored. Recomputing has no side effects: running statistics are not
updated again, random numbers are the same, and synchronised BatchNorm reuses the statistics of the
first pass, so replicas and processes do not communicate again.

Paper: Chen et al. 2016, arXiv:1604.06174, sec. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mit_semseg.lib.nn.batchnorm import _SynchronizedBatchNorm
from mit_semseg.lib.nn.sync_function import Statistics
from mit_semseg.lib.nn.transfer import map_tensors
from mit_semseg.models.layers import replace_modules, with_attributes


def checkpoint_activations(encoder: nn.Module) -> list[nn.Module]:
    """Wrap the blocks of an encoder in torch's `CheckpointWrapper`.

    Outputs, gradients, running statistics and state dict names do not change.

    Args:
        encoder: changed in place.

    Returns:
        The blocks.

    Raises:
        ValueError: there are no blocks; in a forward pass: the input of a block was changed in
            place.
    """
    # Imported here, as torch may be built without `distributed`.
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found = blocks_of(encoder)
    if not found:
        raise ValueError(
            f"TRAIN.activation_checkpointing: {type(encoder).__name__} has no blocks in a "
            "Sequential or ModuleList: give it a method checkpoint_blocks() that returns them, or "
            "set TRAIN.activation_checkpointing False"
        )
    wrapped = {unit: checkpoint_wrapper(unit, checkpoint_fn=_checkpointed) for unit in found}
    replace_modules(encoder, wrapped)
    return found


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The blocks that an encoder's method `checkpoint_blocks` returns, or else `find_blocks`."""
    declared = getattr(encoder, "checkpoint_blocks", None)
    return list(find_blocks(encoder) if declared is None else declared())


def find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of an encoder's stages.

    A block is a module with submodules in a Sequential or ModuleList, or a Sequential of layers.
    """
    for child in module.children():
        inner = list(child.children())
        container = isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        of_layers = isinstance(child, nn.Sequential) and any(_is_layer(part) for part in inner)
        if not inner:
            continue
        if of_layers or (not container and isinstance(module, (nn.Sequential, nn.ModuleList))):
            yield child
        else:
            yield from find_blocks(child)


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _checkpointed(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Runs a block with checkpointing."""
    if not torch.is_grad_enabled():
        return block(*inputs, **named)
    if torch.compiler.is_compiling():
        # The compiler traces both passes, and removes the side effects of the second itself.
        return checkpoint(block, *inputs, use_reentrant=False, **named)
    passes = _Passes(block, [*inputs, *named.values()])
    return checkpoint(
        block,
        *inputs,
        **named,
        use_reentrant=False,
        context_fn=lambda: (passes.first(), _Reusable(passes.second)),
    )


class _Passes:
    """State that the recomputing pass of a block needs from its first pass."""

    def __init__(self, block: nn.Module, inputs: Sequence[Any]) -> None:
        self.block = block
        self.inputs: list[Tensor] = []
        map_tensors(self.inputs.append, list(inputs))
        self.versions = [x._version for x in self.inputs]
        self.norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
        self.statistics: dict[nn.Module, list[Statistics]] = {
            m: [] for m in self.norms if isinstance(m, _SynchronizedBatchNorm)
        }

    @contextmanager
    def first(self) -> Iterator[None]:
        """Records the statistics of synchronised layers."""
        with ExitStack() as stack:
            for norm, noted in self.statistics.items():
                stack.enter_context(with_attributes(norm, noted=noted))
            yield
        self._check_inputs()

    @contextmanager
    def second(self) -> Iterator[None]:
        """Reuses the statistics, and updates temporary copies of the running statistics."""
        self._check_inputs()
        with ExitStack() as stack:
            for norm, noted in self.statistics.items():
                stack.enter_context(with_attributes(norm, given=iter(noted)))
            for norm in self.norms:
                stack.enter_context(_scratch_buffers(norm))
            yield

    def _check_inputs(self) -> None:
        if [x._version for x in self.inputs] != self.versions:
            raise ValueError(
                f"TRAIN.activation_checkpointing: the input of a {type(self.block).__name__} is "
                "changed in place, so the block cannot be recomputed: use inplace=False there, "
                "or set TRAIN.activation_checkpointing False"
            )


class _Reusable:
    """A context that can be entered more than once, for repeated backward passes."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.context = self.make()
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


@contextmanager
def _scratch_buffers(module: nn.Module) -> Iterator[None]:
    """Replaces a module's buffers by copies, and restores them afterwards."""
    buffers = dict(module._buffers)
    module._buffers.update({k: None if v is None else v.clone() for k, v in buffers.items()})
    try:
        yield
    finally:
        module._buffers.update(buffers)
