"""Copies of trained modules that are optimised for prediction."""

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
from mit_semseg.models.lora import merge_adapters
from mit_semseg.models.module import SegmentationModule
from mit_semseg.models.winograd import use_winograd

log = logging.getLogger("mit_semseg")
M = TypeVar("M", bound=nn.Module)

# Sizes of the image that traces the network, and of those that compare the folded network with the
# original; multiples of every stride.
_TRACE_SIZE, _CHECK_SIZES = (64, 64), ((64, 96), (128, 64))
# Largest difference of logits, in standard deviations, that is explained by rounding.
_TOLERANCE = 1e-3


def inference_copy(
    module: SegmentationModule,
    device: torch.device | str,
    normalize: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> SegmentationModule:
    """A copy of a module for prediction: faster, with the same results.

    Adapters (`models.lora`) are merged, a BatchNorm whose only input is the output of one
    convolution is folded into it, and the memory format is channels last. The copy is in
    evaluation mode and has no gradients; the module and its checkpoints are not changed. If
    folding would change the results, as it may with custom layers, the copy is not folded and a
    warning is logged.

    Args:
        module: on any device, in any mode.
        device: device of the copy.
        normalize: replaces the module's normalisation of uint8 images; None: keep it.
        dtype: what weights are cast to, except for the encoder's `fp32_layers`; None: not cast.

    Returns:
        The copy, on `device`, for calls of `logits` and of `forward` with `segSize`. The
        parameters of its `encoder` and `decoder` differ from the module's.

    Raises:
        ValueError: a layer cannot compute in `dtype`.
    """
    fast = folded_copy(module, normalize)
    fast.to(device)
    # Not on Apple GPUs, where convolutions of slices are wrong in this format in some versions of
    # torch (github.com/pytorch/pytorch/issues/180984).
    if torch.device(device).type != "mps":
        fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype is not None and any(p.dtype != dtype for p in fast.parameters()):
        _cast(fast, dtype)
    if torch.device(device).type == "cpu":
        use_winograd(fast)
    return fast


def folded_copy(
    module: SegmentationModule, normalize: nn.Module | None = None
) -> SegmentationModule:
    """The part of `inference_copy` that leaves only layers of torch: on the CPU, without the loss,
    with adapters merged and BatchNorms folded."""
    # On the CPU, where there is enough memory to compare both networks.
    copied = SegmentationModule(
        _copied(module.encoder),
        _copied(module.decoder),
        None,
        normalize=copy.deepcopy(module.normalize if normalize is None else normalize),
        mirror_pairs=module.mirror_pairs,
    )
    merge_adapters(copied)
    return _folded(copied.eval())


def _copied(module: M) -> M:
    """A deep copy on the CPU, whose parameters do not require gradients."""
    tensors: dict[int, Any] = {}
    for x in module.parameters():
        tensors[id(x)] = nn.Parameter(x.detach().to("cpu", copy=True), requires_grad=False)
    for y in module.buffers():
        tensors[id(y)] = y.detach().to("cpu", copy=True)
    return copy.deepcopy(module, tensors)


@torch.no_grad()
def _cast(module: SegmentationModule, dtype: torch.dtype) -> None:
    """Cast encoder and decoder, except for the encoder's `fp32_layers`.

    Raises:
        ValueError: a trial run fails.
    """
    encoder = module.encoder
    names = getattr(encoder, "fp32_layers", ())  # any module can be the encoder
    placeholders = {encoder.get_submodule(name): nn.Identity() for name in names}
    replace_modules(encoder, placeholders)
    encoder.to(dtype)
    module.decoder.to(dtype)
    back: dict[nn.Module, nn.Module] = {}
    for found, placeholder in placeholders.items():
        layer = found.layer if isinstance(found, _Float32) else found
        back[placeholder] = layer if dtype == torch.float32 else _Float32(layer, dtype)
    replace_modules(encoder, back)
    module.input_dtype = next(encoder.parameters()).dtype
    weight = next(module.parameters())
    try:
        module.logits(_noise(module, _TRACE_SIZE).to(weight.device))
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise ValueError(
            f"{type(encoder).__name__} with {type(module.decoder).__name__} cannot compute in "
            f"{dtype} ({reason}): set precision fp32, or create tensors in the dtype of the input"
        ) from error


class _Float32(nn.Module):
    """Runs a layer in float32, and casts its result to another dtype."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer.float(), dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float()).to(self.dtype)
        return y


@torch.no_grad()
def _folded(module: SegmentationModule) -> SegmentationModule:
    """The module with BatchNorms folded, or unchanged if that would change its results."""
    if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return module
    try:
        folded, difference = _fold_and_compare(module)
        if not difference <= _TOLERANCE:
            # Rounding can swap pooling indices of nearly equal values; in float64 it does not.
            difference = _fold_and_compare(copy.deepcopy(module).double())[1]
    except (RuntimeError, ValueError) as error:
        log.warning("BatchNorm is not folded: a trial run of the network failed (%s)", error)
        return module
    if not difference <= _TOLERANCE:
        log.warning(
            "BatchNorm is not folded: it would change the logits by %.2g standard deviations; a "
            "custom layer of this network differs from torch's",
            difference,
        )
        return module
    return folded


def _fold_and_compare(module: SegmentationModule) -> tuple[SegmentationModule, float]:
    """A folded copy, and the difference of its logits in standard deviations."""
    weight = next(module.parameters())
    traced, *images = (_noise(module, size).to(weight) for size in (_TRACE_SIZE, *_CHECK_SIZES))
    expected = [module.logits(image) for image in images]
    folded = copy.deepcopy(module)
    fold_batchnorm(folded, lambda: folded.logits(traced))
    actual = [folded.logits(image) for image in images]
    return folded, max(float((a - b).abs().max() / b.std()) for a, b in zip(actual, expected))


def _noise(module: SegmentationModule, size: tuple[int, int]) -> Tensor:
    """(1, channels, *size) normally distributed values; equal for equal sizes."""
    channels = getattr(module.encoder, "in_channels", 3)
    size = getattr(module.encoder, "fixed_size", None) or size
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


@torch.no_grad()
def fold_batchnorm(module: nn.Module, run: Callable[[], Any]) -> int:
    """Fold BatchNorms into the convolutions before them, in place.

    The pairs are found by tracing one forward pass: a convolution is changed only if one
    BatchNorm, and nothing else, reads its output.

    Args:
        module: in evaluation mode.
        run: runs the module once.

    Returns:
        Number of BatchNorms that were removed.

    Raises:
        ValueError: the module is in training mode, where BatchNorm uses the batch's statistics.
    """
    if module.training:
        raise ValueError("the module is in training mode; call module.eval() before folding")
    pairs = _Tracer(module).pairs(run)
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


class _Tracer(TorchFunctionMode):
    """Records what reads the outputs of convolutions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        # Tensors are kept, because the id of a freed one may be reused.
        self.outputs: dict[int, tuple[Tensor, nn.Conv2d]] = {}
        self.readers: dict[nn.Conv2d, list[_BatchNorm | None]] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.normalizing = False

    def pairs(self, run: Callable[[], Any]) -> dict[nn.Conv2d, _BatchNorm]:
        """Convolutions whose only reader is one BatchNorm, both called once."""
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
        if id(tensor) in self.outputs:
            self.readers[self.outputs[id(tensor)][1]].append(reader)

    def _convolved(self, conv: nn.Conv2d, args: Any, output: Tensor) -> None:
        self.calls[conv] += 1
        self.outputs[id(output)] = (output, conv)
        self.readers.setdefault(conv, [])

    def _enters(self, norm: _BatchNorm, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls[norm] += 1
        self._reads(args[0] if args else kwargs["input"], norm)
        self.normalizing = True

    def _leaves(self, norm: _BatchNorm, args: Any, output: Tensor) -> None:
        self.normalizing = False
