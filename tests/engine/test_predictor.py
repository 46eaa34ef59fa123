"""The one object that runs a trained model: precisions, tiles, mirror images, out of memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mit_semseg import scores
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.engine.predictor import Predictor
from mit_semseg.models import DECODERS, Encoder, ModelBuilder, SegmentationModule
from mit_semseg.models.tiles import Sliding, TiledNetwork

CPU = torch.device("cpu")


class Local(Encoder):
    """Sees few pixels around each."""

    channels = (6, 8)
    strides = (2, 4)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, 2, 1)
        self.second = nn.Conv2d(6, 8, 3, 2, 1)

    def feature_maps(self, images):
        x = self.first(images).relu()
        return [x, self.second(x).relu()]


def module_of(encoder, decoder="ppm", **options):
    torch.manual_seed(0)
    decoder = DECODERS.get(decoder)(encoder.channels, num_class=5, **options)
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == 5:
            nn.init.normal_(layer.weight)
    return SegmentationModule(encoder, decoder, None, normalize=Normalize()).eval()


def local():
    return module_of(Local(), width=8)


def pixels(height, width, n=1):
    generator = torch.Generator().manual_seed(height)
    small = torch.randint(0, 256, (n, 3, height // 8 + 1, width // 8 + 1), generator=generator)
    return small.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :height, :width].byte()


# ------------------------------------------------------------------------------ what it computes
@torch.no_grad()
def test_scales_of_an_image_become_its_labels():
    module = local()
    image = pixels(60, 80)[0].permute(1, 2, 0).numpy()
    predictor = Predictor(module, {"imgSizes": (48, 96)}, CPU, flip=True)
    scales = predictor.scales(image)
    assert [(x.dtype, x.shape[2]) for x in scales] == [(torch.uint8, 48), (torch.uint8, 96)]
    total = torch.zeros(1, 5, 60, 80)
    for x in scales:
        for y in (module.logits(x), module.logits(x.flip(-1)).flip(-1)):
            total += F.interpolate(y, (60, 80), mode="bilinear").softmax(1)
    logits = predictor.logits(scales)
    labels = predictor.labels(logits, image.shape[:2], torch.uint8)
    assert len(logits) == 4 and labels.dtype == torch.uint8
    assert len(labels.unique()) > 1
    assert (labels == total.argmax(1)).float().mean() > 0.999


def test_batches_of_equal_shape_are_those_of_single_images():
    predictor = Predictor(local(), {}, CPU)
    images = pixels(40, 64, n=3)
    (together,) = predictor.logits([images])
    apart = torch.cat([predictor.logits([one[None]])[0] for one in images])
    torch.testing.assert_close(together, apart)


def test_large_images_are_computed_in_tiles():
    module, image = local(), pixels(300, 520)
    tiled, whole = (Predictor(module, {}, CPU, tile=x).logits([image])[0] for x in (256, "off"))
    assert not torch.equal(tiled, whole)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=float(1e-4 * whole.std()))
    with pytest.raises(ValueError, match="tile is 63; give auto, off or a side of 64"):
        Predictor(module, {}, CPU, tile=63)


@torch.no_grad()
def test_windows_slide_over_scales_and_mirror_images():
    module, window = local(), Sliding(96, 96, 0.5)
    predictor = Predictor(module, {}, CPU, flip=True, window=window)
    slide = TiledNetwork(module, window=window)  # held to a naive loop in its own tests
    scales = [pixels(120, 160), pixels(200, 264)]
    labels = predictor.labels(predictor.logits(scales), (150, 200))
    total = torch.zeros(1, 5, 150, 200)
    for x in scales:
        for y in (slide(x), slide(x.flip(-1)).flip(-1)):
            total += F.interpolate(y, (150, 200), mode="bilinear").softmax(1)
    assert (labels == total.argmax(1)).float().mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_predictor_computes_the_same(precision):
    module = local()
    plain, compiled = (
        Predictor(module, {}, CPU, precision=precision, compile=x) for x in (False, True)
    )
    for size in ((64, 96), (96, 64), (72, 80)):
        expected = plain.logits([pixels(*size)])[0].float()
        given = compiled.logits([pixels(*size)])[0].float()
        atol = float((1e-4 if precision == "fp32" else 3e-2) * expected.std())
        torch.testing.assert_close(given, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------------------ precisions
def test_reduced_precision_holds_reduced_weights():
    module, image = local(), pixels(64, 96)
    exact = Predictor(module, {}, CPU).logits([image])[0]
    predictor = Predictor(module, {}, CPU, precision="bf16")
    reduced = predictor.logits([image])[0]
    assert {p.dtype for p in predictor.module.parameters()} == {torch.bfloat16}
    assert reduced.dtype == torch.bfloat16
    assert (reduced.float() - exact).abs().mean() < 0.02 * exact.std()
    assert {p.dtype for p in module.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------ out of memory
class Scarce(Local):
    """Has memory for some pixels only, until it has failed so often that it must be elsewhere."""

    failures = []
    room = 10**9
    patience = 100

    def feature_maps(self, images):
        H, W = images.shape[2:]
        if self.room < H * W and len(self.failures) < self.patience:
            self.failures.append((H, W))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().feature_maps(images)


def scarce(monkeypatch, room, patience=100, **options):
    """One on what it takes for a GPU."""
    predictor = Predictor(module_of(Scarce(), width=8), {}, CPU, **options)
    predictor._on_cpu = TiledNetwork(copy.deepcopy(predictor.module), window=options.get("window"))
    predictor.device = torch.device("cuda")
    monkeypatch.setattr("mit_semseg.engine.predictor.to_device", lambda x, device: x)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    Scarce.failures.clear()
    monkeypatch.setattr(Scarce, "room", room)
    monkeypatch.setattr(Scarce, "patience", patience)
    return predictor


@pytest.mark.parametrize(
    ("tile", "room", "patience", "steps"),
    [
        ("auto", 1100 * 700, 100, []),
        ("auto", 560 * 560, 100, ["in tiles of 544 pixels"]),
        ("auto", 300 * 300, 100, ["in tiles of 544 pixels", "in tiles of 256 pixels"]),
        (512, 300 * 300, 100, ["in tiles of 256 pixels"]),
        ("auto", 0, 3, ["in tiles of 544 pixels", "in tiles of 256 pixels", "on the CPU"]),
        ("off", 0, 1, ["on the CPU"]),
        (128, 0, 1, ["on the CPU"]),
    ],
)
def test_out_of_memory_falls_back_to_smaller_tiles_then_the_cpu(
    monkeypatch, caplog, tile, room, patience, steps
):
    predictor, image = scarce(monkeypatch, room, patience, tile=tile), pixels(700, 1100)
    (given,) = predictor.logits([image])
    output = [f"out of memory for an image of 1100x700: computing it {x}" for x in steps]
    assert caplog.messages == output
    monkeypatch.setattr(Scarce, "room", 10**9)
    with torch.no_grad():
        whole = predictor.module.logits(image)
    torch.testing.assert_close(given, whole, rtol=0, atol=float(1e-4 * whole.std()))


def test_out_of_memory_with_windows_falls_back_to_the_cpu(monkeypatch, caplog):
    window = Sliding(96, 96, 0.5)
    predictor, image = scarce(monkeypatch, 0, 1, window=window), pixels(200, 200)
    (given,) = predictor.logits([image])
    assert caplog.messages == ["out of memory for an image of 200x200: computing it on the CPU"]
    monkeypatch.setattr(Scarce, "room", 10**9)
    torch.testing.assert_close(given, predictor.logits([image])[0])


def test_out_of_memory_on_the_cpu_falls_back_to_tiles_then_fails(monkeypatch, caplog):
    predictor, image = scarce(monkeypatch, 300 * 300), pixels(700, 1100)
    predictor.device = CPU
    predictor.logits([image])
    assert len(caplog.records) == 2
    before = copy.deepcopy(predictor.module.state_dict())
    monkeypatch.setattr(Scarce, "room", 0)
    with pytest.raises(MemoryError, match="Tried to allocate 2.00 GiB"):
        predictor.logits([image])
    after = predictor.module.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())


def test_out_of_memory_in_the_class_map_falls_back_to_the_cpu(monkeypatch, caplog):
    predictor = Predictor(local(), {}, CPU)
    logits = predictor.logits([pixels(40, 48)])
    expected = predictor.labels(logits, (40, 48))
    plain, failures = scores.class_map, []

    def fails(*args, **kwargs):
        if not failures:
            failures.append(args)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(scores, "class_map", fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert torch.equal(predictor.labels(logits, (40, 48)), expected)
    assert failures
    assert caplog.messages == ["out of memory for a class map of 48x40: computing it on the CPU"]


# ------------------------------------------------------------------------------ a GPU
@pytest.fixture(scope="module")
def trained():
    encoder = ModelBuilder.build_encoder("mobilenetv2dilated", weights="none")
    return module_of(encoder, "ppm_deepsup")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_replayed_graphs_compute_the_same(trained, compile):
    predictor = Predictor(trained, {}, "cuda", precision="fp32", compile=compile)
    eager = Predictor(trained, {}, "cuda", precision="fp32")
    eager.tiled.network = eager.module.logits
    sizes = 4 * [(64, 96), (96, 64)] + [(72, 80), (64, 96)]
    for k, size in enumerate(sizes):
        image = pixels(*size).roll(k, 3)
        (given,), (wanted,) = predictor.logits([image]), eager.logits([image])
        torch.testing.assert_close(given, wanted, rtol=0, atol=float(1e-3 * wanted.std()))
    graphs = predictor.tiled.network
    assert len(graphs.graphs) == 2 and graphs.recordable


@pytest.mark.gpu
def test_graphs_hold_bounded_memory(trained):
    predictor = Predictor(trained, {}, "cuda", precision="bf16")
    graphs = predictor.tiled.network
    for side in range(64, 64 + 40 * 8, 8):
        for _ in range(4):
            predictor.logits([pixels(side, side)])
    assert len(graphs.graphs) == 32
    graphs.limit = 0
    for _ in range(4):
        predictor.logits([pixels(48, 48)])
    assert len(graphs.graphs) == 1


@pytest.mark.gpu
def test_a_network_that_cannot_be_recorded_is_computed(trained, caplog):
    predictor = Predictor(trained, {}, "cuda")
    plain = predictor.module.logits

    def reads(image):
        logits = plain(image)
        return logits * (1 + 0 * float(logits.mean()))

    predictor.tiled.network.network = reads
    stream = torch.cuda.current_stream()
    found = [predictor.logits([pixels(64, 96)])[0] for _ in range(5)]
    assert "cannot be recorded" in caplog.text
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_gpu_gives_the_labels_of_the_cpu(trained, precision):
    image = pixels(120, 160)
    exact = Predictor(trained, {}, CPU).logits([image])[0]
    predictor = Predictor(trained, {}, "cuda", precision=precision)
    for _ in range(4):
        given = predictor.logits([image])[0].float().cpu()
    limit = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 0.1, "fp16": 2e-2}[precision]
    assert (given - exact).abs().mean() < limit * exact.std()


@pytest.mark.gpu
def test_prediction_on_a_gpu_never_synchronises(trained):
    predictor = Predictor(trained, {}, "cuda", precision="bf16", flip=True)
    scales = [pixels(64, 96), pixels(96, 144), pixels(128, 192)]
    for _ in range(4):
        predictor.labels(predictor.logits(scales), (100, 150))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = predictor.labels(predictor.logits(scales), (100, 150))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert labels.shape == (1, 100, 150)


@pytest.mark.gpu
def test_a_full_gpu_falls_back_to_tiles(trained):
    image = pixels(2400, 3600)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    free = torch.cuda.memory_reserved() + (1200 << 20)
    torch.cuda.set_per_process_memory_fraction(min(1.0, free / total))
    try:
        predictor = Predictor(trained, {}, "cuda", tile="off")
        predictor.tiled.tile = "auto"
        (logits,) = predictor.logits([image])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert logits.isfinite().all()
