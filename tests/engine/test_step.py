"""One step: what it computes, and how often the host waits for it."""

import copy

import pytest
import torch
from reads import reads_of
from small_runs import CPU, Small

from mit_semseg.engine.training.optim import MovingAverage, build_optimizer
from mit_semseg.engine.training.state import Progress
from mit_semseg.engine.training.step import TrainStep
from mit_semseg.losses import build_loss
from mit_semseg.models import DECODERS, SegmentationModule
from mit_semseg.precision import Precision

GPU = torch.device("cuda", 0)
CLASSES = 3


def make_step(device=CPU, **changes):
    """A step of a small network; `ema`, `kind` and `fix_bn` beside arguments of `TrainStep`."""
    torch.manual_seed(0)
    module = SegmentationModule(
        Small(), DECODERS.get("c1")((16,), CLASSES), build_loss("nll", CLASSES)
    ).to(device)
    ema, kind = changes.pop("ema", 0.0), changes.pop("kind", "SGD")
    optimizer = build_optimizer(kind, (module.encoder, 0.1), (module.decoder, 0.1))
    options = {
        "device": device,
        "precision": Precision.of("fp32", device),
        "scaler": torch.amp.GradScaler(device.type, enabled=False),
        "average": MovingAverage(module, ema) if ema else None,
        "accumulate": 1,
        "clip_grad": 0.0,
        "channels_last": False,
        "fixed": (module,) if changes.pop("fix_bn", False) else (),
        "on_nan": "stop",
        "rank": 0,
        "world": 1,
        "save_batch": lambda step, replay: "not saved",
    }
    step = TrainStep(module, module, optimizer, **{**options, **changes})
    step.training_mode()
    return step


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return [
        {
            "img_data": torch.randn(2, 3, 24, 32, generator=generator),
            "seg_label": torch.randint(-1, CLASSES, (2, 6, 8), generator=generator),
            "info": [f"{number}a.png", f"{number}b.png"],
        }
    ]


def take(step, progress, numbers):
    for number in numbers:
        step.add(batch(number))
    result = step.finish(progress)
    progress.advance(result.loss, result.accuracy, result.updated, len(numbers))
    return result


# ------------------------------------------------------------------------------ waiting
OPTIONS = {
    "plain": {},
    "clipped": {"clip_grad": 0.1},
    "averaged": {"ema": 0.9},
    "accumulated": {"accumulate": 2},
    "AdamW": {"kind": "AdamW"},
    "fixed BatchNorm": {"fix_bn": True},
    "everything": {"clip_grad": 0.1, "ema": 0.9, "accumulate": 3},
}


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_host_waits_once_a_step_and_after_the_backward_pass(monkeypatch, name, fp16):
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    step, progress = make_step(scaler=scaler, **OPTIONS[name]), Progress(10, 100)
    numbers = range(step.accumulate)
    for _ in range(3):  # the first one makes momentum, and the second averages
        step.optimizer.zero_grad(set_to_none=True)
        with reads_of(step.module, monkeypatch) as reads:
            assert take(step, progress, numbers).updated
        assert reads.found == ["tolist"]
        assert reads.before_backward == []


def test_reads_counts_every_kind_of_synchronisation(monkeypatch):
    """What the test before relies upon."""
    step = make_step()
    x = torch.arange(3.0)
    with reads_of(step.module, monkeypatch) as reads:
        float(x.sum())
        bool(x.isfinite().all())
        x.sum().item()
        x[x > 1]
        x.tolist()
    names = ["_local_scalar_dense"] * 3 + ["index", "tolist"]
    assert reads.found == names == reads.before_backward


# ------------------------------------------------------------------------------ computing
def test_a_step_by_hand():
    """Against torch's plain SGD on the mean loss of the parts."""
    step, progress = make_step(accumulate=2, clip_grad=0.05), Progress(10, 100)
    plain = copy.deepcopy(step.module)
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=False)
    for numbers in ((1, 2), (3, 4)):
        found = [plain(batch(number)[0]) for number in numbers]
        optimizer.zero_grad()
        (sum(loss for loss, _ in found) / 2).backward()
        norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        assert norm > 0.05, "otherwise nothing is clipped"
        for p in plain.parameters():
            p.grad.mul_(0.05 / norm)
        optimizer.step()
        result = take(step, progress, numbers)
        assert result.loss == pytest.approx(sum(loss.item() for loss, _ in found) / 2)
        assert result.accuracy == pytest.approx(sum(right.item() for _, right in found) / 2)
    torch.testing.assert_close(dict(step.module.state_dict()), dict(plain.state_dict()))
    assert progress.step == 2 and progress.position == 4


@pytest.mark.parametrize("fp16", [False, True])
def test_a_part_with_a_non_finite_loss_is_named_and_leaves_no_trace(fp16, caplog):
    saved = []

    def save(number, replay):
        replay["encoder"] = copy.deepcopy(replay["encoder"])
        saved.append(replay)
        return "saved"

    scaler = torch.amp.GradScaler("cpu", enabled=fp16, growth_interval=3)
    options = {"accumulate": 3, "on_nan": "skip", "ema": 0.9, "save_batch": save}
    step, progress = make_step(scaler=scaler, **options), Progress(10, 100)
    take(step, progress, (1, 2, 3))
    before = copy.deepcopy(step.module.state_dict())
    kept = copy.deepcopy([scaler.state_dict(), step.optimizer.state_dict()])
    for number in (4, 5, 6):
        item = batch(number)
        if number == 5:
            item[0]["img_data"].fill_(torch.nan)
        step.add(item)
    result = step.finish(progress)
    assert not result.updated
    assert "the loss of step 2 is nan on 5a.png, 5b.png (batch saved); the step" in caplog.text
    (replay,) = saved
    assert replay["files"] == ["5a.png", "5b.png"] and replay["step"] == 2
    torch.testing.assert_close(replay["encoder"], dict(step.module.encoder.state_dict()))
    for key, value in step.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in step.module.parameters())
    assert step.average is not None and step.average.updates == 1
    assert scaler.state_dict() == kept[0]
    torch.testing.assert_close(step.optimizer.state_dict(), kept[1])
    assert take(step, progress, (7, 8, 9)).updated, "the next one is as ever"


def test_stop_and_save_flags_are_returned():
    step, progress = make_step(), Progress(10, 100)
    for stop, save in ((False, False), (True, False), (False, True)):
        step.add(batch(1))
        result = step.finish(progress, stop=stop, save=save)
        assert (result.stop, result.save) == (stop, save)


# ------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_an_overflow_on_a_gpu_leaves_no_trace(clip_grad):
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    half = Precision.of("fp16", GPU)
    step = make_step(GPU, scaler=scaler, clip_grad=clip_grad, precision=half, ema=0.9)
    progress = Progress(10, 100)
    before = copy.deepcopy(step.module.state_dict())
    hook = step.module.decoder.conv_last.weight.register_hook(lambda grad: grad * torch.inf)
    assert not take(step, progress, (1,)).updated
    hook.remove()
    assert scaler.get_scale() == 4.0 and not step.optimizer.state
    assert step.average is not None and step.average.updates == 0
    for key, value in step.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert take(step, progress, (1,)).updated
    moved = [p.detach() - before[name] for name, p in step.module.named_parameters()]
    assert 0 < max(float(x.abs().max()) for x in moved) < 1, "momentum of nothing is 0"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_steps_on_a_gpu_are_those_of_a_cpu(kind, layout):
    """In both layouts; with a learning rate that keeps rounding small."""
    weights = []
    for device in (CPU, GPU):
        channels_last = layout == torch.channels_last
        step = make_step(device, kind=kind, channels_last=channels_last, ema=0.9)
        step.module.to(memory_format=layout)
        for group in step.optimizer.param_groups:
            group["lr"] = 1e-3
        progress = Progress(10, 100)
        for number in range(4):
            item = batch(number)
            item[0]["img_data"] = item[0]["img_data"].contiguous(memory_format=layout)
            step.add(item)
            assert step.finish(progress).updated
        weights.append({key: value.cpu() for key, value in step.evaluated.state_dict().items()})
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)
