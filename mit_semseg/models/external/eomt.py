"""EoMT on vision transformers of timm (`MODEL.arch eomt:NAME`)."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.errors import one_line
from mit_semseg.losses.mask_classification import MaskClassificationLoss
from mit_semseg.models.encoders.timm_backbone import check_name
from mit_semseg.models.external.base import (
    Architecture,
    ExternalDecoder,
    ExternalEncoder,
    MaskClassifier,
    reading,
)
from mit_semseg.models.layers import ChannelNorm
from mit_semseg.models.pyramid import without_autocast

LIBRARY, MODULE, EXTRA = "timm", "timm", "timm"
log = logging.getLogger("mit_semseg")

QUERIES = 100  # as for ADE20K and Cityscapes in the paper
# Blocks that the queries pass, by the depth of the network; as published for S, B, L and g.
_LAST_BLOCKS = {12: 3, 24: 4, 40: 5}
_UNITS = 10**6  # of the buffer `progress`


def check(name: str) -> None:
    """Refuses an empty name; other names are checked when timm is imported."""
    if not name.strip():
        raise ValueError("MODEL.arch 'eomt:' names no vision transformer of timm")


def describe(name: str, weights: bool) -> Architecture:
    """Description of `eomt:NAME`, with the mean and standard deviation of timm's network."""
    import timm

    check_name(timm, name, f"MODEL.arch eomt:{name}")
    data: Any = timm.models.get_pretrained_cfg(name)
    config = {"name": name, "queries": QUERIES}
    return Architecture(f"eomt:{name}", config, mean=tuple(data.mean), std=tuple(data.std))


def network(architecture: Architecture, num_class: int) -> nn.Module:
    """The network for this number of classes, with random weights."""
    return EoMT(num_class=num_class, **architecture.config)


def pretrained(architecture: Architecture) -> dict[str, Tensor]:
    """timm's weights of the transformer; there are none for queries and heads."""
    name = architecture.config["name"]

    def message(error: Exception) -> str:
        return (
            f"weights of timm's {name} cannot be downloaded ({one_line(error, 120)}): check the "
            "name and the network, or set MODEL.weights_encoder none and MODEL.weights_decoder none"
        )

    with reading(message):
        vit = _transformer(name, pretrained=True)
    return _named(vit.state_dict(), len(vit.blocks) - _last_blocks(len(vit.blocks)))


def _named(state: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """The tensors of a transformer under the names of `EoMT`, whose encoder has `first` blocks."""
    found = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "blocks" and int(rest.partition(".")[0]) >= first:
            number, _, inner = rest.partition(".")
            found[f"blocks.{int(number) - first}.{inner}"] = value
        else:
            found[key if part == "norm" else f"vit.{key}"] = value
    return found


def with_channels(architecture: Architecture, count: int) -> Architecture:
    """The same for images of so many channels."""
    return replace(architecture, config={**architecture.config, "in_chans": count})


def split(
    network: nn.Module, architecture: Architecture, num_class: int
) -> tuple[ExternalEncoder, ExternalDecoder]:
    """The first blocks, and the blocks with the queries and the heads."""
    net: Any = network
    encoder = FirstBlocks(net.vit, architecture, "vit.", net.patch)
    net.vit = None
    return encoder, MaskDecoder(net, num_class, partial(_decoder, architecture))


def _decoder(architecture: Architecture, num_class: int) -> ExternalDecoder:
    return split(network(architecture, num_class), architecture, num_class)[1]


def save(network: nn.Module, architecture: Architecture, folder: Path) -> None:
    """Refused: this network is not from another library.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{architecture.source} is saved as a checkpoint folder only")


def _last_blocks(depth: int) -> int:
    return _LAST_BLOCKS.get(depth, max(1, depth // 4))


def _transformer(name: str, **options: Any) -> Any:
    """A plain vision transformer of timm for images of any size.

    Raises:
        ValueError: the network is of another kind.
    """
    import timm

    vit: Any
    try:
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
        parts = (vit.patch_embed, vit.blocks, vit.norm, vit._pos_embed)
        masked = "attn_mask" in inspect.signature(vit.blocks[0].forward).parameters
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"MODEL.arch eomt:{name} is no plain vision transformer ({one_line(error, 80)}); take "
            "one such as timm's vit_small_patch14_reg4_dinov2 or vit_large_patch16_dinov3"
        ) from error
    if not masked:
        raise ValueError(
            f"timm {timm.__version__} has no attention masks for {type(parts[1][0]).__name__}: "
            "pip install -U timm"
        )
    if getattr(vit, "rope_mixed", False):
        raise ValueError(
            f"MODEL.arch eomt:{name} has different position embeddings in each block, which is "
            "not supported; take another transformer"
        )
    return vit


class FirstBlocks(ExternalEncoder):
    """A vision transformer up to the block where the queries are added."""

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """(B, prefix tokens + patches, channels), and the rotary embeddings if any."""
        vit: Any = self.net
        x = vit._pos_embed(vit.patch_embed(images))
        x, rope = x if isinstance(x, tuple) else (x, None)
        if hasattr(vit, "patch_drop") and rope is None:
            x = vit.patch_drop(x)
        x = vit.norm_pre(x)
        for block in vit.blocks:
            x = block(x) if rope is None else block(x, rope=rope)
        return [x] if rope is None else [x, rope]


class EoMT(nn.Module):
    """A vision transformer whose last blocks process queries together with the patches.

    A mask is the product of a query with the patches, upscaled to a quarter of the image; its class
    comes from a linear layer. In training each query attends only to patches inside its mask of the
    layer before, with a probability that decreases to 0, block by block (mask annealing), so that
    inference needs no masks.

    Paper: Kerssies et al. 2025, arXiv:2503.19108, sec. 3.2 and 3.3.

    Deviations:
        - The transformer keeps the patches of its own weights, 14 or 16 pixels; the authors
          interpolate those of DINOv2 to 16.
        - While it is being annealed, masked attention is used in evaluation where its probability
          is at least 1/2, without random numbers.

    Args:
        name: of the transformer in timm.
        num_class: number of classes.
        queries: number of queries, and so of masks.
        options: passed on to `timm.create_model`.
    """

    def __init__(self, name: str, num_class: int, queries: int = QUERIES, **options: Any) -> None:
        super().__init__()
        vit = _transformer(name, **options)
        count = _last_blocks(len(vit.blocks))
        width = int(vit.embed_dim)
        self.patch = int(vit.patch_embed.patch_size[0])
        self.prefix = int(vit.num_prefix_tokens)
        self.num_class = num_class
        self.blocks = nn.ModuleList(vit.blocks[-count:])
        self.norm = vit.norm
        vit.blocks = nn.Sequential(*vit.blocks[:-count])
        vit.norm = nn.Identity()
        for block in self.blocks:  # rotary embeddings are for the patches, which come last
            attention: Any = block.attn
            if hasattr(attention, "num_prefix_tokens"):
                attention.num_prefix_tokens += queries
        self.vit = vit
        self.queries = nn.Embedding(queries, width)
        self.class_head = nn.Linear(width, num_class + 1)
        self.mask_head = nn.Sequential(
            *(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()),
            nn.Linear(width, width),
        )
        steps = max(1, int(math.log2(self.patch)) - 2)
        self.upscale = nn.Sequential(*(Upscale(width) for _ in range(steps)))
        # In the state dict, and an integer, which a moving average of weights copies. The copy on
        # the host, `share`, avoids a synchronisation.
        self.register_buffer("progress", torch.zeros((), dtype=torch.int64))
        self.share = 0.0

    def set_progress(self, share: float) -> None:
        """Sets the fraction of the training that is done, from 0 to 1."""
        self.share = share
        self.get_buffer("progress").fill_(round(share * _UNITS))

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        self.share = int(state.get(f"{prefix}progress", 0)) / _UNITS

    def probabilities(self) -> list[float]:
        """Probability of masked attention in each block."""
        parts = len(self.blocks) + 2
        # Block i is annealed in part i + 1 of equally long parts of the training.
        done = [min(max(self.share * parts - 1 - i, 0.0), 1.0) for i in range(len(self.blocks))]
        return [(1 - part) ** 0.9 for part in done]

    def forward(
        self, x: Tensor, rope: Tensor | None, grid: tuple[int, int], chances: Sequence[float]
    ) -> list[tuple[Tensor, Tensor]]:
        """Class scores (B, Q, C + 1) and mask scores (B, Q, h, w), of the last layer last.

        Args:
            x: tokens, (B, prefix + h * w, channels).
            rope: rotary embeddings, if any.
            grid: number of patches, (rows, columns).
            chances: probability of masked attention in each block.
        """
        queries = self.queries.weight.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([queries, x], dim=1)
        given = {} if rope is None else {"rope": rope}
        found = []
        for block, chance in zip(self.blocks, chances, strict=True):
            mask = None
            if self.training or chance >= 0.5:
                found.append(self.predict(x, grid))
                if chance > 0:
                    mask = self._attended(found[-1][1], grid, x.shape[1], chance)
            x = block(x, attn_mask=mask, **given)
        return [*found, self.predict(x, grid)]

    def predict(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Class and mask scores after a block."""
        x = self.norm(x)
        queries, patches = x[:, : self.queries.num_embeddings], x[:, -grid[0] * grid[1] :]
        maps = self.upscale(patches.transpose(1, 2).unflatten(2, grid))
        return self.class_head(queries), torch.einsum(
            "bqc,bchw->bqhw", self.mask_head(queries), maps
        )

    @torch.no_grad()
    def _attended(
        self, scores: Tensor, grid: tuple[int, int], tokens: int, chance: float
    ) -> Tensor:
        """(B, 1, tokens, tokens) bool: queries attend inside their masks, others everywhere."""
        B, Q = scores.shape[:2]
        inside = F.interpolate(scores, grid, mode="bilinear", align_corners=False).flatten(2) > 0
        if self.training and chance < 1:
            inside |= torch.rand(B, Q, 1, device=scores.device) > chance
        mask = torch.ones(B, tokens, tokens, dtype=torch.bool, device=scores.device)
        mask[:, :Q, -inside.shape[2] :] = inside
        return mask[:, None]


class Upscale(nn.Module):
    """Twice the resolution: transposed convolution, GELU, depthwise convolution, LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = ChannelNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv2(F.gelu(self.conv1(x))))
        return y


class MaskDecoder(MaskClassifier):
    """The last blocks of an EoMT with its heads."""

    loss = MaskClassificationLoss()

    def encoder_layers(self) -> list[nn.Module]:
        """As `Decoder.encoder_layers`: the blocks and the norm after them."""
        return [*self.net.blocks, self.net.norm]

    def set_progress(self, share: float) -> None:
        """As `Decoder.set_progress`: mask annealing."""
        self.net.set_progress(share)

    def logits(self, features: list[Tensor]) -> tuple[Any, ...]:
        """Scores, (B, num_class, h, w); in training also the input of the loss."""
        images, tokens, *rope = features
        grid = images.shape[2] // self.net.patch, images.shape[3] // self.net.patch
        layers = self.net(tokens, rope[0] if rope else None, grid, self.net.probabilities())
        if not self.training:
            return (self.class_scores(*layers[-1]),)
        with torch.no_grad():
            return self.class_scores(*layers[-1]), layers

    def mask_loss(self, predictions: Any, label: Tensor) -> Tensor:
        """(2,): `MaskClassificationLoss`."""
        with without_autocast(label.device):
            return self.loss(predictions, label)

    def counts(self, label: Tensor) -> Tensor:
        """(2,): the denominators of its means."""
        return self.loss.counts(label, self.num_class, self.net.queries.num_embeddings)
