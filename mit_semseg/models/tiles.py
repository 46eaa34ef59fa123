"""Logits of large images: in tiles that overlap, blended, so that the network's memory is bounded.

What a network holds grows with the image: some hundred bytes for every pixel. Here a large image is
cut into tiles that overlap. Near its edge a tile knows least, since the network sees padding there
in place of the image: in the middle of an overlap the scores go over from one tile to the other,
along a ramp. Tiles begin on the network's coarsest grid, so that their scores lie where those of
the whole image do. (Decoders that resize one level to another need sides that are multiples of the
coarsest stride for that, as `DATASET.padding_constant` makes them.)

A decoder that pools over the whole image would see another whole in every tile. Where it declares
its pools (`Decoder.pool_scales`), the image is gone through twice: for the pools, which are linear
and so can be summed up tile by tile, then for the scores, with each tile's place in the whole. A
decoder that reaches as far in another way, such as by attention, is simply tiled: its scores then
differ from the whole image's by what that reach is worth.

What stays bounded is what the network holds. The scores of the whole image are put together from
those of the tiles, classes x height x width at the decoder's resolution, and are held at once. At a
quarter of the image's sides, or less, that is little. Decoders that score every pixel (U-Net with
its own encoder, SegNet, ENet, FC-DenseNet, LinkNet, DUNet) make 6 GB of 150 classes at 20
megapixels, in half precision: tiles of any size, and sliding windows, do not change that.

A sliding window is another matter, though it is cut and put together in the same way: there the
network is meant to see windows of one size only, that of the crops it was trained on. Every window
is an image of its own, pools and all, and where windows overlap the plain mean is taken. It is the
mean of logits, at the network's resolution, as mmsegmentation takes it: that is a fraction of what
probabilities at the image's size would take, and all that follows, resizing, softmax, mirror images
and other scales, is the same as without windows.
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

# "auto": images above so many pixels are computed in tiles of this side.
AUTO_PIXELS, AUTO_SIDE = 4_000_000, 1024
# The least side of tiles when memory runs out, and of a sliding window.
LEAST_SIDE = 256
# Pixels that neighbours share, or half a tile if that is less. In the outer 7/16 of what it shares
# a tile does not count, and from there its weight rises over an eighth. On CamVid, with dilated
# MobileNetV2, 12 % of the labels are other than the whole image's at the edge of a tile, 1 % at 96
# pixels from it, none at 192.
_OVERLAP, _MARGIN, _RAMP = 256, 7 / 16, 1 / 8
# Encoders have grids as coarse as this inside, whatever they declare: HRNet emits stride 4 only.
_GRID = 32
# Scores of more elements are kept in half precision: 256 MiB in float32.
_IN_FLOAT32 = 1 << 26


class CannotTile(ValueError):
    """What a network makes of the tiles does not lie on one grid."""


# ------------------------------------------------------------------------------ geometry
def spans(length: int, side: int, overlap: int, grid: int) -> list[tuple[int, int]]:
    """Where tiles begin and end along one axis of an image.

    Args:
        length: pixels of the axis.
        side: the most pixels of a tile, a multiple of `grid`.
        overlap: pixels that neighbours share, a multiple of `grid` below `side`.
        grid: every tile begins at a multiple of this.

    Returns:
        (start, stop) of each tile, in order; nearly equal in length.
    """
    if length <= side:
        return [(0, length)]
    shared = overlap // grid
    own = -(-length // grid) - shared  # grid cells that the tiles divide among them
    number = -(-own // (side // grid - shared))
    cuts = [i * own // number for i in range(number + 1)]
    return [(a * grid, min((b + shared) * grid, length)) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Part:
    """Where a tile's map lies along one axis of the whole image's map.

    Attributes:
        start, stop: in pixels of the map.
        settled: no later tile reaches pixels before this.
        whole: length of the whole map.
        weights: (stop - start,) float32, how much the tile counts at its pixels; at every pixel of
            the whole map 1 in sum over the tiles.
    """

    start: int
    stop: int
    settled: int
    whole: int
    weights: Tensor


def window_spans(length: int, side: int, overlap: float, grid: int) -> list[tuple[int, int]]:
    """Where sliding windows begin and end along one axis of an image.

    Args:
        length: pixels of the axis.
        side: pixels of a window.
        overlap: share of it that the next one covers, too, in [0, 1).
        grid: every window begins at a multiple of this; so its step is a multiple, rounded down.

    Returns:
        (start, stop) of what each window sees of the image, in order. The last one ends at the
        image's end, or, on the grid, at most `grid` - 1 pixels beyond it: there, and where the
        image is smaller than a window, `stop` is the image's end.
    """
    # A step that is a whole number may have been rounded down by the subtraction.
    step = max(int(side * (1 - overlap) + 1e-6) // grid, 1) * grid
    last = -(-max(length - side, 0) // grid) * grid
    starts = [*range(0, last, step), last]
    return [(start, min(start + side, length)) for start in starts]


def parts(tiles: Sequence[tuple[int, int]], first: int, flat: bool = False) -> list[Part]:
    """The places of all tiles' maps along one axis.

    Args:
        tiles: (start, stop) in pixels of the image, from `spans` or `window_spans`.
        first: pixels of the first tile's map.
        flat: all tiles count alike at every pixel they share, instead of along a ramp.

    Raises:
        CannotTile: the map is no whole fraction of its tile.
    """
    if len(tiles) == 1:
        return [Part(0, first, first, first, torch.ones(first))]
    factor, rest = divmod(tiles[0][1], first)
    if rest or tiles[1][0] % factor:
        raise CannotTile(f"the network makes {first} pixels of {tiles[0][1]}")
    places = [(a // factor, -(-b // factor)) for a, b in tiles]
    settled = [a for a, _ in places[1:]] + [places[-1][1]]
    ramps, total = [], torch.zeros(settled[-1], dtype=torch.float64)
    for i, (a, b) in enumerate(places):
        at = torch.arange(a, b, dtype=torch.float64) + 0.5
        ramp = torch.ones_like(at)
        if i > 0 and not flat:
            ramp = ramp.minimum(_rising(at - a, places[i - 1][1] - a))
        if i + 1 < len(places) and not flat:
            ramp = ramp.minimum(_rising(b - at, b - settled[i]))
        total[a:b] += ramp
        ramps.append(ramp)
    return [
        Part(a, b, end, settled[-1], (ramp / total[a:b]).float())
        for (a, b), end, ramp in zip(places, settled, ramps, strict=True)
    ]


def _rising(depth: Tensor, overlap: int) -> Tensor:
    """Weight of pixels that lie so deep in a tile, from the end that it shares with another."""
    return ((depth - _MARGIN * overlap) / (_RAMP * overlap)).clamp(0, 1)


Placed = tuple[Part, Part, Tensor]


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image: spans of rows x spans of columns; `flat` as in `parts`."""

    rows: Sequence[tuple[int, int]]
    columns: Sequence[tuple[int, int]]
    flat: bool = False

    def maps(self, image: Tensor, run: Callable[[int, Tensor], Tensor]) -> Iterator[Placed]:
        """What a network makes of each tile, from left to right, from top to bottom.

        Args:
            image: (B, 3, H, W).
            run: called with the number of a tile and its pixels; gives a map.

        Yields:
            Place among the rows and among the columns of the whole map, and the map.

        Raises:
            CannotTile: a map does not lie where its tile does.
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
                        f"the network makes {x.shape[2]}x{x.shape[3]} pixels of a tile of "
                        f"{bottom - top}x{right - left}, not {h}x{w}"
                    )
                yield row, column, x


def blended(maps: Iterable[Placed]) -> Tensor:
    """The whole map of the maps of all tiles, each counting by its weights.

    Args:
        maps: (N, K, h, w) each, from `Tiling.maps`.

    Returns:
        (N, K, H, W), in float32 at least; where that would take more than 256 MiB, in float16 with
        the maximum over K subtracted (see `TiledNetwork`).
    """
    result: Tensor | None = None
    above: Tensor | None = None  # what the tiles above add to the next rows
    for row, strip in _strips(maps):
        if above is not None:
            strip[:, :, : above.shape[2]] += above
        if result is None:
            N, K, _, W = strip.shape
            half = strip.dtype == torch.float32 and N * K * row.whole * W > _IN_FLOAT32
            result = strip.new_empty(N, K, row.whole, W, dtype=torch.half if half else strip.dtype)
        settled, open_ = strip.split([row.settled - row.start, row.stop - row.settled], dim=2)
        result[:, :, row.start : row.settled] = settled if not half else _halved(settled)
        above = open_.clone()  # a view would keep the strip
    assert result is not None
    return result


def _strips(maps: Iterable[Placed]) -> Iterator[tuple[Part, Tensor]]:
    """Rows of tiles, blended from left to right and weighed from top to bottom."""
    for row, column, x in maps:
        N, K, h, _ = x.shape
        if column.start == 0:
            dtype = torch.promote_types(x.dtype, torch.float32)
            strip = x.new_zeros(N, K, h, column.whole, dtype=dtype)
        strip[..., column.start : column.stop] += x * to_device(column.weights, x.device)
        if column.stop == column.whole:
            yield row, strip.mul_(to_device(row.weights, x.device)[:, None])


def _halved(x: Tensor) -> Tensor:
    """In float16, in which logits may overflow: at the low end only, where nothing competes."""
    low = torch.finfo(torch.half).min
    return (x - x.amax(dim=1, keepdim=True)).clamp_(min=low).half()


# ------------------------------------------------------------------------------ networks
@dataclass(frozen=True)
class Sliding:
    """A sliding window.

    Attributes:
        height, width: in pixels at the network's scale.
        overlap: share of them that the next window covers, too, in [0, 1).

    Raises:
        ValueError: a side below 64, or another overlap.
    """

    height: int
    width: int
    overlap: float = 1 / 3

    def __post_init__(self) -> None:
        InferenceOptions(window=(self.height, self.width), overlap=self.overlap)  # checks them

    @classmethod
    def of(cls, options: InferenceOptions) -> Sliding | None:
        """What `VAL` or `TEST` ask for: `window` and `overlap`; None without a window."""
        if not options.window:
            return None
        height, width = options.window
        return cls(height, width, options.overlap)


class TiledNetwork:
    """The logits of a network for images of any size.

    Called with an image it gives what the network gives, or, if the image is large, scores blended
    from tiles: in float32, in float64 where the network's are, or in float16 where all classes
    would take more than 256 MiB. From those in float16 their maximum over the classes has been
    subtracted: neither resizing nor softmax sees that, and numbers are finest around zero, where
    classes compete.

    With a sliding window images of every size are computed window by window, and blended from
    windows as they are from tiles.
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
            tile: "auto": images above 4 million pixels in tiles of 1024; a number of pixels:
                images with a longer side in tiles of that side; "off": all images whole.
            network: what computes the logits of an image or a tile, such as `module.logits`
                compiled; that is the default. Decoders with `pool_scales` have tiles computed
                without it.
            window: slide this over all images, whatever `tile` is.

        Raises:
            ValueError: another `tile`.
        """
        self.module = module
        self.tile, self.window = InferenceOptions(tile=tile).tile, window
        self.network = module.logits if network is None else network
        # Any module may be the encoder or the decoder.
        strides = getattr(module.encoder, "strides", ())
        fixed = getattr(module.encoder, "fixed_size", None)  # windows alone, each on its own grid
        self.grid = math.lcm(*strides) if fixed else math.lcm(_GRID, *strides)
        self.pool_scales = _declared_pools(module.decoder)

    def __call__(self, image: Tensor) -> Tensor:
        """Scores of (B, 3, H, W) images at the network's resolution, (B, num_class, h, w)."""
        return self.compute(image, self.sides(*image.shape[-2:])[0])

    def sides(self, H: int, W: int) -> list[int | None]:
        """Sides of tiles to try, one after the other while memory runs out, half as long each time,
        down to 256 pixels; None stands for the whole image, or windows."""
        if self.tile == "off" or self.window:
            return [None]
        if isinstance(self.tile, int):
            first = self._on_grid(self.tile) if max(H, W) > self.tile else None
        else:
            first = self._on_grid(AUTO_SIDE) if H * W > AUTO_PIXELS else None
        sides = [first]
        side = first or max(H, W)
        while side > max(LEAST_SIDE, 2 * self.grid):
            side = self._on_grid(max(side // 2, LEAST_SIDE))
            sides.append(side)
        return sides

    def _on_grid(self, side: int) -> int:
        # Two cells at least, of which neighbours can share one.
        return max(side // self.grid, 2) * self.grid

    def compute(self, image: Tensor, side: int | None) -> Tensor:
        """Scores of images, in tiles of a side if it is given."""
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
        """Scores of images, the mean over all windows that see a pixel."""
        H, W = image.shape[-2:]
        sides = window.height, window.width

        def run(number: int, seen: Tensor) -> Tensor:
            # Normalised first: beyond the image is the mean colour, which is then 0.
            pixels = self.module.inputs(seen)
            h, w = pixels.shape[-2:]
            scores = self.network(F.pad(pixels, (0, sides[1] - w, 0, sides[0] - h)))
            made = tuple(scores.shape[2:])
            if sides[0] % made[0] or sides[1] % made[1]:
                raise ValueError(
                    f"the network makes {made} pixels of a window of {sides}, whose sides are no "
                    f"multiples of its stride: take multiples of {self.grid}"
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
        """Takes the whole image's pools; returns what computes a tile with them."""
        pools: dict[int, Tensor] = {}
        tiles = []
        for row, column, x in tiling.maps(image, lambda _, t: self.module.features(t)[-1]):
            tiles.append(Tile(pools, row.start, column.start, row.whole, column.whole))
            for scale in self.pool_scales:
                share = _share_of_pool(x, row, column, scale)
                pools[scale] = pools[scale] + share if scale in pools else share
        decoder = cast(PoolingDecoder, self.module.decoder)

        def run(number: int, tile: Tensor) -> Tensor:
            return decoder.logits(self.module.features(tile), tiles[number])[0]

        return run


class PoolingDecoder(Protocol):
    """A decoder with `pool_scales`."""

    def logits(self, features: list[Tensor], tile: Tile) -> tuple[Tensor, ...]:
        """Scores of a tile; see `Decoder.logits`."""


def _declared_pools(decoder: nn.Module) -> tuple[int, ...]:
    return tuple(getattr(decoder, "pool_scales", ()))


def _share_of_pool(x: Tensor, row: Part, column: Part, scale: int) -> Tensor:
    """What a tile's map adds to the adaptive average pool of the whole: (N, C, scale, scale)."""
    with without_autocast(x.device):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        down, across = (
            to_device(
                pool_matrix(part.whole, scale)[:, part.start : part.stop] * part.weights, x.device
            ).to(x.dtype)
            for part in (row, column)
        )
        return down @ x @ across.T
