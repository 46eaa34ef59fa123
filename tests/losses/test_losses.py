"""Losses against torch, hand-computed numbers and independent formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mit_semseg.losses import LOSSES, build_loss, functional

NAMES = LOSSES.first_names()
# What adds up: a product, and a mean over classes before one over pixels.
SUM = "0.25*dice+nll"


def sample(seed=0, classes=5, size=(2, 6, 7)):
    generator = torch.Generator().manual_seed(seed)
    B, h, w = size
    scores = torch.randn(B, classes, h, w, generator=generator, dtype=torch.float64)
    label = torch.randint(-1, classes, size, generator=generator)
    return scores.log_softmax(1), label


def two_pixels(*probabilities):
    """Log-probabilities (1, 2, 1, n) of two classes, from those of class 1."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([1 - p, p]).log().view(1, 2, 1, -1)


# ----------------------------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", [*NAMES, SUM])
def test_what_costs_nothing_and_compilation(name):
    def cost(log_probs, label, weight=None):
        log_probs = log_probs.detach().requires_grad_()
        loss = build_loss(name, 5, weight)(log_probs, label)
        loss.backward()  # there is a graph
        assert loss.isfinite() and log_probs.grad.isfinite().all()
        return loss.item(), bool(log_probs.grad.any())

    log_probs, label = sample()
    assert cost(log_probs, torch.full_like(label, -1)) == (0, False)
    # Other classes have weights, but none of them is in this batch.
    assert cost(log_probs, label.clamp(max=0), torch.tensor([0.0, 1, 1, 1, 1])) == (0, False)
    # log p is -inf where a network cannot tell a class; only ignored pixels ask for it.
    cost(log_probs.masked_fill((label < 0).unsqueeze(1), -math.inf), label)
    if name != "smooth":
        right = 50.0 * F.one_hot(label.clamp(min=0), 5).permute(0, 3, 1, 2).double()
        assert cost(right.log_softmax(1), label)[0] == pytest.approx(0, abs=1e-9)
    crit = build_loss(name, 5)
    compiled = torch.compile(crit, backend="eager", fullgraph=True)
    assert compiled(log_probs, label).item() == pytest.approx(crit(log_probs, label).item())


@pytest.mark.parametrize("name", [*NAMES, "nll+dice+lovasz"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_pixels_take_no_part(name, weighted):
    log_probs, label = sample()
    weights = torch.linspace(0.5, 2, 5) if weighted else None
    crit = build_loss(name, 5, weights)
    label[:, :, 4:] = -1
    log_probs.requires_grad_()
    loss = crit(log_probs, label)
    loss.backward()
    assert torch.equal(log_probs.grad[:, :, :, 4:], torch.zeros_like(log_probs[:, :, :, 4:]))
    cut = crit(log_probs.detach()[:, :, :, :4], label[:, :, :4])
    assert loss.item() == pytest.approx(cut.item(), rel=1e-6)


@pytest.mark.parametrize("name", [*NAMES, SUM])
def test_gradients_are_those_of_finite_differences(name):
    log_probs, label = sample(size=(1, 3, 3), classes=3)
    crit = build_loss(name, 3, torch.tensor([0.5, 1.0, 2.0]))
    scores = log_probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crit(x.log_softmax(1), label), scores)


@pytest.mark.parametrize("name", [*NAMES, SUM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    """300 x 400 pixels cost more together than float16 can hold."""
    log_probs, label = sample(size=(1, 300, 400))
    half = log_probs.to(dtype).requires_grad_()
    loss = build_loss(name, 5)(half, label)
    loss.backward()
    assert loss.dtype == torch.float32
    wide = build_loss(name, 5)(half.detach().double(), label)
    assert loss.item() == pytest.approx(wide.item(), rel=1e-5)
    assert half.grad.dtype == dtype and half.grad.isfinite().all() and half.grad.any()


EXTREMES = {
    "huge": lambda: 1e30 * sample(size=(2, 5, 5))[0],
    "one class": lambda: torch.zeros(2, 1, 5, 5, dtype=torch.float64),
    "one pixel": lambda: sample(size=(1, 1, 1))[0],
    "an impossible class": lambda: sample(size=(2, 5, 5))[0].index_fill(1, torch.tensor(4), -1e300),
}


@pytest.mark.parametrize("name", [*NAMES, SUM])
@pytest.mark.parametrize("case", list(EXTREMES))
@pytest.mark.parametrize("weights", [None, 0.0, 1e-30])
def test_extremes_stay_finite(name, case, weights):
    scores = EXTREMES[case]().requires_grad_()
    B, C, h, w = scores.shape
    label = torch.randint(-1, C, (B, h, w), generator=torch.Generator().manual_seed(1))
    label[0, 0, 0] = 0
    weight = None if weights is None else torch.full((C,), weights)
    loss = build_loss(name, C, weight)(scores.log_softmax(1), label)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()
    assert not scores.grad[(label < 0).unsqueeze(1).expand_as(scores)].any()
    if weights == 0:  # what nobody counts teaches nothing
        assert loss.item() == 0 and not scores.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_do_not_fit_are_refused(name):
    """Of dice and lovasz they would change the result, and nothing would say so."""
    log_probs, label = sample()
    crit = build_loss(name, 5)
    with pytest.raises(ValueError, match=r"\(2, 5, 6, 7\) and label \(2, 6, 6\)"):
        crit(log_probs, label[:, :, :6])
    for value in (255, -2):
        wrong = label.clone()
        wrong[0, 0, 0] = value
        with pytest.raises(ValueError, match=rf"label has values from .*{value}.* 0 to 4, or -1"):
            crit(log_probs, wrong)
    for dtype in (torch.uint8, torch.int32):
        with pytest.raises(ValueError, match=f"label is {dtype}; expected int64"):
            crit(log_probs, label.clamp(min=0).to(dtype))
    empty = log_probs[:0].requires_grad_()
    assert crit(empty, label[:0]).item() == 0


# ------------------------------------------------------------------------------------------- nll
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 0.25, 3.0, 1.5]])
def test_nll_is_torchs(weights):
    log_probs, label = sample()
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    wanted = F.nll_loss(log_probs, label, weight, ignore_index=-1)
    assert functional.nll(log_probs, label, weight).item() == pytest.approx(wanted.item())


# ---------------------------------------------------------------------------------------- smooth
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 0.25, 3.0, 1.5]])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_smoothing_is_torchs(eps, weights):
    log_probs, label = sample()
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=-1, label_smoothing=eps)
    wanted = theirs(log_probs, label).item()
    assert functional.smooth(log_probs, label, weight, eps).item() == pytest.approx(wanted)
    crit = build_loss("smooth", 5, weight, label_smoothing=eps)
    assert crit(log_probs, label).item() == pytest.approx(wanted)


# ----------------------------------------------------------------------------------------- focal
def test_focal_by_hand_and_without_focus():
    # p of the labels: 0.8 and 0.4.
    loss = functional.focal(two_pixels(0.8, 0.6), torch.tensor([[[1, 0]]]))
    assert loss.item() == pytest.approx((0.04 * -math.log(0.8) + 0.36 * -math.log(0.4)) / 2)
    log_probs, label = sample()
    weight = torch.linspace(0.5, 2, 5).double()
    wanted = F.nll_loss(log_probs, label, weight, ignore_index=-1)
    loss = functional.focal(log_probs, label, weight, gamma=0)
    assert loss.item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0, 2.0])
def test_focal_has_a_finite_gradient_at_probability_1(gamma):
    scores = torch.tensor([[[[400.0, 0.0]], [[0.0, 0.0]]]], requires_grad=True)
    functional.focal(scores.log_softmax(1), torch.zeros(1, 1, 2).long(), gamma=gamma).backward()
    assert scores.grad.isfinite().all() and scores.grad[..., 1].abs().min() > 0


# ------------------------------------------------------------------------------------------ dice
def test_dice_by_hand():
    # Class 1 at pixels 0 and 1 of three; class 0 at pixel 2.
    log_probs, label = two_pixels(0.9, 0.5, 0.2), torch.tensor([[[1, 1, 0]]])
    one = 2 * (0.9 + 0.5) / (0.9 + 0.5 + 0.2 + 2)
    zero = 2 * 0.8 / (0.1 + 0.5 + 0.8 + 1)
    loss = functional.dice(log_probs, label, smooth=0)
    assert loss.item() == pytest.approx(1 - (one + zero) / 2)
    weighted = functional.dice(log_probs, label, torch.tensor([1.0, 3.0]), smooth=0)
    assert weighted.item() == pytest.approx(1 - (3 * one + zero) / 4)
    # As TRAIN.loss has it, a pixel is added above and below.
    one, zero = (2 * 1.4 + 1) / (1.6 + 2 + 1), (2 * 0.8 + 1) / (1.4 + 1 + 1)
    assert build_loss("dice", 2)(log_probs, label).item() == pytest.approx(1 - (one + zero) / 2)
    # A class that is in no label is not in the mean.
    loss = functional.dice(log_probs, torch.tensor([[[1, 1, -1]]]), smooth=0)
    assert loss.item() == pytest.approx(1 - 2 * 1.4 / (1.4 + 2))


# ------------------------------------------------------------------------------------------ ohem
@pytest.mark.parametrize(("threshold", "min_share"), [(0.7, 0.25), (0.05, 0.5), (0.0, 0.1), (1, 0)])
def test_ohem_keeps_the_hard_pixels(threshold, min_share):
    log_probs, label = sample(seed=3)
    costs, chances = [], []
    for b, y, x in np.ndindex(*label.shape):
        if label[b, y, x] >= 0:
            costs.append(-log_probs[b, label[b, y, x], y, x].item())
            chances.append(math.exp(-costs[-1]))
    kept = sorted(costs, reverse=True)
    count = max(math.ceil(len(costs) * min_share), sum(chance < threshold for chance in chances), 1)
    loss = functional.ohem(log_probs, label, threshold=threshold, min_share=min_share)
    assert loss.item() == pytest.approx(np.mean(kept[:count]))


# ---------------------------------------------------------------------------------------- lovasz
def jaccard_loss(wrong, positives):
    """1 - IoU of a class when exactly these pixels are wrong about it."""
    predicted = positives ^ wrong
    return 1 - len(predicted & positives) / len(predicted | positives)


def choquet(errors, positives):
    """Extension of the set function as the integral over t of its value at {error > t}."""
    steps = sorted({0.0, *errors})
    return sum(
        (above - below) * jaccard_loss({i for i, e in enumerate(errors) if e > below}, positives)
        for below, above in zip(steps, steps[1:], strict=False)
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 3), st.integers(1, 4))
def test_lovasz_is_the_integral_of_the_jaccard_loss(seed, classes, h, w):
    log_probs, label = sample(seed, classes, (1, h, w))
    truth, p = label.flatten().tolist(), log_probs.exp().flatten(2)[0]
    valid = [i for i, y in enumerate(truth) if y >= 0]
    values = []
    for c in range(classes):
        positives = {k for k, i in enumerate(valid) if truth[i] == c}
        if positives:
            errors = [abs((truth[i] == c) - p[c, i].item()) for i in valid]
            values.append(choquet(errors, positives))
    wanted = np.mean(values) if values else 0.0
    assert functional.lovasz(log_probs, label).item() == pytest.approx(wanted, abs=1e-9)


def test_lovasz_in_float32_has_the_slopes_of_float64():
    """Each is the difference of two nearly equal values of 1 - IoU."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 512, 512, generator=generator)
    label = (torch.rand(1, 512, 512, generator=generator) < 0.01).long()
    slopes = []
    for dtype in (torch.float32, torch.float64):
        log_probs = scores.to(dtype).log_softmax(1).detach().requires_grad_()
        functional.lovasz(log_probs, label).backward()
        slopes.append(log_probs.grad.double())
    apart = (slopes[0] - slopes[1]).abs().sum() / slopes[1].abs().sum()
    assert apart < 1e-5
    assert (slopes[0] == 0).double().mean() < 1e-3


def test_lovasz_keeps_little_for_its_gradient():
    log_probs = torch.randn(2, 6, 32, 32).log_softmax(1).requires_grad_()
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        functional.lovasz(log_probs, torch.randint(0, 6, (2, 32, 32)))
    assert sum(kept.values()) < 3 * 4 * log_probs.numel()


# -------------------------------------------------------------------------------------- presence
def test_presence_by_hand():
    # Image 0 holds classes 0 and 2, image 1 class 1: p = 0.8 or 0.2 for each class.
    label = torch.tensor([[[0, 2, -1]], [[1, 1, 1]]])
    p = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.8, 0.8]], dtype=torch.float64)
    right, wrong = -math.log(0.8), -math.log(0.2)
    loss = functional.presence(torch.logit(p), label)
    assert loss.item() == pytest.approx((4 * right + 2 * wrong) / 6)
    scores = torch.full((1, 2000), 40.0, dtype=torch.float16, requires_grad=True)
    loss = functional.presence(scores, torch.zeros(1, 2, 2).long())
    loss.backward()
    assert loss.item() == pytest.approx(40 * 1999 / 2000, rel=1e-5)  # one class of 2000 occurs
    assert loss.dtype == torch.float32 and scores.grad.isfinite().all()


def test_presence_ignores_images_without_labels():
    torch.manual_seed(0)
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 5, (3, 2, 2))
    label[1] = -1
    assert torch.autograd.gradcheck(lambda x: functional.presence(x, label), scores)
    loss = functional.presence(scores, label)
    loss.backward()
    assert not scores.grad[1].any()
    assert loss.item() == pytest.approx(functional.presence(scores[::2], label[::2]).item())
    nothing = functional.presence(scores, torch.full_like(label, -1))
    nothing.backward()
    assert nothing.item() == 0
    with pytest.raises(ValueError, match=r"scores is \(2, 4, 3, 3\).*expected \(B, C\)"):
        functional.presence(torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long))


# ------------------------------------------------------------------------------------ build_loss


def test_sums_and_factors():
    log_probs, label = sample()
    nll, dice = (build_loss(name, 5)(log_probs, label).item() for name in ("nll", "dice"))
    for name, wanted in (
        ("nll + dice", nll + dice),
        ("nll+0.5*dice", nll + 0.5 * dice),
        (" 2 * nll + 1e-1*dice", 2 * nll + 0.1 * dice),
        ("3*dice", 3 * dice),
        ("1*nll", nll),
    ):
        assert build_loss(name, 5)(log_probs, label).item() == pytest.approx(wanted)


def test_focal_dice_is_the_sum_of_both():
    log_probs, label = sample()
    weight = torch.tensor([0.5, 1.0, 0.25, 3.0, 1.5])
    for one, other in (("focal_dice", "focal+dice"), ("2*focal_dice", "2*focal+2*dice")):
        ours, theirs = (build_loss(name, 5, weight) for name in (one, other))
        assert ours(log_probs, label).item() == pytest.approx(theirs(log_probs, label).item())
        assert ours.denominator(label) == theirs.denominator(label)


@pytest.mark.parametrize("name", ["nll", "smooth", "focal", "0.5*nll+2*smooth"])
def test_means_over_devices_are_those_of_all_pixels(name):
    """Each device's loss weighed by its share of the denominators, as the module does it."""
    crit = build_loss(name, 5, torch.tensor([0.5, 1.0, 0.25, 3.0, 1.5]))
    log_probs, label = sample(size=(5, 6, 7))
    label[0], label[1, :3] = -1, -1
    parts = list(zip(log_probs.split([1, 2, 2]), label.split([1, 2, 2]), strict=True))
    total = sum(crit.denominator(y) for _, y in parts)
    assert total == pytest.approx(crit.denominator(label))
    mean = sum((crit(x, y) * crit.denominator(y) / total).item() for x, y in parts)
    assert mean == pytest.approx(crit(log_probs, label).item())


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        *(("nll", 4.5), ("nll+dice", 4.5), ("dice+nll", 4.5), ("lovasz+focal_dice", 4.5)),
        *(("dice+0.1*ohem", 4.5), ("dice", 3), ("dice+lovasz", 3)),
    ],
)
def test_the_denominator_is_that_of_the_mean_over_pixels(name, weighted):
    label, weight = torch.tensor([[[0, 2, -1, 2]]]), torch.tensor([0.5, 9.0, 2.0])
    assert build_loss(name, 3, weight).denominator(label).item() == weighted
    assert build_loss(name, 3).denominator(label).item() == 3


def test_class_weights_follow_the_device_and_stay_out_of_checkpoints():
    crit = build_loss("nll", 2, torch.tensor([1.0, 2.0]))
    assert dict(crit.state_dict()) == {}
    assert crit.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize(
    ("function", "options", "match"),
    [
        (functional.ohem, {"min_share": 1.5}, r"min_share is 1\.5"),
        (functional.focal, {"gamma": -1}, "gamma is -1"),
        *((functional.smooth, {"eps": e}, r"eps is .*within \[0, 1\]") for e in (-0.1, math.nan)),
    ],
)
def test_options_outside_their_range_are_refused(function, options, match):
    with pytest.raises(ValueError, match=match):
        function(*sample(), **options)
    for eps in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"TRAIN\.label_smoothing is"):
            build_loss("nll+smooth", 5, label_smoothing=eps)


@pytest.mark.parametrize(
    ("name", "weights", "match"),
    [
        ("nl", None, "did you mean 'nll'"),
        ("nll+", None, "unknown loss ''"),
        ("x*nll", None, r"'x\*nll': the factor before \* must be a number above 0"),
        ("nll+0*dice", None, r"'0\*dice': the factor"),
        ("nll+inf*dice", None, "number above 0"),
        ("2*3*dice", None, r"'2\*3\*dice': the factor"),
        ("nll", torch.ones(3), r"shape \(3,\).*5 classes"),
        ("nll", torch.tensor([1.0, 1, -1, 1, 1]), r"are \[1.0, 1.0, -1.0, .*0 or more"),
        ("dice", torch.tensor([1.0, 1, math.nan, 1, 1]), "nan, .*0 or more"),
        ("ohem", torch.full((5,), math.inf), "inf, .*0 or more"),
    ],
)
def test_mistakes_are_named(name, weights, match):
    with pytest.raises(ValueError, match=match):
        build_loss(name, 5, weights)
