"""Images in tiles and windows: weights, places, and pools of the whole image."""

import logging
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import rounding
from torch import nn

from mit_semseg import scores
from mit_semseg.config import load_options
from mit_semseg.dataset.images import load_image
from mit_semseg.dataset.transforms import Normalize, as_batch, resize_image
from mit_semseg.engine.checkpoint import CheckpointFolder, load_model
from mit_semseg.engine.predictor import Predictor
from mit_semseg.models import DECODERS, Decoder, Encoder, SegmentationModule, tiles
from mit_semseg.models.decoders.upernet import UPerNet
from mit_semseg.models.tiles import Sliding, TiledNetwork, parts, spans, window_spans

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SEMSEG_DATA", ROOT.parent / "shared" / "data"))
few = settings(max_examples=40)
lengths = st.integers(1, 3000)


class Pointwise(Encoder):
    """Every pixel by itself, at a stride."""

    channels = (6,)
    strides = (8,)

    def __init__(self, stride=8):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1, stride)

    def feature_maps(self, images):
        return [self.conv(images).relu()]


class Local(Encoder):
    """Sees 15 pixels around each; three maps."""

    channels = (6, 8, 10)
    strides = (2, 4, 4)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in ((3, 6, 2), (6, 8, 2), (8, 10, 1))
        )

    def feature_maps(self, images):
        maps = [images]
        for conv in self.convs:
            maps.append(conv(maps[-1]).relu())
        return maps[1:]


class Small(UPerNet):
    """A narrow pyramid."""

    fpn_dim = 32


def module_of(encoder, decoder="c1", **options):
    torch.manual_seed(0)
    kind = Small if decoder == "upernet" else DECODERS.get(decoder)
    head = kind(encoder.channels, **{"num_class": 5, **options})
    return SegmentationModule(encoder, head, None).eval()


class Linear1x1(Decoder):
    """A classifier and nothing around it."""

    def __init__(self, channels, num_class=5):
        super().__init__((channels,), num_class)
        self.head = nn.Conv2d(channels, num_class, 1)

    def logits(self, features):
        return (self.head(features[-1]),)


def pointwise(stride=8):
    torch.manual_seed(0)
    return SegmentationModule(Pointwise(stride), Linear1x1(6), None).double().eval()


# ------------------------------------------------------------------------------ geometry
@few
@given(lengths, st.integers(2, 12), st.data())
def test_tiles_cover_an_axis(length, cells, data):
    grid = data.draw(st.sampled_from([8, 32, 224]))
    shared = data.draw(st.integers(0, cells - 1))
    found = spans(length, cells * grid, shared * grid, grid)
    assert found[0][0] == 0 and found[-1][1] == length
    for start, stop in found:
        assert start % grid == 0 and 0 < stop - start <= cells * grid
    for (_, stop), (start, _) in zip(found, found[1:]):
        assert min(stop, length) - start in (shared * grid, length - start)
    sides = [stop - start for start, stop in found[:-1]]
    assert not sides or max(sides) - min(sides) <= grid


@few
@given(lengths, st.integers(2, 12), st.data())
def test_weights_add_up_to_one(length, cells, data):
    grid, factor = 32, data.draw(st.sampled_from([1, 4, 8, 32]))
    shared = data.draw(st.integers(0, cells - 1))
    found = spans(length, cells * grid, shared * grid, grid)
    first = math.ceil(found[0][1] / factor)
    placed = parts(found, first)
    total = torch.zeros(math.ceil(length / factor))
    for (start, _), part in zip(found, placed):
        assert part.start * factor == start and part.whole == len(total)
        assert (part.weights >= 0).all()
        total[part.start : part.stop] += part.weights
    torch.testing.assert_close(total, torch.ones_like(total))
    for part, after in zip(placed, placed[1:]):
        assert part.final == after.start
    assert placed[-1].final == len(total)


def test_weights_of_a_tile_are_smallest_at_its_ends():
    first, second = parts([(0, 512), (256, 700)], 64)
    # Of 32 shared pixels of the map the outer 14 do not count, and 4 are the ramp.
    assert first.weights[: 32 + 14].eq(1).all() and second.weights[:14].eq(0).all()
    ramp = (torch.arange(4) + 0.5) / 4
    torch.testing.assert_close(second.weights[14:18], ramp)
    torch.testing.assert_close(first.weights[46:50], 1 - ramp)


# ------------------------------------------------------------------------------ the same scores
@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 96, 128, 200]))
def test_a_pointwise_network_is_computed_exactly_in_tiles(H, W, tile):
    """Of any size, 1 pixel wide, and no multiple of the stride."""
    module = pointwise()
    image = torch.randn(2, 3, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(H))
    given_, whole = TiledNetwork(module, tile)(image), module.logits(image)
    assert given_.dtype == torch.float64
    # Tiles are weighted in float32.
    torch.testing.assert_close(given_, whole, rtol=0, atol=rounding(whole.float(), 8))


@pytest.mark.parametrize(
    ("decoder", "size"),
    [
        *(("c1", size) for size in ((512, 700), (301, 1), (330, 1027))),
        *(("ppm", size) for size in ((512, 700), (301, 1), (330, 1027))),
        # The levels of its pyramid only fit each other in multiples of the coarsest stride.
        *(("upernet", size) for size in ((304, 4), (332, 540))),
    ],
)
@torch.no_grad()
def test_scores_in_tiles_are_those_of_the_whole_image(decoder, size, monkeypatch):
    """With a network that sees no farther than the margin tiles do not count in."""
    options = {"width": 8} if decoder != "c1" else {}
    module = module_of(Local(), decoder, **options).double()
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    image[..., size[1] // 2 :] += 2  # pools of tiles would differ from those of the image
    whole = module.logits(image)
    atol = 2e-5 * float(whole.std())
    torch.testing.assert_close(TiledNetwork(module, 256)(image), whole, rtol=0, atol=atol)
    if decoder != "c1" and max(size) > 500:
        monkeypatch.setattr(tiles, "_declared_pools", lambda decoder: ())
        assert (TiledNetwork(module, 256)(image) - whole).abs().max() > 100 * atol


@torch.no_grad()
def test_tiles_in_reduced_precision():
    module = module_of(Local(), "ppm", width=8)
    image = torch.rand(2, 3, 300, 520)
    whole = module.logits(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = TiledNetwork(module, 256)(image)
    assert reduced.dtype == torch.float32
    assert (reduced - whole).abs().mean() < 0.02 * whole.std()


@torch.no_grad()
def test_scores_of_many_classes_are_kept_in_half_precision(monkeypatch):
    module = pointwise().float()
    module.decoder.head.weight.mul_(1e5)  # beyond what float16 holds
    image = torch.randn(1, 3, 200, 333)
    whole = module.logits(image)
    assert whole.abs().max() > 65504
    monkeypatch.setattr(tiles, "_MAX_FLOAT32", 100)
    half = TiledNetwork(module, 96)(image)
    assert half.dtype == torch.float16 and half.isfinite().all()
    for scale in (1.0, 1e-5):  # between two classes that compete it is as fine as float32
        module.decoder.head.weight.mul_(scale)
        given_ = scores.class_map([TiledNetwork(module, 96)(image)], (400, 500))
        wanted = scores.class_map([module.logits(image)], (400, 500))
        assert (given_ == wanted).float().mean() > 0.9999


# ------------------------------------------------------------------------------ real images
STREETS, ROOMS = "CamVid/val/*.png", "ade20k*/images/*/*.jpg"


def photographs(pattern, number, height):
    """So many of them, spread over all, (1, 3, height, width) uint8 with sides as trained on."""
    files = sorted(DATA.glob(pattern))
    if not files:
        pytest.skip(f"no {pattern} in {DATA}: set SEMSEG_DATA")
    images = [load_image(file) for file in files[:: max(1, len(files) // number)][:number]]
    widths = [round(height * image.shape[1] / image.shape[0] / 32) * 32 for image in images]
    return [as_batch(resize_image(x, (width, height))) for x, width in zip(images, widths)]


def agreement(module, tile, image):
    """Share of pixels that get the class they get without tiles."""
    size = (image.shape[2], image.shape[3])
    labels = []
    for one in (tile, "off"):
        predictor = Predictor(module, {}, "cpu", tile=one)
        labels.append(predictor.labels(predictor.logits([image]), size))
    assert len(labels[1].unique()) >= 3
    return float((labels[0] == labels[1]).float().mean())


def trained():
    folder = ROOT / "weights" / "camvid-mobilenetv2dilated-c1_deepsup"
    return load_model(CheckpointFolder(folder).config(), f"{folder}/best.pth")


# What the page on reliability says: photographs, how many, their height, the tile, and the share
# of equal labels. Of rooms the network knows nothing, and half a room is harder than a whole one.
AGREEMENT = [
    (STREETS, 1, 720, 512, 0.995),
    pytest.param(STREETS, 3, 720, 512, 0.995, marks=pytest.mark.slow),
    pytest.param(STREETS, 9, 1440, 1024, 0.995, marks=pytest.mark.slow),
    pytest.param(ROOMS, 9, 1440, 1024, 0.995, marks=pytest.mark.slow),
    pytest.param(ROOMS, 9, 720, 512, 0.99, marks=pytest.mark.slow),
    pytest.param(ROOMS, 9, 720, 640, 0.995, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("pattern", "number", "height", "tile", "least"), AGREEMENT)
def test_labels_of_photographs_agree(pattern, number, height, tile, least):
    module = trained()
    shares = [agreement(module, tile, image) for image in photographs(pattern, number, height)]
    print(
        f"{pattern}, {len(shares)} of height {height}, tiles of {tile}: equal labels "
        f"{100 * min(shares):.2f} to {100 * max(shares):.2f} %"
    )
    assert min(shares) >= least


# ------------------------------------------------------------------------------ settings
def test_only_large_images_are_cut(monkeypatch):
    module, seen = pointwise().float(), []

    def network(image):
        seen.append(tuple(image.shape[2:]))
        return module.logits(image)

    monkeypatch.setattr(tiles, "AUTO_PIXELS", 300 * 200)
    monkeypatch.setattr(tiles, "AUTO_SIDE", 128)
    expected = {
        "auto": [(200, 300), None],
        "off": [(200, 300), (201, 301)],
        300: [(200, 300), None],
        128: [None, None],
    }
    for tile, sizes in expected.items():
        for image, size in zip((torch.zeros(1, 3, 200, 300), torch.zeros(1, 3, 201, 301)), sizes):
            seen.clear()
            TiledNetwork(module, tile, network)(image)
            if size is None:
                assert len(seen) > 1 and max(max(one) for one in seen) <= (300, 128)[tile != 300]
            else:
                assert seen == [size]


@pytest.mark.parametrize("tile", ["on", "", 0, 63, -1, 512.5, True, None])
def test_other_settings_are_refused(tile):
    with pytest.raises(ValueError, match="tile is .*; give auto, off or a side of 64"):
        TiledNetwork(pointwise(), tile)


def test_a_network_that_changes_sizes_is_computed_whole(caplog):
    module = pointwise(1).float()
    module.encoder.conv = nn.Conv2d(3, 6, 3)  # loses a pixel at every side
    image = torch.rand(1, 3, 100, 130)
    with caplog.at_level(logging.WARNING, logger="mit_semseg"):
        assert torch.equal(TiledNetwork(module, 64)(image), module.logits(image))
    assert "130x100 is computed whole, not in tiles: the network outputs" in caplog.text


# ------------------------------------------------------------------------------ sliding windows
@few
@given(lengths, st.integers(64, 700), st.floats(0, 0.99), st.sampled_from([8, 32]))
def test_windows_cover_an_axis(length, side, overlap, grid):
    found = window_spans(length, side, overlap, grid)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(stop == min(start + side, length) for start, stop in found)
    assert all(start % grid == 0 for start, _ in found)
    steps = [b[0] - a[0] for a, b in pairwise(found)]
    assert all(0 < step <= max(side * (1 - overlap) + 1e-6, grid) for step in steps)
    assert len(set(steps[:-1])) <= 1, "only the last one is shorter"
    assert found[-1][0] + side < length + grid or len(found) == 1


def test_windows_by_hand():
    # 1/2 of 100 is 50, and 48 on a grid of 8; the last one sees 96 pixels and 4 beyond the image.
    assert window_spans(200, 100, 0.5, 8) == [(0, 100), (48, 148), (96, 196), (104, 200)]
    assert window_spans(100, 100, 0.5, 8) == [(0, 100)]
    assert window_spans(60, 100, 0.0, 8) == [(0, 60)]
    assert window_spans(101, 100, 0.0, 8) == [(0, 100), (8, 101)]


def naive_windows(module, image, sides, steps):
    """Sum and number of the windows' scores at every pixel; on a grid of 32."""
    H, W = image.shape[2:]
    stride = module.encoder.strides[-1]
    total = torch.zeros(len(image), 5, -(-H // stride) + 99, -(-W // stride) + 99).to(image)
    number = torch.zeros_like(total)

    def starts(length, side, step):
        start, found = 0, [0]
        while start + side < length:
            last = math.ceil((length - side) / 32) * 32
            start = min(start + step, last)
            found.append(start)
        return found

    for y in starts(H, sides[0], steps[0]):
        for x in starts(W, sides[1], steps[1]):
            window = torch.zeros(len(image), 3, *sides).to(image)
            seen = image[:, :, y : y + sides[0], x : x + sides[1]]
            window[:, :, : seen.shape[2], : seen.shape[3]] = seen
            scores = module.logits(window)
            where = (
                slice(y // stride, y // stride + scores.shape[2]),
                slice(x // stride, x // stride + scores.shape[3]),
            )
            total[:, :, where[0], where[1]] += scores
            number[:, :, where[0], where[1]] += 1
    return (total / number)[:, :, : -(-H // stride), : -(-W // stride)]


@pytest.mark.parametrize("decoder", ["c1", "ppm"])
@pytest.mark.parametrize(
    ("size", "sides", "overlap", "steps"),
    [
        ((200, 333), (96, 160), 1 / 3, (64, 96)),  # 106.7 -> 96
        ((200, 333), (96, 160), 0.66, (32, 32)),  # up to 3 x 5 windows at a pixel
        ((161, 320), (160, 160), 0.0, (160, 160)),
        ((50, 333), (96, 128), 0.5, (32, 64)),  # smaller than a window in one direction
        ((50, 40), (64, 72), 0.5, (32, 32)),
    ],
)
@torch.no_grad()
def test_windows_are_those_of_a_naive_loop(decoder, size, sides, overlap, steps):
    """Decoders that pool do it in every window: it is an image of its own."""
    module = module_of(Local(), decoder, **({"width": 8} if decoder == "ppm" else {})).double()
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    given_ = TiledNetwork(module, window=Sliding(*sides, overlap))(image)
    expected = naive_windows(module, image, sides, steps)
    torch.testing.assert_close(given_, expected, rtol=0, atol=rounding(expected.float(), 8))
    assert not torch.allclose(given_, module.logits(image), rtol=0, atol=1e-3)


@torch.no_grad()
def test_windows_are_padded_with_the_mean_colour():
    module, seen = module_of(Local()), []
    module.normalize = Normalize()

    def network(image):
        seen.append(image)
        return module.logits(image)

    image = torch.randint(0, 256, (2, 3, 120, 200), dtype=torch.uint8)
    given_ = TiledNetwork(module, 64, network, Sliding(96, 128))(image)
    assert {tuple(x.shape) for x in seen} == {(2, 3, 96, 128)} and len(seen) == 2 * 3
    assert given_.shape == (2, 5, 30, 50)
    beyond = seen[-1][:, :, 120 - 32 :]
    assert not beyond.any() and seen[-1][:, :, : 120 - 32, : 200 - 96].all()
    floats = TiledNetwork(module, window=Sliding(96, 128))(Normalize()(image))
    torch.testing.assert_close(floats, given_)


def test_windows_that_cannot_work_are_refused():
    module = pointwise().float()
    with pytest.raises(ValueError, match=r"\(13, 12\) pixels for a window of \(100, 96\).* 32"):
        TiledNetwork(module, window=Sliding(100, 96))(torch.rand(1, 3, 200, 200))
    with pytest.raises(ValueError, match=r"window is \[32, 96\]; give \(height, width\) of 64"):
        Sliding(32, 96)
    for overlap in (-0.5, 1.0):
        with pytest.raises(ValueError, match="overlap is .* fraction of the window"):
            Sliding(96, 96, overlap)


@pytest.mark.parametrize("section", ["VAL", "TEST"])
def test_windows_in_the_configuration(section):
    def asked(*options):
        return Sliding.of(getattr(load_options(None, list(options)), section))

    assert asked() is None
    assert asked(f"{section}.window", "(96, 128)") == Sliding(96, 128, 0.333)
    given = asked(f"{section}.window", "[96, 128]", f"{section}.overlap", "0.25")
    assert given == Sliding(96, 128, 0.25)
    assert asked(f"{section}.window", "[96, 128]", f"{section}.stride", "0.75") == given
    wrong = [("window", "512"), ("window", "(32, 96)"), ("overlap", "1"), ("stride", "2")]
    for key, value in wrong:
        with pytest.raises(ValueError, match=rf"{section}\.{key} .*is"):
            asked(f"{section}.{key}", value)
