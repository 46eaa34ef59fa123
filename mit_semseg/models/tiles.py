"""Logits of large images, computed in overlapping tiles or with a sliding window.

**Tiles** bound the memory of the network, which needs some hundred bytes per pixel. Near its border
a tile sees padding instead of the image, so tiles overlap, and scores are blended on a ramp in the
middle of each overlap. Tiles start on the network's coarsest grid, so that their scores are aligned
with those of the whole image. (For decoders that resize one level to another, the sides of the
image must also be multiples of the coarsest stride, see `DATASET.padding_constant`.)

A decoder that pools over the whole image declares its pools (`Decoder.pool_scales`) and takes two
passes: one sums up the pools of the image over its tiles, the other computes scores, with the
position of each tile. A decoder with another global operation, such as attention, sees its tile
only, which changes its scores.

The scores of the whole image, classes x height x width at the decoder's resolution, are still
stored at once. This is little at a quarter of the image's sides or less. Decoders with scores for
every pixel (U-Net with its own encoder, SegNet, ENet, FC-DenseNet, LinkNet, DUNet) need 6 GB for
150 classes at 20 megapixels, in half precision, with any tiles or windows.

**A sliding window** shows the network images of its training size only. Each window is an
independent image, with its own pools, and overlapping windows are averaged. As in mmsegmentation,
logits are averaged, at the network's resolution. This needs a fraction of the memory of
probabilities at the image's size, and all later steps (resizing, softmax, flips, scales) are the
same as without windows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.config import InferenceOptions
from mit_semseg.matrices import to_device
from mit_semseg.models.module import SegmentationModule
from mit_semseg.models.pyramid import Tile, pool_matrix, without_autocast

log = logging.getLogger("mit_semseg")

# "auto": images with more pixels than this are computed in tiles of this side.
AUTO_PIXELS, AUTO_SIDE = 4_000_000, 1024
# Smallest side of tiles when memory runs out.
MIN_SIDE = 256
# Overlap of neighbouring tiles in pixels, at most half a tile. The weight of a tile is 0 in the
# outer 7/16 of the overlap, and rises to 1 over the next eighth. On CamVid, with dilated
# MobileNetV2, 12 % of the labels at the border of a tile differ from those of the whole image, 1 %
# at a distance of 96 pixels, none at 192.
_OVERLAP, _MARGIN, _RAMP = 256, 7 / 16, 1 / 8
# Coarsest internal stride of the encoders, which may exceed the declared ones (HRNet declares 4).
_GRID = 32
# Scores with more elements (256 MiB in float32) are stored in half precision.
_MAX_FLOAT32 = 1 << 26


class CannotTile(ValueError):
    """The maps of the tiles are not aligned with one grid."""


# ------------------------------------------------------------------------------ geometry
def spans(length: int, side: int, overlap: int, grid: int) -> list[tuple[int, int]]:
    """Positions of tiles along one axis of an image.

    Args:
        length: length of the axis in pixels.
        side: maximum length of a tile, a multiple of `grid`.
        overlap: overlap of neighbouring tiles, a multiple of `grid` less than `side`.
        grid: tiles start at multiples of this.

    Returns:
        (start, stop) of each tile, in order; nearly equal in length.
    """
    if length <= side:
        return [(0, length)]
    shared = overlap // grid
    own = -(-length // grid) - shared  # grid cells that are divided among the tiles
    number = -(-own // (side // grid - shared))
    cuts = [i * own // number for i in range(number + 1)]
    return [(a * grid, min((b + shared) * grid, length)) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Part:
    """Position and weights of a tile's map along one axis of the whole map.

    Attributes:
        start, stop: in pixels of the map.
        final: pixels before this are not in any later tile.
        whole: length of the whole map.
        weights: (stop - start,) float32, weights of the tile's pixels; over all tiles they sum up
            to 1 at every pixel.
    """

    start: int
    stop: int
    final: int
    whole: int
    weights: Tensor


def window_spans(length: int, side: int, overlap: float, grid: int) -> list[tuple[int, int]]:
    """Positions of sliding windows along one axis of an image.

    Args:
        length: length of the axis in pixels.
        side: length of a window.
        overlap: overlap of neighbouring windows as a fraction of `side`, in [0, 1).
        grid: windows start at multiples of this; the step is rounded down to one.

    Returns:
        (start, stop) of the image pixels in each window, in order. A window that reaches beyond
        the image is cut off there: the last one by up to `grid` - 1 pixels, or more if the image
        is smaller than a window.
    """
    # 1e-6, since the subtraction may round a step just below a whole number.
    step = max(int(side * (1 - overlap) + 1e-6) // grid, 1) * grid
    last = -(-max(length - side, 0) // grid) * grid
    starts = [*range(0, last, step), last]
    return [(start, min(start + side, length)) for start in starts]


def parts(tiles: Sequence[tuple[int, int]], first: int, flat: bool = False) -> list[Part]:
    """Positions and weights of the maps of all tiles along one axis.

    Args:
        tiles: (start, stop) in pixels of the image, from `spans` or `window_spans`.
        first: length of the first tile's map.
        flat: overlapping tiles have equal weights, instead of a ramp.

    Raises:
        CannotTile: the tile's length is not a multiple of its map's.
    """
    if len(tiles) == 1:
        return [Part(0, first, first, first, torch.ones(first))]
    factor, rest = divmod(tiles[0][1], first)
    if rest or tiles[1][0] % factor:
        raise CannotTile(f"the network outputs {first} pixels for {tiles[0][1]}")
    places = [(a // factor, -(-b // factor)) for a, b in tiles]
    finals = [a for a, _ in places[1:]] + [places[-1][1]]
    ramps, total = [], torch.zeros(finals[-1], dtype=torch.float64)
    for i, (a, b) in enumerate(places):
        at = torch.arange(a, b, dtype=torch.float64) + 0.5
        ramp = torch.ones_like(at)
        if i > 0 and not flat:
            ramp = ramp.minimum(_ramp(at - a, places[i - 1][1] - a))
        if i + 1 < len(places) and not flat:
            ramp = ramp.minimum(_ramp(b - at, b - finals[i]))
        total[a:b] += ramp
        ramps.append(ramp)
    return [
        Part(a, b, final, finals[-1], (ramp / total[a:b]).float())
        for (a, b), final, ramp in zip(places, finals, ramps, strict=True)
    ]


def _ramp(depth: Tensor, overlap: int) -> Tensor:
    """Weights of pixels at a distance from the end of a tile, where it overlaps another."""
    return ((depth - _MARGIN * overlap) / (_RAMP * overlap)).clamp(0, 1)


Placed = tuple[Part, Part, Tensor]


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image: (start, stop) of rows and of columns; `flat` as in `parts`."""

    rows: Sequence[tuple[int, int]]
    columns: Sequence[tuple[int, int]]
    flat: bool = False

    def maps(self, image: Tensor, run: Callable[[int, Tensor], Tensor]) -> Iterator[Placed]:
        """Runs a network on the tiles, row by row.

        Args:
            image: (B, 3, H, W).
            run: `run(index of the tile, its pixels)` -> map.

        Yields:
            Position along the rows and along the columns of the whole map, and the tile's map.

        Raises:
            CannotTile: a map does not have the size that its tile requires.
        """
        numbers = count()
        places: tuple[list[Part], list[Part]] | None = None
        for i, (top, bottom) in enumerate(self.rows):
            for j, (left, right) in enumerate(self.columns):
                x = run(next(numbers), image[:, :, top:bottom, left:right])
                if places is None:
                    places = (
                        parts(self.rows, x.shape[2], self.flat),
                        parts(self.columns, x.shape[3], self.flat),
                    )
                row, column = places[0][i], places[1][j]
                h, w = row.stop - row.start, column.stop - column.start
                if tuple(x.shape[2:]) != (h, w):
                    raise CannotTile(
                        f"the network outputs {x.shape[2]}x{x.shape[3]} pixels for a tile of "
                        f"{bottom - top}x{right - left}, not {h}x{w}"
                    )
                yield row, column, x


def blended(maps: Iterable[Placed]) -> Tensor:
    """The weighted sum of the maps of all tiles.

    Args:
        maps: (N, K, h, w) each, from `Tiling.maps`.

    Returns:
        (N, K, H, W), in at least float32; if that takes more than 256 MiB, in float16, with the
        maximum over K subtracted (see `TiledNetwork`).
    """
    result: Tensor | None = None
    above: Tensor | None = None  # contribution of the tiles above to the next rows
    for row, strip in _strips(maps):
        if above is not None:
            strip[:, :, : above.shape[2]] += above
        if result is None:
            N, K, _, W = strip.shape
            half = strip.dtype == torch.float32 and N * K * row.whole * W > _MAX_FLOAT32
            result = strip.new_empty(N, K, row.whole, W, dtype=torch.half if half else strip.dtype)
        final, rest = strip.split([row.final - row.start, row.stop - row.final], dim=2)
        result[:, :, row.start : row.final] = _to_half(final) if half else final
        above = rest.clone()  # a view would keep the strip in memory
    assert result is not None
    return result


def _strips(maps: Iterable[Placed]) -> Iterator[tuple[Part, Tensor]]:
    """Rows of tiles, summed from left to right and weighted from top to bottom."""
    for row, column, x in maps:
        N, K, h, _ = x.shape
        if column.start == 0:
            dtype = torch.promote_types(x.dtype, torch.float32)
            strip = x.new_zeros(N, K, h, column.whole, dtype=dtype)
        strip[..., column.start : column.stop] += x * to_device(column.weights, x.device)
        if column.stop == column.whole:
            yield row, strip.mul_(to_device(row.weights, x.device)[:, None])


def _to_half(x: Tensor) -> Tensor:
    """float16, with the maximum over classes at 0: only the least probable may be clamped."""
    low = torch.finfo(torch.half).min
    return (x - x.amax(dim=1, keepdim=True)).clamp_(min=low).half()


# ------------------------------------------------------------------------------ networks
@dataclass(frozen=True)
class Sliding:
    """A sliding window.

    Attributes:
        height, width: in pixels of the resized image.
        overlap: overlap of neighbouring windows as a fraction of their sides, in [0, 1).

    Raises:
        ValueError: a side is less than 64, or the overlap is out of range.
    """

    height: int
    width: int
    overlap: float = 1 / 3

    def __post_init__(self) -> None:
        InferenceOptions(window=(self.height, self.width), overlap=self.overlap)  # checks them

    @classmethod
    def of(cls, options: InferenceOptions) -> Sliding | None:
        """The window of `VAL` or `TEST`; None if `window` is empty."""
        if not options.window:
            return None
        height, width = options.window
        return cls(height, width, options.overlap)


class TiledNetwork:
    """The logits of a network for images of any size.

    Small images are computed whole. The scores of large ones are blended from tiles, in float32,
    in float64 if the network's are, or in float16 if they take more than 256 MiB. In float16 the
    maximum over the classes is subtracted: this does not change the softmax, and float16 is most
    accurate near 0, which is where the most probable classes then are.

    With a sliding window, images of any size are computed window by window.
    """

    def __init__(
        self,
        module: SegmentationModule,
        tile: str | int = "auto",
        network: Callable[[Tensor], Tensor] | None = None,
        window: Sliding | None = None,
    ) -> None:
        """Wrap a module.

        Args:
            module: in evaluation mode.
            tile: "auto": images above 4 million pixels in tiles of 1024; a number: images with a
                side above it in tiles of that side; "off": all images whole.
            network: computes the logits of an image or a tile, for example `module.logits`
                compiled; None: `module.logits`. Not used for the tiles of decoders with
                `pool_scales`.
            window: a sliding window for all images; `tile` is then ignored.

        Raises:
            ValueError: `tile` has another value.
        """
        self.module = module
        self.tile, self.window = InferenceOptions(tile=tile).tile, window
        self.network = module.logits if network is None else network
        # Any module can be the encoder or the decoder.
        strides = getattr(module.encoder, "strides", ())
        fixed = getattr(module.encoder, "fixed_size", None)  # then there are windows only
        self.grid = math.lcm(*strides) if fixed else math.lcm(_GRID, *strides)
        self.pool_scales = _declared_pools(module.decoder)

    def __call__(self, image: Tensor) -> Tensor:
        """Scores of (B, 3, H, W) images at the network's resolution, (B, num_class, h, w)."""
        return self.compute(image, self.sides(*image.shape[-2:])[0])

    def sides(self, H: int, W: int) -> list[int | None]:
        """Sides of tiles to try in order, each after the one before ran out of memory: halved each
        time, down to 256 pixels. None is the whole image, or windows."""
        if self.tile == "off" or self.window:
            return [None]
        if isinstance(self.tile, int):
            first = self._on_grid(self.tile) if max(H, W) > self.tile else None
        else:
            first = self._on_grid(AUTO_SIDE) if H * W > AUTO_PIXELS else None
        sides = [first]
        side = first or max(H, W)
        while side > max(MIN_SIDE, 2 * self.grid):
            side = self._on_grid(max(side // 2, MIN_SIDE))
            sides.append(side)
        return sides

    def _on_grid(self, side: int) -> int:
        # At least two grid cells, one of which can be shared with the neighbour.
        return max(side // self.grid, 2) * self.grid

    def compute(self, image: Tensor, side: int | None) -> Tensor:
        """Scores of images, in tiles of a side, or whole if it is None."""
        if self.window is not None:
            return self._slide(image, self.window)
        H, W = image.shape[-2:]
        if side is None or max(H, W) <= side:
            return self.network(image)
        overlap = max(min(_OVERLAP, side // 2) // self.grid, 1) * self.grid
        rows, columns = (spans(length, side, overlap, self.grid) for length in (H, W))
        tiling = Tiling(rows, columns)
        try:
            run = self._second_pass(tiling, image) if self.pool_scales else self._plain
            return blended(tiling.maps(image, run))
        except CannotTile as error:
            log.warning("an image of %dx%d is computed whole, not in tiles: %s", W, H, error)
        return self.network(image)

    def _slide(self, image: Tensor, window: Sliding) -> Tensor:
        """Scores of images: at each pixel, the mean over all windows that contain it."""
        H, W = image.shape[-2:]
        sides = window.height, window.width

        def run(number: int, seen: Tensor) -> Tensor:
            # Normalised first, so that the padding, 0, is the mean colour.
            pixels = self.module.inputs(seen)
            h, w = pixels.shape[-2:]
            scores = self.network(F.pad(pixels, (0, sides[1] - w, 0, sides[0] - h)))
            made = tuple(scores.shape[2:])
            if sides[0] % made[0] or sides[1] % made[1]:
                raise ValueError(
                    f"the network outputs {made} pixels for a window of {sides}, whose sides are "
                    f"not multiples of its stride: use multiples of {self.grid}"
                )
            return scores[:, :, : -(-h * made[0] // sides[0]), : -(-w * made[1] // sides[1])]

        rows, columns = (
            window_spans(length, side, window.overlap, self.grid)
            for length, side in zip((H, W), sides, strict=True)
        )
        return blended(Tiling(rows, columns, flat=True).maps(image, run))

    def _plain(self, number: int, tile: Tensor) -> Tensor:
        return self.network(tile)

    def _second_pass(self, tiling: Tiling, image: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Computes the pools of the whole image; returns a function that computes a tile."""
        pools: dict[int, Tensor] = {}
        tiles = []
        for row, column, x in tiling.maps(image, lambda _, t: self.module.features(t)[-1]):
            tiles.append(Tile(pools, row.start, column.start, row.whole, column.whole))
            for scale in self.pool_scales:
                part = _partial_pool(x, row, column, scale)
                pools[scale] = pools[scale] + part if scale in pools else part
        decoder = cast(PoolingDecoder, self.module.decoder)

        def run(number: int, tile: Tensor) -> Tensor:
            return decoder.logits(self.module.features(tile), tiles[number])[0]

        return run


class PoolingDecoder(Protocol):
    """Interface of decoders with `pool_scales`."""

    def logits(self, features: list[Tensor], tile: Tile) -> tuple[Tensor, ...]:
        """Scores of a tile; see `Decoder.logits`."""


def _declared_pools(decoder: nn.Module) -> tuple[int, ...]:
    return tuple(getattr(decoder, "pool_scales", ()))


def _partial_pool(x: Tensor, row: Part, column: Part, scale: int) -> Tensor:
    """Contribution of a tile's map to the pool of the whole map: (N, C, scale, scale)."""
    with without_autocast(x.device):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        down, across = (
            to_device(
                pool_matrix(part.whole, scale)[:, part.start : part.stop] * part.weights, x.device
            ).to(x.dtype)
            for part in (row, column)
        )
        return down @ x @ across.T
