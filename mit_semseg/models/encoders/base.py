"""Base class of encoders: feature maps with declared channels and strides, deepest last."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mit_semseg.dataset.transforms import Normalize
from mit_semseg.registry import DILATED_NAMES, Registry
from mit_semseg.weights.channels import mixed

ENCODERS: Registry[type[Encoder] | Variant] = Registry("encoder", "docs/models.md")


class Encoder(nn.Module):
    """Computes feature maps of images. The class, or a `Variant` of it, declares their shapes.

    Decoders are built from these declarations, and `check_pair` reads them without building the
    encoder.

    Attributes:
        channels: channels of each feature map, deepest last.
        strides: stride of each feature map, in pixels of the image.
        output_strides: values of the constructor's argument `output_stride`; empty: no such
            argument.
        fp32_layers: names of submodules that stay in float32 when prediction uses reduced
            precision, because their rounding would change labels.
        supported_decoders: names of the decoders it works with; empty: all. Set it where some
            maps are not features (pooling indices), or where a decoder that does not read every
            map would leave branches of the encoder untrained.
        fixed_size: (height, width) that images must have, where they must.
        spare_parameters: some of its parameters may have no part in the maps.

    Deviations:
        - BatchNorm has torch's defaults, momentum 0.1 and eps 1e-5, unless stated otherwise. The
          published MIT toolkit has momentum 0.001 (0.1 in HRNet): its running statistics are means
          over about the last 1,000 steps, these over the last 10.
        - Weights that are not loaded are initialised by `init_weights`, with He's normal
          distribution by fan-out, regardless of the authors' initialisation.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    output_strides: ClassVar[tuple[int, ...]] = ()
    fp32_layers: ClassVar[tuple[str, ...]] = ()
    supported_decoders: ClassVar[tuple[str, ...]] = ()
    in_channels: int = 3  # of the images
    fixed_size: tuple[int, int] | None = None
    spare_parameters: ClassVar[bool] = False

    @classmethod
    def strides_at(cls, output_stride: int) -> tuple[int, ...]:
        """Strides of the feature maps if those above `output_stride` are replaced by dilation.

        Raises:
            ValueError: `output_stride` is not one of `output_strides`.
        """
        if output_stride not in cls.output_strides:
            known = ", ".join(map(str, cls.output_strides))
            raise ValueError(f"output_stride is {output_stride}; {cls.__name__} supports {known}")
        return tuple(min(stride, output_stride) for stride in cls.strides)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """All feature maps of (B, 3, H, W) images: (B, channels[i], H/strides[i], W/strides[i])."""
        raise NotImplementedError(f"{type(self).__name__} must implement feature_maps")

    def normalization(self) -> Normalize | None:
        """What makes its input of bytes; None: what `DATASET` says."""
        return None

    def forward(self, images: Tensor, return_feature_maps: bool = False) -> list[Tensor]:
        """Feature maps of a batch of images.

        Args:
            images: (B, 3, H, W) float, normalised as the weights expect.
            return_feature_maps: return all maps, instead of a list of the deepest one only.

        Returns:
            List of (B, C_i, H_i, W_i), deepest last; sides are rounded up.
        """
        features = self.feature_maps(images)
        return features if return_feature_maps else features[-1:]


class Variant:
    """An encoder class with constructor arguments. `ENCODERS` contains variants and classes.

    Like the class, it has `channels` and `strides`, and calling it builds the encoder.

    Attributes:
        kind: the class.
        options: keyword arguments of its constructor; `channels` and `output_stride`, if given,
            determine the declared channels and strides.
    """

    def __init__(self, kind: type[Encoder], **options: Any) -> None:
        self.kind, self.options = kind, options
        self.supported_decoders = kind.supported_decoders
        given: tuple[int, ...] | None = options.get("channels")
        self.channels = kind.channels if given is None else given
        stride = options.get("output_stride")
        self.strides = kind.strides if stride is None else kind.strides_at(stride)

    def __call__(self) -> Encoder:
        """The encoder, with random weights."""
        return self.kind(**self.options)


def register_strides(name: str, kind: type[Encoder], **options: Any) -> None:
    """Register an encoder at each of its output strides, with the suffixes of `DILATED_NAMES`."""
    for stride in kind.output_strides:
        names = [name + suffix for suffix in DILATED_NAMES[stride]]
        ENCODERS.register(*names)(Variant(kind, output_stride=stride, **options))


def collect_outputs(
    layers: Iterable[nn.Module], x: Tensor, out_indices: Container[int]
) -> list[Tensor]:
    """Runs layers one after another; returns the outputs of those at `out_indices`."""
    maps = []
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in out_indices:
            maps.append(x)
    return maps


def dilate(stage: nn.Module, dilation: int) -> None:
    """Replace the stride of a stage by dilation, so that its receptive field stays the same.

    A 3x3 convolution that had the stride gets half the dilation of those after it, because its
    input is not affected by its own stride.

    Args:
        stage: module whose 2D convolutions are changed in place.
        dilation: original stride of the stage divided by its new stride; 1 changes nothing.
    """
    if dilation == 1:
        return
    for conv in stage.modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        strided = conv.stride == (2, 2)
        if strided:
            conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            d = dilation // 2 if strided else dilation
            conv.dilation = conv.padding = (d, d)


def widen_input(encoder: Encoder, in_channels: int, bands: Sequence[str] = ()) -> None:
    """Give every convolution that reads the image other channels, such as depth.

    Args:
        encoder: changed in place.
        in_channels: channels of the image; 3 changes nothing.
        bands: their names, by which filters are chosen (see `weights.channels.mixture`).

    Raises:
        ValueError: no convolution has three channels.
    """
    readers = [m for m in encoder.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    if in_channels != 3 and not readers:
        raise ValueError(
            f"MODEL.in_channels is {in_channels}, and {type(encoder).__name__} has no convolution "
            "that reads the image: take another encoder, or set MODEL.in_channels 3"
        )
    for conv in readers:
        if in_channels != 3:
            conv.weight = nn.Parameter(mixed(conv.weight.data, in_channels, bands))
            conv.in_channels = in_channels
    encoder.in_channels = in_channels


def init_weights(encoder: nn.Module) -> None:
    """Kaiming normal (fan out) for convolutions; BatchNorm keeps weight 1 and bias 0.

    Paper: He et al. 2015, arXiv:1502.01852, sec. 2.2.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
