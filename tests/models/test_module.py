"""SegmentationModule: the loss of a batch, of replicas and of ranks; probabilities; class maps."""

import copy
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pairs import Pair
from processes import start_ranks
from tolerances import rounding
from torch import nn

from mit_semseg.engine.predictor import Predictor
from mit_semseg.lib.nn import UserScatteredDataParallel
from mit_semseg.losses import build_loss, functional
from mit_semseg.models import Decoder, Encoder, ModelBuilder, SegmentationModule
from mit_semseg.models.decoders import Auxiliary

CLASSES = 4


class TinyEncoder(Encoder):
    """Two maps at strides 2 and 4; no BatchNorm, so that samples do not touch each other."""

    channels = (6, 8)
    strides = (2, 4)

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1)
        self.second = nn.Conv2d(6, 8, 3, 2, 1)

    def feature_maps(self, images):
        x = self.first(images).relu()
        return [x, self.second(x).relu()]


class TinyDecoder(Decoder):
    min_feature_maps = 2
    auxiliary = (Auxiliary(),)

    def __init__(self):
        super().__init__(TinyEncoder.channels, CLASSES)
        self.head = nn.Conv2d(8, CLASSES, 1)
        self.head_deepsup = nn.Conv2d(6, CLASSES, 1)

    def logits(self, features):
        heads = (self.head(features[-1]),)
        return (*heads, self.head_deepsup(features[-2])) if self.training else heads


class PresenceDecoder(TinyDecoder):
    """Beside it, a head whose loss is a mean over images."""

    auxiliary = (
        Auxiliary(),
        Auxiliary(0.7, loss=functional.presence, denominator=functional.labelled_images),
    )

    def logits(self, features):
        heads = super().logits(features)
        return (*heads, heads[1].mean((2, 3))) if self.training else heads


def presence():
    module = tiny()
    torch.manual_seed(0)
    return SegmentationModule(module.encoder, PresenceDecoder(), module.crit, 0.4).double()


def tiny(crit=None, scale=0.4, mirror_pairs=()):
    torch.manual_seed(0)
    crit = build_loss("nll", CLASSES) if crit is None else crit
    return SegmentationModule(
        TinyEncoder(), TinyDecoder(), crit, scale, mirror_pairs=mirror_pairs
    ).double()


def batch(size=2, side=16, seed=0, ignored=0.3):
    rs = np.random.RandomState(seed)
    label = rs.randint(0, CLASSES, (size, side // 4, side // 4))
    label[rs.rand(*label.shape) < ignored] = -1
    return {
        "img_data": torch.from_numpy(rs.randn(size, 3, side, side)),
        "seg_label": torch.from_numpy(label),
    }


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


# -------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("size", [(4, 4), (11, 13)])
def test_loss_and_accuracy_by_their_definition(size):
    """Of all heads, whose scores are resized to the label."""
    module, data = tiny().train(), batch()
    label = torch.randint(-1, CLASSES, (2, *size), generator=torch.Generator().manual_seed(1))
    data["seg_label"] = label
    loss, accuracy = module(data)
    heads = [
        F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        for scores in module.decoder.logits(module.encoder(data["img_data"], True))
    ]
    wanted = [F.cross_entropy(scores, label, ignore_index=-1) for scores in heads]
    assert loss.item() == pytest.approx((wanted[0] + 0.4 * wanted[1]).item())
    valid = label >= 0
    right = (heads[0].argmax(1) == label)[valid].double().mean()
    assert accuracy.item() == pytest.approx(right.item())
    assert module([data])[0].item() == loss.item(), "a list with one batch is that batch"
    module.decoder.use_softmax = True
    assert module(data)[0].item() == loss.item()
    assert module.eval()(data)[0].item() == pytest.approx(wanted[0].item())


@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 4.0]])
def test_torchs_own_loss_gives_the_same(weight):
    weights = None if weight is None else torch.tensor(weight)
    ours = tiny(build_loss("nll", CLASSES, weights))
    theirs = tiny(nn.NLLLoss(weights, ignore_index=-1))
    data = [batch(seed=1), batch(seed=2, ignored=0.9)]
    for one, other in zip(ours.prepare_scatter(data), theirs.prepare_scatter(data), strict=True):
        assert ours(one)[0].item() == pytest.approx(theirs(other)[0].item())


@pytest.mark.parametrize("crit", [build_loss("nll", CLASSES), nn.NLLLoss(ignore_index=-1)])
def test_all_ignored_is_zero_with_a_graph(crit):
    module = tiny(crit).train()
    loss, accuracy = module(batch(ignored=1.1))
    loss.backward()
    assert loss.item() == accuracy.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(module).values())


# ------------------------------------------------------------------------- replicas and processes
@pytest.mark.parametrize("kind", ["plain", "weighted", "presence"])
def test_replicas_learn_the_loss_of_the_union(kind):
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0]) if kind == "weighted" else None
    whole = presence() if kind == "presence" else tiny(build_loss("nll", CLASSES, weights))
    whole.train()
    apart = copy.deepcopy(whole)
    parts = [batch(1, seed=1), batch(3, seed=2, ignored=0.9), batch(1, seed=3, ignored=1.1)]
    union = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    loss, accuracy = whole(union)
    loss.backward()
    replicas = UserScatteredDataParallel(apart, device_ids=["cpu"] * 3)
    losses, accuracies = replicas(parts)
    losses.mean().backward()
    assert losses.shape == accuracies.shape == (3,)
    assert losses.mean().item() == pytest.approx(loss.item())
    assert accuracies.mean().item() == pytest.approx(accuracy.item())
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradients(apart)[name], gradient, atol=1e-12), name


def test_prepare_scatter_does_not_change_its_batches():
    data = [batch(), {"img_data": batch()["img_data"]}]
    assert [set(x) for x in tiny().prepare_scatter(data)] == [set(x) for x in data]
    tiny().prepare_scatter(data[:1])
    assert set(data[0]) == {"img_data", "seg_label"}


def _rank(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    module = nn.parallel.DistributedDataParallel(presence().train())
    loss, accuracy = module([batch(1, seed=1), batch(3, seed=2, ignored=0.9)][rank])
    loss.backward()
    torch.save((loss.detach(), accuracy, gradients(module.module)), f"{results}{rank}")
    # Together, and without the wrapper that still refers to the group: gloo aborts a process whose
    # peer goes first.
    del module
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_learn_the_loss_of_the_union():
    parts = [batch(1, seed=1), batch(3, seed=2, ignored=0.9)]
    module = presence().train()
    loss, accuracy = module({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, 2, f"{folder}/store", f"{folder}/result")
        ranks = [torch.load(f"{folder}/result{rank}", weights_only=True) for rank in range(2)]
    assert np.mean([r[0].item() for r in ranks]) == pytest.approx(loss.item())
    assert np.mean([r[1].item() for r in ranks]) == pytest.approx(accuracy.item())
    for name, gradient in gradients(module).items():
        assert torch.allclose(ranks[0][2][name], gradient, atol=1e-12), name


# ------------------------------------------------------------------------------------- inference
def published_procedure(module, image, size):
    x = F.interpolate(module.logits(image), size=size, mode="bilinear", align_corners=False)
    return F.softmax(x, dim=1)


@pytest.mark.parametrize("use_softmax", [False, True])
def test_probabilities_follow_the_published_procedure(use_softmax):
    module, image = tiny().eval(), batch()["img_data"]
    module.decoder.use_softmax = use_softmax
    with torch.no_grad():
        probabilities = module({"img_data": image}, segSize=(29, 35))
        assert torch.allclose(probabilities, published_procedure(module, image, (29, 35)))


def test_flipping_averages_over_the_mirrored_image():
    """Classes 1 and 3 are the left and the right of something, in images of both kinds."""
    plain, module = tiny().eval(), tiny(mirror_pairs=[(1, 3)]).eval()
    image = batch()["img_data"]
    with torch.no_grad():
        straight = published_procedure(plain, image, (20, 20))
        mirrored = published_procedure(plain, image.flip(-1), (20, 20)).flip(-1)
    wanted = {
        plain: (straight + mirrored).argmax(1),
        module: (straight + mirrored[:, [0, 3, 2, 1]]).argmax(1),
    }
    for one, labels in wanted.items():
        predictor = Predictor(one, {}, "cpu", flip=True)
        assert torch.equal(predictor.labels(predictor.logits([image]), (20, 20)), labels)
    assert not torch.equal(*wanted.values())


# -------------------------------------------------------------------------------------- mistakes
def test_weights_of_all_auxiliary_heads_can_be_given():
    data = batch()

    def loss(*weights):
        module = presence().train()
        module.aux_weights = weights
        return module(data)[0]

    torch.testing.assert_close(loss(0.4, 0.7), loss())
    parts = loss(1, 0) - loss(0, 0), loss(0, 1) - loss(0, 0)
    assert min(parts) > 0.01
    torch.testing.assert_close(loss(0.1, 2), loss(0, 0) + 0.1 * parts[0] + 2 * parts[1])


def c1():
    return ModelBuilder.build_decoder("c1", num_class=CLASSES, channels=TinyEncoder.channels)


ONE = {"img_data": torch.randn(1, 3, 32, 32), "seg_label": torch.zeros(1, 32, 32).long()}
MISTAKES = {
    r"net_dec is a Linear: derive it from .*Decoder": lambda: SegmentationModule(
        TinyEncoder(), nn.Linear(1, 1), None
    ),
    r"aux_weights is \[1\]; .* PresenceDecoder: 2": lambda: SegmentationModule(
        TinyEncoder(), PresenceDecoder(), None, aux_weights=[1]
    ),
    r"mirror_pairs are \(\(1, 99\),\); classes are 0 to": lambda: tiny(mirror_pairs=[(1, 99)]),
    "list of 2.*UserScatteredDataParallel": lambda: tiny()([batch(), batch()]),
    "dict with img_data, got Tensor": lambda: tiny()(batch()["img_data"]),
    "no 'seg_label'.*its keys: img_data": lambda: tiny()({"img_data": batch()["img_data"]}),
    "no 'img_data'": lambda: tiny()({"seg_label": batch()["seg_label"]}, segSize=(8, 8)),
    "images is empty": lambda: Predictor(tiny(), {}, "cpu").logits([]),
    "crit is None": lambda: SegmentationModule(TinyEncoder(), c1(), None).double()(batch()),
    "deep_sup_scale": lambda: tiny(scale=None).train()(batch()),
    "acc_weight": lambda: tiny().train()({**batch(), "loss_weight": torch.ones(())}),
    r"images have 4 channels .* expects 3.*DATASET\.depth": lambda: (
        Pair("resnet18", "c1").build().logits(torch.randn(1, 4, 32, 32))
    ),
    r"batch of 1 with 32 x 32 pixels.*batch_size_per_gpu": lambda: (
        Pair("resnet18", "linknet").build().train()(ONE)
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        MISTAKES[message]()


def test_a_scale_that_no_head_has_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match=r"deep_sup_scale 0\.4 is ignored: C1"):
        SegmentationModule(TinyEncoder(), c1(), None, 0.4)
    assert torch.equal(tiny(scale=None).eval()(batch())[0], tiny().eval()(batch())[0])


# ------------------------------------------------------------------------- compilers and layouts
@pytest.fixture(scope="module")
def real():
    return Pair("mobilenetv2dilated", "c1_deepsup").build().eval()


class Logits(nn.Module):
    """What is exported: a tensor in, a tensor out."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, image):
        return self.module.logits(image)


def test_exports_for_any_size(real):
    # Before torch 2.6 sizes must be declared by hand, divisors and all: there, one size only.
    auto = getattr(torch.export.Dim, "AUTO", None)
    program = torch.export.export(
        Logits(real),
        (torch.randn(2, 3, 64, 96),),
        dynamic_shapes={"image": {0: auto, 2: auto, 3: auto}} if auto else None,
        strict=False,
    ).module()
    image = torch.randn(3, 3, 96, 128) if auto else torch.randn(2, 3, 64, 96)
    wanted = real.logits(image)
    torch.testing.assert_close(program(image), wanted, rtol=0, atol=rounding(wanted, 100))


@pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="torch 2.4 breaks graphs at context managers"
)
def test_compiles_training_without_a_break(real):
    data = {"img_data": torch.randn(1, 3, 64, 64), "seg_label": torch.randint(-1, 5, (1, 16, 16))}
    compiled = torch.compile(real, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(data)[0].item() == pytest.approx(real(data)[0].item(), rel=1e-5)


def test_channels_last_gives_the_same(real):
    image = torch.randn(1, 3, 64, 64)
    last = copy.deepcopy(real).to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = real.logits(image)
        got = last.logits(image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted, rtol=0, atol=rounding(wanted, 100))
