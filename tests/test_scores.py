"""scores.py against the published procedure written with torch's own layers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import rounding

from mit_semseg import scores

ROOT = Path(__file__).resolve().parents[1]


def published(logits, size):
    """Every scale at full size, softmax, averaged: (N, C, H, W)."""
    total = torch.zeros(())
    for x in logits:
        x = x if x.dtype == torch.float64 else x.float()
        resized = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        total = total + F.softmax(resized, dim=1) / len(logits)
    return total


def random_logits(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shapes) + shapes[0][-1])
    return [(4 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def assert_same_probabilities(given_, logits, size):
    """A logit that is off by a little makes its probability off by that share of itself."""
    # Where a pixel lies between two others is rounded as in `test_weights_are_torchs`; beside it
    # stand the interpolation along both axes and the subtraction of the maximum, on both sides.
    off = max(rounding(x.to(given_.dtype), 3 * max(x.shape[2:]) + 6) for x in logits)
    atol = torch.finfo(given_.dtype).eps
    torch.testing.assert_close(given_, published(logits, size), rtol=off, atol=atol)


def assert_same_labels(logits, size):
    reference = published(logits, size)
    labels = scores.class_map(logits, size)
    assert labels.dtype == torch.int64
    assert labels.shape == (reference.shape[0], *size)
    # A pixel may only differ where the two classes are tied.
    chosen = reference.gather(1, labels[:, None])[:, 0]
    assert (reference.amax(1) - chosen).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_in", [1, 2, 7, 75, 1000])
@pytest.mark.parametrize("n_out", [1, 2, 63, 683, 6000])
def test_weights_are_torchs(n_in, n_out, dtype):
    left, right, weight = scores.interpolation_weights(n_in, n_out, dtype)
    matrix = torch.zeros(n_out, n_in, dtype=dtype)
    rows = torch.arange(n_out)
    matrix.index_put_((rows, left), 1 - weight, accumulate=True)
    matrix.index_put_((rows, right), weight, accumulate=True)
    eye = torch.eye(n_in, dtype=dtype)[None]
    reference = F.interpolate(eye, size=n_out, mode="linear", align_corners=False)[0].t()
    # A weight is the fraction of a coordinate up to n_in, which is rounded when the scale is, when
    # it is multiplied and when 0.5 is taken away: by half a unit in the last place each, on both
    # sides.
    atol = 3 * n_in * torch.finfo(dtype).eps
    torch.testing.assert_close(matrix, reference, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(1, 150, 12, 17)], (97, 131)),
        ([(1, 150, 6, 9), (1, 150, 8, 11), (1, 150, 12, 17)], (97, 131)),
        ([(3, 5, 7, 9), (3, 5, 14, 18)], (60, 71)),
        ([(2, 4, 40, 50), (2, 4, 3, 3)], (13, 17)),  # smaller than the logits
        ([(1, 3, 21, 34)], (21, 34)),  # the same size
        ([(2, 6, 1, 1), (2, 6, 1, 5)], (9, 4)),
        ([(1, 1, 4, 4), (1, 1, 2, 2)], (8, 8)),
        ([(1, 2, 5, 5)], (1, 1)),
        ([(2, 150, 4, 300), (2, 150, 4, 150)], (10, 4000)),  # one row a band
    ],
)
def test_class_map_and_probabilities_are_the_published_ones(shapes, size):
    logits = random_logits(*shapes)
    assert_same_labels(logits, size)
    assert_same_probabilities(scores.probabilities(logits, size), logits, size)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_any_shape(sides, n, classes, size):
    assert_same_labels(random_logits(*[(n, classes, *side) for side in sides]), size)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_of_the_probabilities(dtype, wanted):
    for scale in (1, 10 if dtype.itemsize == 2 else 1e4):  # large logits do not overflow
        logits = random_logits((1, 20, 9, 9), (1, 20, 12, 15), dtype=dtype)
        logits = [scale * x for x in logits]
        assert_same_labels(logits, (70, 80))
        prob = scores.probabilities(logits, (70, 80))
        assert prob.dtype == wanted
        assert_same_probabilities(prob, logits, (70, 80))


def test_of_equal_classes_the_first_is_taken():
    (x,) = random_logits((2, 3, 5, 6))
    twice = torch.cat([x, x], dim=1)
    for logits in ([twice], [twice, twice]):
        labels = scores.class_map(logits, (31, 17))
        assert torch.equal(labels, published(logits, (31, 17))[:, :3].argmax(1))


def test_nan_logits_give_class_0():
    (x,) = random_logits((1, 3, 4, 4))
    x[:, :, :2] = float("nan")
    for logits in ([x], [x, x]):
        labels = scores.class_map(logits, (8, 8))
        assert (labels[:, :4] == 0).all()
        assert (labels[:, 5:] == published(logits, (8, 8)).argmax(1)[:, 5:]).all()


@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_memory_layout_of_the_logits_does_not_matter(layout):
    (plain,) = random_logits((2, 8, 9, 11))
    if layout == "channels_last":
        other = plain.contiguous(memory_format=torch.channels_last)
    else:
        other = torch.cat([plain, plain], dim=3)[..., :11]
    assert torch.equal(
        scores.probabilities([plain], (50, 60)), scores.probabilities([other], (50, 60))
    )


def test_a_single_tensor_without_gradient_and_autocast():
    (x,) = random_logits((1, 4, 5, 5))
    x.requires_grad_()
    assert torch.equal(scores.class_map(x, (20, 20)), scores.class_map([x], (20, 20)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scores.probabilities(x, (20, 20))
    assert torch.equal(inside, scores.probabilities(x, (20, 20)))
    assert not scores.probabilities([x], (20, 20)).requires_grad


def test_bands_cover_the_image_once_and_are_kept():
    logits = random_logits((2, 150, 9, 9), (2, 150, 12, 12))
    size = (50, 900)
    bands = list(scores.probability_bands(logits, size))
    assert len(bands) > 3
    assert [y0 for y0, _ in bands] == [
        sum(b.shape[2] for _, b in bands[:i]) for i in range(len(bands))
    ]
    whole = torch.cat([band for _, band in bands], dim=2)
    assert_same_probabilities(whole, logits, size)
    torch.testing.assert_close(whole.sum(1), torch.ones(2, *size))


@pytest.mark.parametrize(
    ("logits", "size", "message"),
    [
        ([], (4, 4), "logits is empty"),
        ([torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2)], (4, 4), r"logits\[1\].*\(1, 4\)"),
        ([torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 2, 2)], (4, 4), r"logits\[1\].*\(2, 3\)"),
        ([torch.zeros(3, 2, 2)], (4, 4), r"logits\[0\].*\(3, 2, 2\)"),
        ([torch.zeros(1, 3, 2, 2, dtype=torch.int64)], (4, 4), "int64"),
        ([torch.zeros(1, 0, 2, 2)], (4, 4), "non-empty"),
        ([torch.zeros(1, 3, 2, 2)], (4.5, 4), r"size is \(4.5, 4\)"),
        ([torch.zeros(1, 3, 2, 2)], (0, 4), r"size is \(0, 4\)"),
        ([torch.zeros(1, 3, 2, 2)], 7, "size is 7"),
        ([torch.zeros(1, 3, 2, 2)], (1, 2, 3), r"size is \(1, 2, 3\)"),
    ],
)
def test_wrong_arguments_are_named(logits, size, message):
    for function in (scores.class_map, scores.probabilities):
        with pytest.raises(ValueError, match=message):
            function(logits, size)
    with pytest.raises(ValueError, match=message):
        next(scores.probability_bands(logits, size))


MEMORY = """
import resource, sys
import torch
from mit_semseg.scores import class_map

torch.set_num_threads(1)
H, W = int(sys.argv[1]), int(sys.argv[2])
logits = [torch.randn(1, 150, H // 12, W // 12), torch.randn(1, 150, H // 8, W // 8)]
class_map([x[:, :, :3, :3] for x in logits], (30, 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for n in (1, 2):
    labels = class_map(logits[:n], (H, W))
    assert labels.shape == (1, H, W)
    result = labels.numel() * labels.element_size() >> 10
    del labels
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - result)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is KiB on Linux only")
@pytest.mark.parametrize(
    ("height", "width", "mib"),
    [(1200, 1500, 64), pytest.param(6000, 4000, 256, marks=pytest.mark.slow)],
)
def test_memory_stays_bounded(height, width, mib):
    """Beyond the logits and the result; 150 classes at full size are 1 GiB and 13 GiB."""
    command = [sys.executable, "-c", MEMORY, str(height), str(width)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < mib


@pytest.mark.gpu
def test_cuda_gives_the_same():
    logits = random_logits((2, 150, 12, 17), (2, 150, 20, 27))
    prob = scores.probabilities([x.cuda() for x in logits], (150, 200)).cpu()
    assert_same_probabilities(prob, logits, (150, 200))
    labels = scores.class_map([x.cuda() for x in logits], (150, 200)).cpu()
    reference = published(logits, (150, 200))
    assert (reference.amax(1) - reference.gather(1, labels[:, None])[:, 0]).max() <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [None, False])
def test_cuda_gives_class_0_for_nan(fused):
    logits = random_logits((2, 150, 6, 8), (2, 150, 9, 12))
    for x in logits:
        x[:, :, :2] = float("nan")
    size = (60, 80)
    for scales in (logits, logits[:1]):
        labels = scores.class_map([x.cuda() for x in scales], size, fused=fused).cpu()
        reference = published(scales, size)
        unknown = reference.isnan().any(1)
        assert unknown.any() and not unknown.all()
        assert (labels[unknown] == 0).all()
        chosen = reference.gather(1, labels[:, None])[:, 0]
        assert (reference.amax(1) - chosen)[~unknown].max() <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cuda_reaches_logits_beyond_32_bits(fused, layout):
    side = 3800
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    shape = (1, 150, side, side)
    logits = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=layout)
    assert logits.numel() > 2**31
    for row in range(0, side, 100):  # torch's own kernels are spared such sizes
        logits[:, :, row : row + 100].normal_()
    labels = scores.class_map([logits], (side, side), fused=fused, dtype=torch.uint8)
    # At the logits' own size nothing is between them, and the plain form is a maximum.
    for row in (0, 1899, 3700):
        band = logits[:, :, row : row + 100].float()
        chosen = band.gather(1, labels[:, None, row : row + 100].long())
        assert torch.equal(chosen[:, 0], band.amax(1))
    del logits, band
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("classes", [5, 256])
def test_small_types_hold_the_same_labels(classes):
    dtype = torch.uint8
    logits = [torch.randn(1, classes, 6, 7, generator=torch.Generator().manual_seed(0))]
    assert scores.label_dtype(classes) == dtype and scores.label_dtype(257) == torch.int16
    labels = scores.class_map(logits, (20, 30), dtype=dtype)
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), scores.class_map(logits, (20, 30)))
