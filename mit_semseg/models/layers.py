"""Layers shared by encoders and decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm1d
from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d

M = TypeVar("M", bound=nn.Module)
Norm = SynchronizedBatchNorm1d | BatchNorm2d


class PooledBatchNorm2d(BatchNorm2d):
    """BatchNorm that also accepts a single value per channel, as after 1x1 pooling of one sample.

    A single value has no variance. If no other replica or process contributes values, training
    then normalises with the running statistics, as evaluation does, and does not update them.
    """

    def forward(self, input: Tensor) -> Tensor:
        B, _, H, W = input.shape
        alone = self._replica is None and self._live_group() is None
        if self.training and B * H * W == 1 and alone:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


class BatchNormAct2d(BatchNorm2d):
    """BatchNorm, dropout and activation in one module, as in timm, under BatchNorm's names.

    Attributes:
        drop: dropout, or `nn.Identity`.
        act: the activation, or `nn.Identity`.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        x: Tensor = self.act(self.drop(super().forward(input)))
        return x


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_bn_relu(
    n_in: int,
    n_out: int,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    *,
    eps: float = 1e-5,
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU, with "same" padding: sides are divided by the stride."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(n_in, n_out, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, BatchNorm2d(n_out, eps), nn.ReLU(inplace=True))


def conv_bn(
    n_in: int, n_out: int, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """`conv_bn_relu` without the ReLU."""
    return conv_bn_relu(n_in, n_out, kernel, stride, dilation)[:2]


def synchronized(layer: Any) -> Norm:
    """A BatchNorm over all devices of a training, with the tensors of one of torch or timm."""
    kind: type[Norm] = BatchNorm2d
    if isinstance(layer, nn.BatchNorm1d):
        kind = SynchronizedBatchNorm1d
    elif hasattr(layer, "act"):
        kind = BatchNormAct2d
    size = layer.num_features, layer.eps, layer.momentum
    norm = kind(*size, layer.affine, layer.track_running_stats, device="meta")
    if isinstance(norm, BatchNormAct2d):
        norm.drop, norm.act = layer.drop, layer.act
    return with_tensors_of(layer, norm)


def with_tensors_of(source: nn.Module, module: M) -> M:
    """A module that shares the parameters and buffers of another one, and is in its mode."""
    module._parameters.update(source._parameters)
    module._buffers.update(source._buffers)
    return module.train(source.training)


def replace_modules(module: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace submodules of a module, at any depth: keys of `new` by their values."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
        for value in parent.__dict__.values():  # some call their children by plain lists of them
            if type(value) is list:
                value[:] = [new.get(x, x) if isinstance(x, nn.Module) else x for x in value]


@contextmanager
def with_attributes(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Sets attributes of one object for a while; they are what they were before afterwards."""
    own = module.__dict__
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), bilinear with align_corners=False."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
