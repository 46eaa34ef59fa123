"""SegmentationModule: the loss of a batch, of replicas and of ranks; probabilities; class maps."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pair_tester import build_pair
from processes import start_ranks
from tolerances import rounding
from torch import Tensor, nn

from mit_semseg.engine.predictor import Predictor
from mit_semseg.lib.nn import UserScatteredDataParallel
from mit_semseg.losses import build_loss, functional
from mit_semseg.models import Decoder, Encoder, ModelBuilder, SegmentationModule
from mit_semseg.models.decoders import Auxiliary

CLASSES = 4


class TinyEncoder(Encoder):
    """Two maps at strides 2 and 4; no BatchNorm, so that samples do not touch each other."""

    channels: ClassVar[tuple[int, ...]] = (6, 8)
    strides: ClassVar[tuple[int, ...]] = (2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1)
        self.second = nn.Conv2d(6, 8, 3, 2, 1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x = self.first(images).relu()
        return [x, self.second(x).relu()]


class TinyDecoder(Decoder):
    min_feature_maps = 2
    auxiliary = (Auxiliary(),)

    def __init__(self) -> None:
        super().__init__(TinyEncoder.channels, CLASSES)
        self.head = nn.Conv2d(8, CLASSES, 1)
        self.head_deepsup = nn.Conv2d(6, CLASSES, 1)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        heads: tuple[Tensor, ...] = (self.head(features[-1]),)
        return (*heads, self.head_deepsup(features[-2])) if self.training else heads


class PresenceDecoder(TinyDecoder):
    """Beside it, a head whose loss is a mean over images."""

    auxiliary = (
        Auxiliary(),
        Auxiliary(0.7, loss=functional.presence, denominator=functional.labelled_images),
    )

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        heads = super().logits(features)
        return (*heads, heads[1].mean((2, 3))) if self.training else heads


def presence() -> SegmentationModule:
    module = tiny()
    torch.manual_seed(0)
    return SegmentationModule(module.encoder, PresenceDecoder(), module.crit, 0.4).double()


def tiny(
    crit: nn.Module | None = None,
    scale: float | None = 0.4,
    mirror_pairs: Sequence[tuple[int, int]] = (),
) -> SegmentationModule:
    torch.manual_seed(0)
    crit = build_loss("nll", CLASSES) if crit is None else crit
    return SegmentationModule(
        TinyEncoder(), TinyDecoder(), crit, scale, mirror_pairs=mirror_pairs
    ).double()


def batch(size: int = 2, side: int = 16, seed: int = 0, ignored: float = 0.3) -> dict[str, Tensor]:
    rs = np.random.RandomState(seed)
    label = rs.randint(0, CLASSES, (size, side // 4, side // 4))
    label[rs.rand(*label.shape) < ignored] = -1
    return {
        "img_data": torch.from_numpy(rs.randn(size, 3, side, side)),
        "seg_label": torch.from_numpy(label),
    }


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


# -------------------------------------------------------------------------------------- training
def test_loss_and_accuracy_by_their_definition() -> None:
    module, data = tiny().train(), batch()
    loss, accuracy = module(data)
    main, aux = module.decoder.logits(module.encoder(data["img_data"], return_feature_maps=True))
    aux = F.interpolate(aux, size=main.shape[2:], mode="bilinear", align_corners=False)
    label = data["seg_label"]
    wanted = F.cross_entropy(main, label, ignore_index=-1)
    wanted = wanted + 0.4 * F.cross_entropy(aux, label, ignore_index=-1)
    assert loss.item() == pytest.approx(wanted.item())
    valid = label >= 0
    assert accuracy.item() == pytest.approx((main.argmax(1) == label)[valid].double().mean().item())


def test_logits_are_resized_to_the_label() -> None:
    module, data = tiny().eval(), batch()
    data["seg_label"] = torch.from_numpy(np.random.RandomState(1).randint(-1, CLASSES, (2, 11, 13)))
    logits = F.interpolate(
        module.logits(data["img_data"]), size=(11, 13), mode="bilinear", align_corners=False
    )
    wanted = F.cross_entropy(logits, data["seg_label"], ignore_index=-1)
    assert module(data)[0].item() == pytest.approx(wanted.item())


def test_use_softmax_does_not_change_the_loss() -> None:
    module, data = tiny().train(), batch()
    wanted = module(data)[0].item()
    module.decoder.use_softmax = True
    assert module(data)[0].item() == wanted


@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 4.0]])
def test_torchs_own_loss_gives_the_same(weight: list[float] | None) -> None:
    weights = None if weight is None else torch.tensor(weight)
    ours = tiny(build_loss("nll", CLASSES, weights))
    theirs = tiny(nn.NLLLoss(weights, ignore_index=-1))
    data = [batch(seed=1), batch(seed=2, ignored=0.9)]
    for one, other in zip(ours.prepare_scatter(data), theirs.prepare_scatter(data), strict=True):
        assert ours(one)[0].item() == pytest.approx(theirs(other)[0].item())


@pytest.mark.parametrize("crit", [build_loss("nll", CLASSES), nn.NLLLoss(ignore_index=-1)])
def test_all_ignored_is_zero_with_a_graph(crit: nn.Module) -> None:
    module = tiny(crit).train()
    loss, accuracy = module(batch(ignored=1.1))
    loss.backward()
    assert loss.item() == accuracy.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(module).values())


def test_log_probabilities_are_float32_under_autocast() -> None:
    module = tiny().float().train()
    data = {k: v.float() if v.is_floating_point() else v for k, v in batch().items()}
    wanted = module(data)[0].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.logits(data["img_data"]).dtype == torch.bfloat16
        features = module.encoder(data["img_data"], return_feature_maps=True)
        assert all(x.dtype == torch.float32 for x in module.decoder.log_probabilities(features))
        loss, _ = module(data)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=0.02)


# ------------------------------------------------------------------------- replicas and processes
@pytest.mark.parametrize("kind", ["plain", "weighted", "presence"])
def test_replicas_learn_the_loss_of_the_union(kind: str) -> None:
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


def test_replicas_of_a_real_model_learn_the_loss_of_the_union() -> None:
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("mobilenetv2dilated", weights="none")
    decoder = ModelBuilder.build_decoder("c1_deepsup", num_class=CLASSES, channels=encoder.channels)
    whole = SegmentationModule(encoder, decoder, build_loss("nll", CLASSES), 0.4).double().train()
    apart = copy.deepcopy(whole)
    parts = [batch(1, 32, seed=1), batch(2, 32, seed=2, ignored=0.8)]
    union = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    loss, accuracy = whole(union)
    losses, accuracies = UserScatteredDataParallel(apart, device_ids=["cpu", "cpu"])(parts)
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    assert accuracies.mean().item() == pytest.approx(accuracy.item())


def test_prepare_scatter_leaves_the_batches_it_was_given_alone() -> None:
    data = [batch(), {"img_data": batch()["img_data"]}]
    assert [set(x) for x in tiny().prepare_scatter(data)] == [set(x) for x in data]
    tiny().prepare_scatter(data[:1])
    assert set(data[0]) == {"img_data", "seg_label"}


def _rank(rank: int, store: str, results: str, own_loss: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    module = nn.parallel.DistributedDataParallel((presence if own_loss else tiny)().train())
    loss, accuracy = module([batch(1, seed=1), batch(3, seed=2, ignored=0.9)][rank])
    loss.backward()
    torch.save((loss.detach(), accuracy, gradients(module.module)), f"{results}{rank}")
    # Together, and without the wrapper that still refers to the group: gloo aborts a process whose
    # peer goes first.
    del module
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("own_loss", [False, True])
def test_ranks_learn_the_loss_of_the_union(own_loss: bool) -> None:
    parts = [batch(1, seed=1), batch(3, seed=2, ignored=0.9)]
    module = (presence if own_loss else tiny)().train()
    loss, accuracy = module({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, 2, f"{folder}/store", f"{folder}/result", own_loss)
        ranks = [torch.load(f"{folder}/result{rank}", weights_only=True) for rank in range(2)]
    assert np.mean([r[0].item() for r in ranks]) == pytest.approx(loss.item())
    assert np.mean([r[1].item() for r in ranks]) == pytest.approx(accuracy.item())
    for name, gradient in gradients(module).items():
        assert torch.allclose(ranks[0][2][name], gradient, atol=1e-12), name


# ------------------------------------------------------------------------------------- inference
def published_procedure(module: SegmentationModule, images: list[Tensor], size: tuple) -> Tensor:
    total = torch.zeros(())
    for image in images:
        x = F.interpolate(module.logits(image), size=size, mode="bilinear", align_corners=False)
        total = total + F.softmax(x, dim=1) / len(images)
    return total


@pytest.mark.parametrize("use_softmax", [False, True])
def test_inference_follows_the_published_procedure(use_softmax: bool) -> None:
    module = tiny().eval()
    module.decoder.use_softmax = use_softmax
    images = [batch(side=side, seed=side)["img_data"] for side in (16, 24)]
    with torch.no_grad():
        wanted = published_procedure(module, images, (29, 35))
        probabilities = module({"img_data": images[0]}, segSize=(29, 35))
    assert torch.allclose(probabilities, published_procedure(module, images[:1], (29, 35)))
    predictor = Predictor(module, {}, "cpu")
    labels = predictor.labels(predictor.logits(images), (29, 35))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, wanted.argmax(1))


def test_flipping_averages_over_the_mirrored_images() -> None:
    module = tiny().eval()
    image = batch()["img_data"]
    with torch.no_grad():
        straight = published_procedure(module, [image], (20, 20))
        mirrored = published_procedure(module, [image.flip(-1)], (20, 20)).flip(-1)
    predictor = Predictor(module, {}, "cpu", flip=True)
    labels = predictor.labels(predictor.logits([image]), (20, 20))
    assert torch.equal(labels, (straight + mirrored).argmax(1))


def test_flipping_exchanges_left_and_right() -> None:
    """Classes 1 and 3 are the left and the right of something, in pictures of both kinds."""
    plain, module = tiny().eval(), tiny(mirror_pairs=[(1, 3)]).eval()
    module.load_state_dict(plain.state_dict())
    image = batch()["img_data"]
    with torch.no_grad():
        straight = published_procedure(plain, [image], (20, 20))
        mirrored = published_procedure(plain, [image.flip(-1)], (20, 20)).flip(-1)
    mirrored[:, 1], mirrored[:, 3] = mirrored[:, 3].clone(), mirrored[:, 1].clone()
    wanted = (straight + mirrored).argmax(1)
    labels = []
    for one in (module, plain):
        predictor = Predictor(one, {}, "cpu", flip=True)
        labels.append(predictor.labels(predictor.logits([image]), (20, 20)))
    assert torch.equal(labels[0], wanted) and not torch.equal(labels[1], wanted)


def test_mirror_pairs_of_classes_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"mirror_pairs are \(\(1, 99\),\), the classes 0 to"):
        tiny(mirror_pairs=[(1, 99)])


# -------------------------------------------------------------------------------------- mistakes
def test_one_value_a_channel_is_named_with_what_to_do() -> None:
    module = build_pair("resnet18", "linknet").train()
    one = {"img_data": torch.randn(1, 3, 32, 32), "seg_label": torch.zeros(1, 32, 32).long()}
    with pytest.raises(ValueError, match=r"batch of 1 with 32 x 32 pixels.*batch_size_per_gpu"):
        module(one)


def test_images_of_other_channels_are_refused() -> None:
    module = build_pair("resnet18", "c1").eval()
    with pytest.raises(ValueError, match=r"images have 4 channels .* takes 3.*DATASET\.depth"):
        module.logits(torch.randn(1, 4, 32, 32))


def test_weights_of_all_auxiliary_heads_can_be_given() -> None:
    data = batch()

    def loss(*weights: float) -> Tensor:
        module = presence().train()
        module.aux_weights = weights
        return module(data)[0]

    torch.testing.assert_close(loss(0.4, 0.7), loss())
    parts = loss(1, 0) - loss(0, 0), loss(0, 1) - loss(0, 0)
    assert min(parts) > 0.01
    torch.testing.assert_close(loss(0.1, 2), loss(0, 0) + 0.1 * parts[0] + 2 * parts[1])


def test_weights_of_a_batch_come_together() -> None:
    with pytest.raises(ValueError, match="acc_weight"):
        tiny().train()({**batch(), "loss_weight": torch.ones(())})


def test_a_list_with_one_batch_is_that_batch() -> None:
    module, data = tiny().train(), batch()
    assert module([data])[0].item() == module(data)[0].item()


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match=r"net_dec is a Linear: derive it from .*Decoder"):
        SegmentationModule(TinyEncoder(), nn.Linear(1, 1), None)  # type: ignore[arg-type]
    module, data = tiny(), batch()
    with pytest.raises(ValueError, match="list of 2.*UserScatteredDataParallel"):
        module([data, data])
    with pytest.raises(TypeError, match="dict with img_data, got Tensor"):
        module(data["img_data"])
    with pytest.raises(ValueError, match="no 'seg_label'.*has: img_data"):
        module({"img_data": data["img_data"]})
    with pytest.raises(ValueError, match="no 'img_data'"):
        module({"seg_label": data["seg_label"]}, segSize=(8, 8))
    with pytest.raises(ValueError, match="images is empty"):
        Predictor(tiny(), {}, "cpu").logits([])
    with pytest.raises(ValueError, match="crit is None"):
        SegmentationModule(TinyEncoder(), TinyDecoder(), None).double().eval()(data)
    with pytest.raises(ValueError, match="deep_sup_scale"):
        tiny(scale=None).train()(data)
    assert torch.equal(tiny(scale=None).eval()(data)[0], tiny().eval()(data)[0])
    with pytest.raises(ValueError, match=r"aux_weights are \[1\]; .* PresenceDecoder: 2"):
        SegmentationModule(TinyEncoder(), PresenceDecoder(), None, aux_weights=[1])
    plain = ModelBuilder.build_decoder("c1", num_class=CLASSES, channels=TinyEncoder.channels)
    with pytest.warns(UserWarning, match=r"deep_sup_scale 0\.4 is ignored: C1"):
        SegmentationModule(TinyEncoder(), plain, None, 0.4)


# ------------------------------------------------------------------------- compilers and layouts
@pytest.fixture(scope="module")
def real() -> SegmentationModule:
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder("mobilenetv2dilated", weights="none")
    decoder = ModelBuilder.build_decoder("c1_deepsup", num_class=5, channels=encoder.channels)
    return SegmentationModule(encoder, decoder, build_loss("nll", 5), 0.4).eval()


class Logits(nn.Module):
    """What is exported: a tensor in, a tensor out."""

    def __init__(self, module: SegmentationModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> Tensor:
        return self.module.logits(image)


def test_exports_for_any_size(real: SegmentationModule) -> None:
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
def test_compiles_training_without_a_break(real: SegmentationModule) -> None:
    data = {
        "img_data": torch.randn(1, 3, 64, 64),
        "seg_label": torch.randint(-1, 5, (1, 16, 16)),
    }
    compiled = torch.compile(real, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(data)[0].item() == pytest.approx(real(data)[0].item(), rel=1e-5)


def test_channels_last_gives_the_same(real: SegmentationModule) -> None:
    image = torch.randn(1, 3, 64, 64)
    last = copy.deepcopy(real).to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = real.logits(image)
        got = last.logits(image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted, rtol=0, atol=rounding(wanted, 100))
