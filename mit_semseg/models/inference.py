"""A trained module made ready to run fast; what is trained and saved stays as it is."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from mit_semseg.lib.nn.transfer import map_tensors
from mit_semseg.models.compilation import compiled_function, compiler_errors
from mit_semseg.models.module import SegmentationModule
from mit_semseg.models.tiles import Sliding, TiledLogits

log = logging.getLogger("mit_semseg")

# Sizes of the images that show how a network is wired, and that folding changed nothing:
# multiples of every stride.
_WIRING, _PROOF = (64, 64), ((64, 96), (128, 64))
# Largest difference of logits, in standard deviations, that may come from rounding.
_ROUNDING = 1e-3


def inference_copy(
    module: SegmentationModule,
    device: torch.device | str,
    normalize: nn.Module | None = None,
    compile: bool = False,
    replay: bool = True,
    tile: str | int = "auto",
    window: Sliding | None = None,
) -> SegmentationModule:
    """A copy of a module for prediction only: faster, with the same results.

    Every BatchNorm that normalises nothing but one convolution becomes part of it, and memory is
    laid out channels last, which convolutions prefer on every device. Under autocast the layers
    that the encoder calls delicate stay in float32. The copy is in evaluation mode and takes no
    gradients; the module itself is untouched, and so are its checkpoints. A network whose results
    folding would change (custom layers can do anything) is left unfolded, with a warning.

    Args:
        module: on any device, in any mode.
        device: where the copy is to compute.
        normalize: what the copy makes of bytes; None takes what the module does.
        compile: compile the network with torch.compile: the first images wait for it.
        replay: with `compile` on a GPU, replay sizes that repeat as CUDA graphs. A graph belongs to
            the thread that recorded it, and every size keeps memory: for few sizes, from one
            thread.
        tile: "auto": the logits of images above 4 million pixels are computed in overlapping tiles
            and blended, and memory stays bounded; a number of pixels: those of images with a
            longer side, in tiles of that side; "off": none. See `models.tiles.TiledLogits`, also
            for what happens when a GPU runs out of memory.
        window: slide this over images of every size, instead of tiles.

    Returns:
        The copy, on `device`. Its `logits`, `predict` and `forward` with `segSize` are to be used;
        `encoder` and `decoder` have other parameters than the module's.

    Raises:
        ValueError: another `tile`.
    """
    place = torch.device(device)
    # The loss has no use here, and compiled functions cannot be copied.
    fast = SegmentationModule(
        copy.deepcopy(module.encoder),
        copy.deepcopy(module.decoder),
        None,
        normalize=copy.deepcopy(module.normalize if normalize is None else normalize),
        mirror_pairs=module.mirror_pairs,
    )
    fast.requires_grad_(False).eval().to(place)
    fast = _folded(fast)
    fast.to(memory_format=torch.channels_last)
    for name in getattr(fast.encoder, "delicate", ()):  # any module may be the encoder
        parent, _, leaf = name.rpartition(".")
        layer = fast.encoder.get_submodule(name)
        setattr(fast.encoder.get_submodule(parent), leaf, _Float32(layer))
    network = _compiled(fast.logits, replay and place.type == "cuda") if compile else None
    fast.logits = TiledLogits(fast, tile, network, window)  # type: ignore[method-assign]
    return fast


class _Float32(nn.Module):
    """Computes a layer in float32, whatever autocast is set to."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = self.layer(x.float())
        return y


def _compiled(logits: Callable[[Tensor], Tensor], replay: bool) -> Callable[..., Tensor]:
    # Not dynamic with graphs: each belongs to one size anyway.
    compiled = (
        compiled_function(logits, mode="reduce-overhead")
        if replay
        else compiled_function(logits, dynamic=True)
    )

    def run(image: Tensor) -> Tensor:
        with compiler_errors():
            result: Tensor = compiled(image)
        # A graph writes its result to the same memory every time.
        return result.clone() if replay else result

    return run


@torch.no_grad()
def _folded(module: SegmentationModule) -> SegmentationModule:
    """The module with BatchNorms folded, or as it is where that would not be the same."""
    try:
        folded, apart = _trial(module)
        if not apart <= _ROUNDING:
            # Pooling indices jump where two values are as good as equal. In float64 they do not.
            apart = _trial(copy.deepcopy(module).double())[1]
    except (RuntimeError, ValueError) as error:
        log.warning("BatchNorm is not folded: a trial run of the network failed (%s)", error)
        return module
    if not apart <= _ROUNDING:
        log.warning(
            "BatchNorm is not folded: it would change the logits by %.2g standard deviations; a "
            "layer of this network does more than torch's own",
            apart,
        )
        return module
    return folded


def _trial(module: SegmentationModule) -> tuple[SegmentationModule, float]:
    """A folded copy, and how far its logits are from the module's, in standard deviations."""
    weight = next(module.parameters())
    channels = getattr(module.encoder, "in_channels", 3)
    generator = torch.Generator().manual_seed(0)

    def image(size: tuple[int, int]) -> Tensor:
        noise = torch.randn(1, channels, *size, generator=generator)
        return noise.to(weight.device, weight.dtype)

    wiring, *proofs = (image(size) for size in (_WIRING, *_PROOF))
    expected = [module.logits(proof) for proof in proofs]
    folded = copy.deepcopy(module)
    fold_batchnorm(folded, lambda: folded.logits(wiring))
    given = [folded.logits(proof) for proof in proofs]
    return folded, max(float((a - b).abs().max() / b.std()) for a, b in zip(given, expected))


@torch.no_grad()
def fold_batchnorm(module: nn.Module, run: Callable[[], Any]) -> int:
    """Make BatchNorms part of the convolutions before them, in place.

    Which belong together is seen while the module runs: a convolution is changed only when its
    output is read by one BatchNorm and by nothing else.

    Args:
        module: in evaluation mode.
        run: runs it once.

    Returns:
        How many BatchNorms became `nn.Identity`.

    Raises:
        ValueError: the module is in training mode, where the statistics are the batch's.
    """
    if module.training:
        raise ValueError("the module is in training mode; call module.eval() before folding")
    pairs = _Wiring(module).pairs(run)
    for conv, norm in pairs.items():
        _fold(conv, norm)
        # The module itself becomes the identity, by whatever name it is reached.
        norm.__class__ = nn.Identity  # type: ignore[assignment]
        norm._parameters.clear()
        norm._buffers.clear()
    return len(pairs)


def _fold(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    """conv <- norm(conv(.)), computed in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.double()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    bias = bias - norm.running_mean.double()
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter((bias * scale + shift).to(conv.weight.dtype), requires_grad=False)


class _Wiring(TorchFunctionMode):
    """Watches what reads the outputs of convolutions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        # Tensors are kept, since a freed one's id may be given to another.
        self.made: dict[int, tuple[Tensor, nn.Conv2d]] = {}
        self.readers: dict[nn.Conv2d, list[_BatchNorm | None]] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.normalizing = False

    def pairs(self, run: Callable[[], Any]) -> dict[nn.Conv2d, _BatchNorm]:
        """Convolutions with the one BatchNorm that reads them, both called once."""
        hooks = []
        for layer in self.module.modules():
            if isinstance(layer, nn.Conv2d) and not is_parametrized(layer):
                hooks.append(layer.register_forward_hook(self._convolved))
            elif isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                hooks.append(layer.register_forward_pre_hook(self._enters, with_kwargs=True))
                hooks.append(layer.register_forward_hook(self._leaves))
        try:
            with self:
                run()
        finally:
            for hook in hooks:
                hook.remove()
        found = {}
        for conv, readers in self.readers.items():
            norm = readers[0] if len(readers) == 1 else None
            if norm is not None and self.calls[conv] == self.calls[norm] == 1:
                found[conv] = norm
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.normalizing:
            map_tensors(lambda tensor: self._reads(tensor, None), [list(args), kwargs])
        return func(*args, **kwargs)

    def _reads(self, tensor: Tensor, reader: _BatchNorm | None) -> None:
        if id(tensor) in self.made:
            self.readers[self.made[id(tensor)][1]].append(reader)

    def _convolved(self, conv: nn.Conv2d, args: Any, output: Tensor) -> None:
        self.calls[conv] += 1
        self.made[id(output)] = (output, conv)
        self.readers.setdefault(conv, [])

    def _enters(self, norm: _BatchNorm, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls[norm] += 1
        self._reads(args[0] if args else kwargs["input"], norm)
        self.normalizing = True

    def _leaves(self, norm: _BatchNorm, args: Any, output: Tensor) -> None:
        self.normalizing = False
