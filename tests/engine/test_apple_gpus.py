"""Apple GPUs (mps), as far as a machine without one can tell: they have no float64 and no CUDA."""

import numpy as np
import pytest
import torch
from test_step import OPTIONS, make_step, take
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.engine import predictor
from mit_semseg.engine.devices import resolve_devices, usable_device
from mit_semseg.engine.predictor import Predictor, out_of_memory
from mit_semseg.engine.rendezvous import join_process_group
from mit_semseg.engine.training.build import build, keeps_channels_last, shape_bucket
from mit_semseg.engine.training.optim import build_optimizer
from mit_semseg.engine.training.state import Progress
from mit_semseg.losses import LOSSES, build_loss
from mit_semseg.metrics import confusion_matrix
from mit_semseg.models import ENCODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.tiles import Sliding
from mit_semseg.precision import Precision

MPS = torch.device("mps")
CLASSES = 5


class OnMps(Tensor):
    """A tensor that says it is on an Apple GPU."""

    device = MPS


# ------------------------------------------------------------------------------ which device
def test_a_device_is_taken_where_torch_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_devices("mps") == [usable_device("mps")] == [MPS]
    with pytest.raises(ValueError, match="--gpus mps,0: name GPUs or mps, not both"):
        resolve_devices("mps,0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    no = "this machine has no Apple GPU that torch can use"
    with pytest.raises(ValueError, match=f"^--gpus mps, but {no}; --gpus cpu runs without one$"):
        resolve_devices("mps")
    with pytest.raises(ValueError, match=f"^device is 'mps', but {no}; device 'cpu' runs"):
        usable_device("mps")


def test_there_is_one_process(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="--gpus mps is a single device: start .* without torchrun"
    ):
        join_process_group([MPS])


def test_precisions(monkeypatch, settings):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: True)
    dtypes = [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
    for name, dtype in dtypes:
        assert Precision.of(name, MPS) == Precision(MPS, dtype, tf32=False)
    with pytest.raises(ValueError, match="precision tf32 needs an NVIDIA GPU; on mps use fp32"):
        Precision.of("tf32", MPS)
    with pytest.raises(ValueError, match="TRAIN.precision fp16 scales the loss"):
        build(settings(TRAIN__precision="fp16"), [MPS])
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    with pytest.raises(ValueError, match="VAL.p bf16 needs autocast, which torch .*; use fp32"):
        Precision.of("bf16", MPS, "VAL.p")


def test_what_is_for_other_devices_is_left_out():
    assert not keeps_channels_last("auto", Precision.of("fp32", MPS), nn.Conv2d(1, 1, 1))
    assert shape_bucket("auto", MPS, fixed_size=False) == 1
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    layer = nn.Linear(2, 2, bias=False)
    assert build_optimizer("SGD", (layer, 0.1)).defaults["fused"]
    layer.weight.__class__ = type("Weight", (nn.Parameter,), {"device": MPS})
    assert not build_optimizer("SGD", (layer, 0.1)).defaults["fused"]


def test_weights_of_ranks_are_float32():
    module = make_step().module
    label = torch.tensor([[[0, -1], [1, 1]]])
    assert module._denominators(label).dtype == torch.float64
    found = module._denominators(label.as_subclass(OnMps)).as_subclass(Tensor)
    assert found.dtype == torch.float32 and found.tolist() == [3, 3]


# ------------------------------------------------------------------------------ no float64
class NoFloat64(TorchDispatchMode):
    """Fails if an operator has a result in float64 on a device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.results = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.device.type == self.device:
                self.results += 1
                assert x.dtype != torch.float64, f"{func} gives float64"
        return found


@pytest.mark.parametrize("name", OPTIONS)
def test_no_float64_in_a_step(name):
    step, progress = make_step(**OPTIONS[name]), Progress(10, 100)
    with NoFloat64("cpu") as mode:
        for _ in range(2):
            assert take(step, progress, range(step.accumulate)).updated
    assert mode.results > 100


def network(decoder, encoder="", loss="nll"):
    kind = ENCODERS.get(encoder or "resnet18dilated")
    made = ModelBuilder.build_decoder(
        decoder, num_class=CLASSES, channels=kind.channels, strides=kind.strides
    )
    scale = 0.4 if any(head.weight is None for head in made.auxiliary) else None
    return SegmentationModule(kind(), made, build_loss(loss, CLASSES), scale)


def train(module, device, side=128):
    """Forward and backward pass, without float64 on a device."""
    with NoFloat64(device) as mode:
        images = torch.zeros(2, 3, side, side, device=device)
        label = torch.zeros(2, side // 4, side // 4, dtype=torch.int64, device=device)
        loss, _ = module.train()({"img_data": images, "seg_label": label})
        loss.backward()
    assert mode.results > 100


PAIRS = [
    *(("ppm_deepsup", ""), ("encnet", ""), ("danet", ""), ("unet", ""), ("hamburger", "mscan_t")),
    *(("icnet", "icnet_resnet50"), ("pidnet_s", "pidnet_s"), ("stdc", "stdc1")),
]


@pytest.mark.parametrize(("decoder", "encoder"), PAIRS)
def test_no_float64_in_the_training_of_networks(decoder, encoder):
    with torch.device("meta"):
        module = network(decoder, encoder)
    train(module, "meta")


@pytest.mark.parametrize("loss", LOSSES.names())
def test_no_float64_in_losses(loss):
    with torch.device("meta"):
        module = network("c1", loss=loss)
    train(module, "meta", side=32)


def test_no_float64_in_the_loss_of_masks():
    pytest.importorskip("timm", reason="timm is not installed")
    options = ModelOptions(
        arch="eomt:vit_tiny_patch16_224", weights_encoder="none", weights_decoder="none"
    )
    data = DataOptions(num_class=CLASSES)
    module = ModelBuilder.from_config(Options(MODEL=options, DATASET=data, DIR="none"))
    train(module, "cpu", side=64)


@pytest.mark.parametrize(
    "options", [{"flip": True}, {"tile": 256}, {"window": Sliding(128, 128, 0)}]
)
def test_no_float64_in_prediction(options, monkeypatch):
    monkeypatch.setattr(predictor, "usable_device", torch.device)
    made = Predictor(network("ppm_deepsup"), DataOptions(imgSizes=(64, 260)), "meta", **options)
    with NoFloat64("meta") as mode:
        logits = made.logits(made.scales(np.zeros((260, 300, 3), np.uint8)))
        labels = made.labels(logits, (260, 300))
        confusion_matrix(labels, labels, CLASSES, check=False)
    assert labels.shape == (1, 260, 300) and mode.results > 100
