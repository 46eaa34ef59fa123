"""A trained module made ready to run fast; what is trained and saved stays as it is."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from mit_semseg.errors import one_line
from mit_semseg.lib.nn.transfer import map_tensors
from mit_semseg.models.layers import BatchNormAct2d, replace_modules
from mit_semseg.models.module import SegmentationModule
from mit_semseg.models.winograd import use_winograd

log = logging.getLogger("mit_semseg")
M = TypeVar("M", bound=nn.Module)

# Sizes of the images that show how a network is wired, and that folding changed nothing:
# multiples of every stride.
_WIRING, _PROOF = (64, 64), ((64, 96), (128, 64))
# Largest difference of logits, in standard deviations, that may come from rounding.
_ROUNDING = 1e-3


def inference_copy(
    module: SegmentationModule,
    device: torch.device | str,
    normalize: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> SegmentationModule:
    """A copy of a module for prediction only: faster, with the same results.

    Every BatchNorm that normalises nothing but one convolution becomes part of it, and memory is
    laid out channels last.
    The copy is in evaluation mode and takes no gradients; the module itself is untouched, and so
    are its checkpoints. A network whose results folding would change (custom layers can do
    anything) is left unfolded, with a warning.

    Args:
        module: on any device, in any mode.
        device: where the copy is to compute.
        normalize: what the copy makes of bytes; None takes what the module does.
        dtype: what weights are cast to, once, but for the layers that the encoder keeps in float32
            (`Encoder.fp32_layers`); None: as they are.

    Returns:
        The copy, on `device`. Its `logits` and `forward` with `segSize` are to be used; `encoder`
        and `decoder` have other parameters than the module's.

    Raises:
        ValueError: a layer cannot compute in `dtype`.
    """
    place = torch.device(device)
    # The loss has no use here. On the CPU, where there is memory for the trial of folding.
    fast = SegmentationModule(
        _copied(module.encoder),
        _copied(module.decoder),
        None,
        normalize=copy.deepcopy(module.normalize if normalize is None else normalize),
        mirror_pairs=module.mirror_pairs,
    )
    fast = _folded(fast.eval())
    fast.to(place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype is not None and any(p.dtype != dtype for p in fast.parameters()):
        _cast(fast, dtype)
    if place.type == "cpu":
        use_winograd(fast)
    return fast


def _copied(module: M) -> M:
    """A deep copy on the CPU whose parameters take no gradients."""
    tensors: dict[int, Any] = {}
    for x in module.parameters():
        tensors[id(x)] = nn.Parameter(x.detach().to("cpu", copy=True), requires_grad=False)
    for y in module.buffers():
        tensors[id(y)] = y.detach().to("cpu", copy=True)
    return copy.deepcopy(module, tensors)


@torch.no_grad()
def _cast(module: SegmentationModule, dtype: torch.dtype) -> None:
    """Cast encoder and decoder, but for the encoder's layers that stay in float32.

    Raises:
        ValueError: a trial run fails.
    """
    encoder = module.encoder
    names = getattr(encoder, "fp32_layers", ())  # any module may be the encoder
    exact = {encoder.get_submodule(name): nn.Identity() for name in names}
    replace_modules(encoder, exact)
    encoder.to(dtype)
    module.decoder.to(dtype)
    back: dict[nn.Module, nn.Module] = {}
    for found, place in exact.items():
        layer = found.layer if isinstance(found, _Float32) else found
        back[place] = layer if dtype == torch.float32 else _Float32(layer, dtype)
    replace_modules(encoder, back)
    module.input_dtype = next(encoder.parameters()).dtype
    weight = next(module.parameters())
    try:
        module.logits(_noise(module, _WIRING).to(weight.device))
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise ValueError(
            f"{type(encoder).__name__} with {type(module.decoder).__name__} cannot compute in "
            f"{dtype} ({reason}): set precision fp32, or make tensors in the type of the input"
        ) from error


class _Float32(nn.Module):
    """Computes a layer in float32, and gives its result in another type."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer.float(), dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float()).to(self.dtype)
        return y


@torch.no_grad()
def _folded(module: SegmentationModule) -> SegmentationModule:
    """The module with BatchNorms folded, or as it is where that would not be the same."""
    if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return module
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
    wiring, *proofs = (_noise(module, size).to(weight) for size in (_WIRING, *_PROOF))
    expected = [module.logits(proof) for proof in proofs]
    folded = copy.deepcopy(module)
    fold_batchnorm(folded, lambda: folded.logits(wiring))
    given = [folded.logits(proof) for proof in proofs]
    return folded, max(float((a - b).abs().max() / b.std()) for a, b in zip(given, expected))


def _noise(module: SegmentationModule, size: tuple[int, int]) -> Tensor:
    """(1, channels, *size) normally distributed values, the same for one size."""
    channels = getattr(module.encoder, "in_channels", 3)
    size = getattr(module.encoder, "fixed_size", None) or size
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


@torch.no_grad()
def fold_batchnorm(module: nn.Module, run: Callable[[], Any]) -> int:
    """Make BatchNorms part of the convolutions before them, in place.

    Which belong together is seen while the module runs: a convolution is changed only when its
    output is read by one BatchNorm and by nothing else.

    Args:
        module: in evaluation mode.
        run: runs it once.

    Returns:
        How many BatchNorms are gone.

    Raises:
        ValueError: the module is in training mode, where the statistics are the batch's.
    """
    if module.training:
        raise ValueError("the module is in training mode; call module.eval() before folding")
    pairs = _Wiring(module).pairs(run)
    for conv, norm in pairs.items():
        _fold(conv, norm)
    replace_modules(module, {norm: _without_norm(norm) for norm in pairs.values()})
    return len(pairs)


def _without_norm(norm: _BatchNorm) -> nn.Module:
    """What a BatchNorm does beside normalising."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


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
