"""Encoders of timm, `MODEL.arch_encoder timm:NAME`; timm is imported when one is asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.download import DownloadError
from mit_semseg.errors import one_line
from mit_semseg.models.activation_checkpointing import find_blocks
from mit_semseg.models.depthwise import DepthwiseConv2d, DepthwiseConv2dSame
from mit_semseg.models.encoders.base import Encoder, Variant
from mit_semseg.models.encoders.vit_pyramid import SimplePyramid
from mit_semseg.models.layers import replace_modules, synchronized, with_tensors_of
from mit_semseg.registry import closest

PREFIX = "timm:"
# By default, finer maps are left out, as in most encoders here: they cost more than they add.
FINEST = 4
# Number of maps of a plain vision transformer by default.
BLOCKS = 4
# What timm and torch raise for arguments or images that a network does not take.
_REFUSALS = (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError, IndexError)


class TimmEncoder(Encoder):
    """A network of timm that gives feature maps, with timm's names and initialisation.

    Source: Wightman 2019, "PyTorch Image Models", doi:10.5281/zenodo.4414861; the paper of each
    network is in timm's documentation.

    Images whose sides are not multiples of what the network divides them by are padded with zeros,
    the mean colour, at the right and bottom; what the padding adds to the maps is cut off.

    Deviations:
        - Weights that are not loaded are initialised by timm, and BatchNorm has timm's settings.
        - BatchNorm is synchronised over devices and processes in training, and depthwise
          convolutions on a CPU are computed by `DepthwiseConv2d`. Neither changes results.
    """

    def __init__(
        self,
        name: str,
        channels: Sequence[int],
        strides: Sequence[int],
        multiple: int,
        pyramid: bool = False,
        **options: Any,
    ) -> None:
        """Build it with random weights; `TimmVariant` finds the arguments for a name.

        Args:
            name: as timm knows it, with or without the tag of its weights.
            channels: of the maps.
            strides: of the maps.
            multiple: what sides of images are padded to multiples of.
            pyramid: put a `SimplePyramid` on the last map.
            options: passed on to `timm.create_model`.
        """
        super().__init__()
        self.name, self.options, self.multiple = name, options, multiple
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.net = features(name, **options)
        self.pyramid: SimplePyramid | None = None
        if pyramid:
            self.pyramid = SimplePyramid(
                self.net.feature_info.channels()[-1], self.channels[-1], len(self.channels)
            )
        use_own_layers(self.net)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        H, W = images.shape[-2:]
        down, right = -H % self.multiple, -W % self.multiple
        if down or right:
            images = F.pad(images, (0, right, 0, down))
        maps = channels_first(self.net, images)
        if self.pyramid is not None:
            maps = self.pyramid(maps[-1])
        if down or right:
            maps = [x[..., : -(-H // s), : -(-W // s)] for x, s in zip(maps, self.strides)]
        return maps

    def checkpoint_blocks(self) -> list[nn.Module]:
        """The blocks of timm's network, without the layers of the pyramid."""
        return list(find_blocks(self.net))

    def published_state(self) -> tuple[str, dict[str, Tensor]]:
        """Where timm's weights of this network are, and they under the names of `net`.

        Raises:
            ValueError: timm publishes none for this name.
            DownloadError: they could not be downloaded.
        """
        timm = load_timm(self.name)
        source = timm.models.get_pretrained_cfg(self.name)
        if not source.has_weights:
            tagged = timm.list_models(f"{self.name.partition('.')[0]}*", pretrained=True)
            raise ValueError(
                f"timm publishes no weights for {PREFIX}{self.name}: set MODEL.weights_encoder "
                f"none or a file{closest(self.name, tagged)}"
            )
        place = source.hf_hub_id or source.url or source.file
        try:
            twin = features(self.name, pretrained=True, **self.options)
        except OSError as error:  # of urllib, requests and huggingface_hub
            raise DownloadError(
                f"weights of {PREFIX}{self.name} could not be downloaded from {place} "
                f"({one_line(error, 200)})",
                "; set MODEL.weights_encoder none (random) or a file saved by timm",
            ) from error
        return f"{place} (timm)", twin.state_dict()


class TimmVariant(Variant):
    """What a network of timm emits, found out on torch's meta device, without weights.

    Args:
        name: as timm knows it.
        output_stride: stride of the deepest map, 8, 16 or 32; 0: the network's own.
        out_indices: indices of the maps to emit, as in timm: of stages, or of the blocks of a plain
            vision transformer. Later ones are not built. Empty: all maps of stride 4 or more, or
            four blocks at equal distances, of which the last is one.
        vit_pyramid: of a plain vision transformer, emit a `SimplePyramid` of one block instead.

    Raises:
        ValueError: an unknown name, or a network that cannot be used like this, with the reason.
    """

    def __init__(
        self,
        name: str,
        output_stride: int = 0,
        out_indices: Sequence[int] = (),
        vit_pyramid: bool = False,
    ) -> None:
        timm = load_timm(name)
        check_name(timm, name, f"MODEL.arch_encoder {PREFIX}{name}")
        options = _any_size(timm, name)
        with torch.device("meta"):
            try:
                info = features(name, **options).feature_info
            except _REFUSALS as error:
                raise ValueError(f"{PREFIX}{name} gives no features: {one_line(error)}") from error
        reductions = [part["reduction"] for part in info.info]
        plain = len(set(reductions)) == 1 < len(reductions)
        if vit_pyramid and not plain:
            raise ValueError(
                f"MODEL.vit_pyramid is for plain vision transformers, and the maps of "
                f"{PREFIX}{name} have the strides {reductions}: leave it out"
            )
        wanted = _checked(name, out_indices, reductions, vit_pyramid)
        options["out_indices"] = wanted or _default_maps(reductions, plain, vit_pyramid)
        if wanted and wanted[-1] + 1 < len(reductions):
            options["feature_cls"] = "getter"  # the only one that never builds what follows
        if output_stride and output_stride != max(reductions):
            options["output_stride"] = output_stride
        with torch.device("meta"), torch.no_grad():
            net = _strided(name, output_stride, plain, options)
            channels, strides = net.feature_info.channels(), net.feature_info.reduction()
            multiple = _multiple(name, net, channels, strides)
        if vit_pyramid:
            strides = SimplePyramid.strides(strides[-1])
            channels = [SimplePyramid.WIDTH] * len(strides)
            multiple = max(strides)
        self.kind, self.supported_decoders = TimmEncoder, ()
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.options = {
            "name": name,
            "channels": self.channels,
            "strides": self.strides,
            "multiple": multiple,
            "pyramid": vit_pyramid,
            **options,
        }


timm_variant = lru_cache(maxsize=64)(TimmVariant)


def load_timm(name: str) -> Any:
    """The module timm.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"MODEL.arch_encoder {PREFIX}{name} needs timm: pip install 'mit_semseg[timm]'"
        ) from error


def features(name: str, **options: Any) -> Any:
    """timm's network `name` that gives features."""
    timm = load_timm(name)
    options = {"pretrained": False, **options}
    net = timm.create_model(name, features_only=True, **options)
    if isinstance(net, timm.models.FeatureHookNet):
        # Its hooks collect the maps in one place, which replicas would share.
        net = timm.create_model(name, features_only=True, feature_cls="getter", **options)
    return net


def channels_first(net: Any, images: Tensor) -> list[Tensor]:
    """Maps of a network of timm as (B, C, h, w); some of those with windows have channels last."""
    maps: list[Tensor] = net(images)
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    return maps


def use_own_layers(net: nn.Module) -> None:
    """Replace layers of timm and torch by those used here, with the same names and tensors."""
    layers: Any = importlib.import_module("timm.layers")
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, layers.BatchNormAct2d)
    new: dict[nn.Module, nn.Module] = {}
    for module in net.modules():
        if type(module) in norms:
            new[module] = synchronized(module)
        elif isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            if type(module) is nn.Conv2d:
                new[module] = _depthwise(DepthwiseConv2d, module)
            elif type(module) is layers.Conv2dSame:
                new[module] = _depthwise(DepthwiseConv2dSame, module)
    replace_modules(net, new)


def _depthwise(kind: type[DepthwiseConv2d], conv: nn.Conv2d) -> DepthwiseConv2d:
    options: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "device": "meta",
    }
    size: Any = conv.kernel_size
    return with_tensors_of(conv, kind(conv.in_channels, conv.out_channels, size, **options))


def check_name(timm: Any, name: str, given: str) -> None:
    """Checks that timm has a network, and weights of its tag.

    Args:
        timm: the module.
        name: of the network, with or without the tag of its weights.
        given: the setting and its value, for the error.

    Raises:
        ValueError: it has not.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"{given}: timm {timm.__version__} has no such model"
            f"{closest(architecture, timm.list_models())}"
        )
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        known = timm.list_models(f"{architecture}.*", pretrained=True)
        raise ValueError(
            f"{given}: timm {timm.__version__} has no weights {tag!r} of it; it has "
            f"{', '.join(known) or 'none'}"
        ) from error


def _any_size(timm: Any, name: str) -> dict[str, Any]:
    """Arguments that let a network take images of any size, as far as it has such."""
    with torch.device("meta"):
        kind = type(timm.create_model(name, pretrained=False))
    wanted = {"dynamic_img_size": True, "strict_img_size": False}
    taken = inspect.signature(kind.__init__).parameters
    return {key: value for key, value in wanted.items() if key in taken}


def _checked(
    name: str, out_indices: Sequence[int], reductions: Sequence[int], pyramid: bool
) -> tuple[int, ...]:
    """`MODEL.out_indices`, if the network has these maps."""
    wanted, last = tuple(out_indices), len(reductions) - 1
    if list(wanted) != sorted(set(wanted)) or not all(0 <= i <= last for i in wanted):
        raise ValueError(
            f"MODEL.out_indices is {list(wanted)}; {PREFIX}{name} has the maps 0 to {last}, of "
            f"strides {', '.join(map(str, reductions))}: give some of them in rising order"
        )
    if pyramid and len(wanted) > 1:
        raise ValueError(
            f"MODEL.out_indices is {list(wanted)}; MODEL.vit_pyramid is made of one block: give "
            "it, or () for the last"
        )
    return wanted


def _default_maps(reductions: Sequence[int], plain: bool, pyramid: bool) -> tuple[int, ...]:
    depth = len(reductions)
    if pyramid:
        return (depth - 1,)
    if plain:
        return tuple((i + 1) * depth // BLOCKS - 1 for i in range(BLOCKS) if depth >= BLOCKS)
    fine_enough = [i for i, stride in enumerate(reductions) if stride >= FINEST]
    return tuple(fine_enough or range(depth))


def _strided(name: str, output_stride: int, plain: bool, options: dict[str, Any]) -> Any:
    """The network, whose deepest map has the output stride if one is asked for."""
    if "output_stride" not in options:
        return features(name, **options)
    reason = "is a plain vision transformer: its stride is the side of its patches" if plain else ""
    if not reason:
        try:
            net = features(name, **options)
            found = net.feature_info.reduction()[-1]
            reason = "" if found == output_stride else f"has the stride {found} all the same"
        except _REFUSALS as error:
            reason = f"does not take it ({one_line(error, 100, named=True)})"
    if reason:
        raise ValueError(f"MODEL.output_stride is {output_stride}; {PREFIX}{name} {reason}: set 0")
    return net


def _multiple(name: str, net: Any, channels: Sequence[int], strides: Sequence[int]) -> int:
    """What sides of images must be multiples of for maps as declared.

    Raises:
        ValueError: no such size was found.
    """
    stride = max(strides)
    windows: list[Any] = [getattr(module, "partition_size", 1) for module in net.modules()]
    sides = {max(size) if isinstance(size, (tuple, list)) else int(size) for size in windows}
    reason = ""
    for multiple in (stride * side for side in sorted(sides)):
        H, W = 2 * multiple, 3 * multiple
        try:
            maps = channels_first(net.eval(), torch.zeros(1, 3, H, W))
        except _REFUSALS as error:
            reason = one_line(error, 100)
            continue
        given = [tuple(x.shape[1:]) for x in maps]
        declared = [(c, H // s, W // s) for c, s in zip(channels, strides)]
        if given == declared:
            return multiple
        reason = f"of {H}x{W} pixels it makes {given} and not {declared}"
    size = "x".join(map(str, net.pretrained_cfg.get("input_size", (3, 0, 0))[1:]))
    raise ValueError(
        f"{PREFIX}{name} takes images of its own size only, {size} ({reason}): take another encoder"
    )
