"""What every decoder must do, whatever it computes."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from pairs import set_gammas, without_gradient
from torch import nn

from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder
from mit_semseg.models.decoders.fcn import FCN
from mit_semseg.models.decoders.upernet import UPerNet
from mit_semseg.weights import load_into

WIDTHS = {
    320: (24, 32, 64, 160, 320),
    512: (64, 128, 256, 512),
    720: (720,),
    2048: (256, 512, 1024, 2048),
}
CHANNELS = (12, 20, 28, 36)
SIDES = ((12, 18), (6, 9), (3, 5), (3, 5))
# A pixel alone in its block has nothing to attend to.
LARGER = {"ocnet_pyramid": ((13, 14),) * 4}
# The deeper and wider ones differ in numbers only.
LARGE = {"fcdensenet67", "fcdensenet103", "hamburger_b", "hamburger_l", "segformer_wide"}
ARCHS = sorted({*DECODERS.first_names()} - LARGE)
every_decoder = pytest.mark.parametrize("arch", ARCHS)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """FCN's 4096 channels and UPerNet's 512 are not needed here."""
    monkeypatch.setattr(FCN, "width", 64)
    monkeypatch.setattr(UPerNet, "fpn_dim", 64)


def build(arch, **options):
    """For maps of `CHANNELS`, or for its own encoder where it has one."""
    torch.manual_seed(0)
    given = {"channels": CHANNELS, "num_class": 5}
    for own in DECODERS.get(arch).supported_encoders[:1]:
        encoder = ENCODERS.get(own)
        given |= {"channels": encoder.channels, "strides": encoder.strides}
    decoder = ModelBuilder.build_decoder(arch, **{**given, **options})
    set_gammas(decoder)
    return decoder


def maps_for(arch, batch=2):
    """Feature maps that a decoder reads, those of its own encoder where it has one."""
    return [x[:batch].clone() for x in _emitted(arch)]


@cache
@torch.no_grad()
def _emitted(arch):
    torch.manual_seed(1)
    if own := DECODERS.get(arch).supported_encoders:
        encoder = ModelBuilder.build_encoder(own[0], weights="none")
        return tuple(encoder(torch.randn(2, 3, 64, 96), return_feature_maps=True))
    sides = LARGER.get(arch, SIDES)
    return tuple(torch.randn(2, c, *side) for c, side in zip(CHANNELS, sides, strict=True))


def heads_of(out):
    return out if isinstance(out, tuple) else (out,)


def test_published_state_dicts(published_shapes, monkeypatch):
    monkeypatch.undo()  # all channels
    stored = [x.split("/")[1:] for x in published_shapes if x.startswith("decoder/")]
    assert len(stored) == 10
    for arch, name in stored:
        fc_dim = int(name.removeprefix("fc"))
        for channels in (None, WIDTHS[fc_dim]):
            with torch.device("meta"):
                decoder = ModelBuilder.build_decoder(arch, fc_dim=fc_dim, channels=channels)
            own = {key: list(value.shape) for key, value in decoder.state_dict().items()}
            assert own == published_shapes[f"decoder/{arch}/{name}"]


@every_decoder
@torch.no_grad()
def test_works_with_any_widths_and_levels(arch):
    cls = DECODERS.get(arch)
    for channels in ((20,), (9, 8), (8, 12, 24), (6, 8, 12, 20, 8)):
        if len(channels) < cls.min_feature_maps:
            with pytest.raises(ValueError, match=f"{arch} needs at least {cls.min_feature_maps}"):
                ModelBuilder.build_decoder(arch, channels=channels, num_class=5)
        elif not cls.supported_encoders:
            with torch.device("meta"):
                decoder = ModelBuilder.build_decoder(arch, channels=channels, num_class=5).eval()
                maps = [torch.zeros(2, c, 16 - i, 20 - i) for i, c in enumerate(channels)]
                (logits,) = decoder.logits(maps)
            assert logits.shape[:2] == (2, 5)


def test_segnet_refuses_maps_that_no_pooling_gives():
    with pytest.raises(ValueError, match="segnet"):
        ModelBuilder.build_decoder("segnet", channels=(4, 8, 12, 16, 16, 12), num_class=5)


@every_decoder
def test_training_gives_log_probabilities_and_trains_every_parameter(arch):
    """From one image, as the smallest batch has."""
    decoder = build(arch).train()
    heads = heads_of(decoder(maps_for(arch, batch=1)))
    assert len(heads) == 1 + len(decoder.auxiliary)
    for head, auxiliary in zip(heads, (None, *decoder.auxiliary)):
        if auxiliary is None or auxiliary.loss is None:
            assert head.shape[:2] == (1, 5)
            torch.testing.assert_close(head.exp().sum(1), torch.ones(1, *head.shape[2:]))
    sum((x * torch.randn_like(x)).sum() for x in heads).backward()
    assert without_gradient(decoder) == []


@every_decoder
def test_inference_resizes_logits_before_the_softmax(arch):
    decoder, maps = build(arch, use_softmax=True).eval(), maps_for(arch)
    (logits,) = decoder.logits(maps)
    resized = F.interpolate(logits, size=(31, 47), mode="bilinear", align_corners=False)
    assert torch.equal(decoder(maps, segSize=(31, 47)), F.softmax(resized, dim=1))
    assert torch.equal(decoder(maps), F.softmax(logits, dim=1))
    decoder.use_softmax = False
    assert torch.equal(decoder(maps, segSize=(31, 47)), F.log_softmax(resized, dim=1))


@every_decoder
def test_initial_weights_are_as_published(arch):
    for module in build(arch).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.full_like(module.bias, 1e-4))
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


@every_decoder
def test_a_coarse_label_trains_every_score(arch):
    """DATASET.segm_downsampling_rate may be larger than the stride of the scores."""
    decoder = build(arch).train()
    emitted = []
    score = decoder.logits

    def watched(features):
        emitted.extend(score(features))
        for scores in emitted:
            scores.retain_grad()
        return tuple(emitted)

    decoder.logits = watched
    losses = (None, *(head.loss for head in decoder.auxiliary))
    heads = decoder.log_probabilities(maps_for(arch), (3, 2))
    sum((x * torch.randn_like(x)).sum() for x in heads).backward()
    sizes = [x.shape[2:] for x, loss in zip(heads, losses, strict=True) if not loss]
    assert sizes == [(3, 2)] * losses.count(None)
    assert all(scores.grad is not None and scores.grad.all() for scores in emitted)


@every_decoder
def test_another_number_of_classes_leaves_out_what_depends_on_it(arch):
    source, target = build(arch, num_class=7), build(arch, num_class=5)
    with torch.no_grad():
        for value in source.state_dict().values():
            value.fill_(3)
    theirs, before = source.state_dict(), copy.deepcopy(target.state_dict())
    differ = [k for k, value in before.items() if value.shape != theirs[k].shape]
    report = load_into(target, theirs, what="decoder")
    assert (report.mismatched, report.missing, report.unexpected) == (differ, [], [])
    assert set(differ) == set(target.class_tensors())
    for key, value in target.state_dict().items():
        assert torch.equal(value, (before if key in differ else theirs)[key])
    wrong = {**theirs, differ[0]: theirs[differ[0]].unsqueeze(0)}
    with pytest.raises(ValueError, match="1 tensors differ in shape"):
        load_into(target, wrong, what="decoder")


def test_dilations_follow_the_output_stride_of_the_encoder():
    for strides, rates in (
        (None, [6, 12, 18]),
        ((4, 8, 16, 16), [6, 12, 18]),
        ((4, 8, 8, 8), [12, 24, 36]),
        ((4, 8, 16, 32), [3, 6, 9]),
    ):
        for arch, wanted in (("deeplabv3", rates), ("deeplabv3_wide_deepsup", [12, 24, 36])):
            with torch.device("meta"):
                decoder = DECODERS.get(arch)((4, 4, 4, 8), num_class=3, strides=strides)
            convs = [branch[0] for branch in decoder.aspp.convs[1:4]]
            assert [conv.dilation[0] for conv in convs] == wanted
            assert all(conv.padding == conv.dilation for conv in convs)


@pytest.mark.parametrize(
    ("arch", "kind", "rates"),
    [
        ("deeplabv3plus", nn.Dropout, [0.1]),  # in the authors' code
        ("deeplabv3", nn.Dropout, [0.5]),  # in torchvision, whose weights it takes
        ("ocnet_base", nn.Dropout2d, [0.05, 0.05]),
        ("ocnet_pyramid", nn.Dropout2d, [0.05, 0.05]),
        ("ocnet_asp", nn.Dropout2d, [0.1, 0.1]),
    ],
)
def test_dropout_is_that_of_the_authors(arch, kind, rates):
    with torch.device("meta"):
        decoder = DECODERS.get(arch)((8, 16), num_class=3)
    assert [m.p for m in decoder.modules() if isinstance(m, kind)] == rates


def test_weights_of_auxiliary_losses_are_the_published_ones():
    for arch, weights in {
        "icnet": [0.4, 0.16],
        "bisenet": [1, 1],
        "encnet": [0.2, None],
        "ddrnet_23": [0.4],
        "bisenetv2": [1, 1, 1, 1],
        "stdc": [1, 1, 1],
        "ppliteseg_t": [1, 1],
    }.items():
        assert [head.weight for head in DECODERS.get(arch).auxiliary] == weights, arch
