"""The Mix Transformer of SegFormer, under mmsegmentation's names of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_EPS = 1e-6  # of LayerNorm
_STRIDES = (4, 2, 2, 2)


class MixTransformer(nn.Module):
    """Four stages of patches that overlap, and of attention to a reduced map.

    Paper: Xie et al. 2021, arXiv:2105.15203, sec. 3.1.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels: Sequence[int] = config["channels"]
        inputs = (3, *channels[:-1])
        rows = zip(
            inputs,
            channels,
            _STRIDES,
            config["patches"],
            config["depths"],
            config["reductions"],
            config["expansions"],
        )
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    PatchEmbed(n_in, width, patch, stride),
                    # Of all published sizes: heads are as wide as the first stage.
                    nn.ModuleList(
                        Block(width, width // channels[0], reduction, expansion)
                        for _ in range(depth)
                    ),
                    nn.LayerNorm(width, eps=_EPS),
                )
            )
            for n_in, width, stride, patch, depth, reduction, expansion in rows
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of all stages."""
        maps = []
        stage: Any
        for stage in self.layers:
            embed, blocks, norm = stage
            x = embed(x)
            B, _, H, W = x.shape
            tokens = embed.norm(x.flatten(2).transpose(1, 2))
            for block in blocks:
                tokens = block(tokens, (H, W))
            x = norm(tokens).transpose(1, 2).reshape(B, -1, H, W)
            maps.append(x)
        return maps


class PatchEmbed(nn.Module):
    """Strided convolution; its `norm` follows on tokens."""

    def __init__(self, n_in: int, width: int, patch: int, stride: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(n_in, width, patch, stride, padding=patch // 2)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.projection(x)
        return y


class Block(nn.Module):
    """Attention, then the convolutional feed-forward part, each added to its input."""

    def __init__(self, width: int, heads: int, reduction: int, expansion: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.ffn = FeedForward(width, expansion * width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), size)
        y: Tensor = x + self.ffn(self.norm2(x), size)
        return y


class Attention(nn.Module):
    """To a map of which each side is `reduction` times shorter."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.sr: nn.Module | None = None
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        seen = x
        if self.sr is not None:
            reduced = self.sr(x.transpose(1, 2).reshape(len(x), -1, *size))
            seen = self.norm(reduced.flatten(2).transpose(1, 2))
        y: Tensor = self.attn(x, seen, seen, need_weights=False)[0]
        return y


class FeedForward(nn.Module):
    """1x1 convolution, depthwise 3x3, GELU, 1x1."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Dropout(0.0),  # keeps the numbers of the layers
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        y: Tensor = self.layers(x.transpose(1, 2).reshape(len(x), -1, *size))
        return y.flatten(2).transpose(1, 2)


def read_mit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Configuration of `MixTransformer`, from the names and shapes of the tensors in a file."""
    first = [f"backbone.layers.{i}" for i in range(4)]
    embeds = [state[f"{name}.0.projection.weight"] for name in first]
    reductions = [state.get(f"{name}.1.0.attn.sr.weight") for name in first]
    hidden = [state[f"{name}.1.0.ffn.layers.0.weight"] for name in first]
    return {
        "channels": [x.shape[0] for x in embeds],
        "patches": [x.shape[-1] for x in embeds],
        "depths": [
            len({k.split(".")[4] for k in state if k.startswith(f"{name}.1.")}) for name in first
        ],
        "reductions": [1 if x is None else x.shape[-1] for x in reductions],
        "expansions": [x.shape[0] // x.shape[1] for x in hidden],
        "output_stride": 32,
    }
