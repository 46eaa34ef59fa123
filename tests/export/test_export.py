"""Exported files give the labels of the network that they were made from."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_model import NAMES, installed, tiny_model
from tolerances import rounding

from mit_semseg.arguments import EXPORTS
from mit_semseg.cli import main
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.engine.export import calibration_inputs, export_model, graph_of
from mit_semseg.engine.from_model import training_options
from mit_semseg.engine.predictor import Predictor
from mit_semseg.export import FORMATS, LABELS, SCORES, Graph, open_exported
from mit_semseg.models.tiles import Sliding
from mit_semseg.segmenter import Segmenter

# Roundings from the image to the scores: six layers, whose values are up to five times as large.
LAYERS = 30
RUN_HERE = ("onnx", "torchscript", "pt2", "openvino")


def photo(height=60, width=84, seed=0):
    """Blocks of colours, so that resizing leaves something to see."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
    return small.repeat(4, 0).repeat(4, 1)


def labels_of(module, pixels, normalize):
    """Labels at the size of the image, by torch's layers."""
    with torch.no_grad():
        scores = module.logits(normalize(pixels))
        size = pixels.shape[2:]
        return F.interpolate(scores, size, mode="bilinear", align_corners=False), scores


def test_formats_of_the_command_line_are_those_that_exist():
    assert tuple(FORMATS) == EXPORTS


@pytest.mark.parametrize("kind", RUN_HERE)
def test_labels_are_equal_for_images_of_any_size_and_number(kind, model, exported):
    network = open_exported(exported(kind))
    network.prepare()
    for count, height, width in ((1, 48, 64), (3, 56, 32), (2, 160, 200), (1, 16, 16)):
        image = np.stack([photo(height, width, seed) for seed in range(count)])
        labels, scores = network.runner(image, [LABELS, SCORES])
        pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
        wide, expected = labels_of(model.module, pixels, Normalize())
        np.testing.assert_allclose(scores, expected, atol=rounding(expected, LAYERS))
        assert labels.dtype == np.int64 and labels.shape == (count, height, width)
        best = wide.gather(1, torch.from_numpy(labels)[:, None])[:, 0]
        assert float((wide.amax(1) - best).max()) <= 2 * rounding(wide, LAYERS)
        assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("kind", RUN_HERE)
def test_segmenter_runs_files_at_several_scales_with_flips(kind, model, exported):
    segmenter = Segmenter.from_pretrained(exported(kind), device="cpu")
    assert segmenter.classes.names == NAMES
    assert segmenter.opt.imgSizes == (48, 64)
    image = photo()
    ours, theirs = (
        Predictor(module, segmenter.opt, "cpu", flip=True)
        for module in (model.module, segmenter.predictor.module)
    )
    pairs = zip(ours.logits(ours.scales(image)), theirs.logits(theirs.scales(image)), strict=True)
    for expected, actual in pairs:
        torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(expected, LAYERS))
    labels = Segmenter(model.module, model.classes, model.options.DATASET)(image).labels
    assert (segmenter(image).labels == labels).mean() > 0.999


def test_a_signal_is_handled_after_openvino_has_run(exported):
    """OpenVINO's unloaded CPU plugin made it a segmentation fault."""
    code = f"""
import numpy as np, os, signal
from mit_semseg import Segmenter
file = {str(exported("openvino"))!r}
for sizes in ((64,), (48, 64)):
    segmenter = Segmenter.from_pretrained(file, device="cpu", imgSizes=sizes)
    segmenter(np.zeros((96, 128, 3), np.uint8))
del segmenter
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_segmenter_runs_a_raw_file_in_a_sliding_window(exported, model):
    network = open_exported(exported("onnx", raw=True))
    image, window = photo(100, 120), Sliding(64, 64)
    made = [
        Predictor(module, model.options.DATASET, "cpu", window=window).logits(
            [torch.from_numpy(image).permute(2, 0, 1)[None]]
        )[0]
        for module in (model.module, network, open_exported(exported("onnx")))
    ]
    for actual in made[1:]:  # of bytes the padding is the mean colour, rounded
        atol = 0.05 if actual is made[2] else rounding(made[0], LAYERS)
        torch.testing.assert_close(actual, made[0], rtol=0, atol=atol)


def test_executorch_runs_a_program_for_one_size(model, exported):
    network = open_exported(exported("executorch", size=(64, 80)))
    pixels = torch.from_numpy(photo(64, 80)).permute(2, 0, 1)[None]
    _, expected = labels_of(model.module, pixels, Normalize())
    atol = rounding(expected, LAYERS)
    torch.testing.assert_close(network.logits(pixels), expected, rtol=0, atol=atol)
    larger = Segmenter.from_pretrained(network.path, device="cpu")(photo(100, 132))
    assert larger.labels.shape == (100, 132)  # window by window


def test_core_ml_packages_hold_network_and_metadata(model, exported):
    """Conversion only: they are run on macOS."""
    path = exported("coreml", size=(48, 64))
    network = open_exported(path)
    assert network.description.classes.names == NAMES
    assert network.description.size == (48, 64)
    import coremltools

    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    assert [one.name for one in spec.description.output] == [LABELS, SCORES]
    assert spec.description.input[0].type.imageType.width == 64


@pytest.mark.parametrize("kind", ["coreml", "executorch"])
def test_formats_for_one_size_ask_for_it(kind, make_model, tmp_path, monkeypatch):
    installed(FORMATS[kind])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="for images of one size: give --size HEIGHT WIDTH"):
        export_model("unread", kind, photos=[])


def test_tensorrt_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        FORMATS["tensorrt"].check()


def test_a_graph_for_one_size_resizes_images_itself(model, exported):
    """The labels are those of `Segmenter` at the first scale, which resizes outside."""
    network = open_exported(exported("onnx", size=(60, 84), resize=True))
    network.prepare()
    image = photo()
    (labels,) = network.runner(image[None], [LABELS])
    one_scale = model.options.DATASET.at_scales(48)
    expected = Segmenter(model.module, model.classes, one_scale)(image).labels
    assert labels.shape == (1, 60, 84)
    assert (labels[0] == expected).mean() > 0.98  # resized pixels are rounded, here and there
    with pytest.raises(ValueError, match="export it without --resize"):
        Segmenter.from_pretrained(network.path, device="cpu")


def test_colour_order_and_range_are_those_of_the_weights(tmp_path):
    installed(FORMATS["pt2"])
    statistics = {"mean": (100.0, 110.0, 120.0), "std": (50.0, 60.0, 70.0)}
    model = tiny_model(color_order="BGR", value_range=255, **statistics)
    graph = graph_of(model)
    pixels = torch.from_numpy(photo(48, 64)).permute(2, 0, 1)[None]
    normalized = Normalize.of(model.options.DATASET)(pixels)
    expected = model.module.logits(normalized)
    with torch.no_grad():
        _, scores = graph(pixels.permute(0, 2, 3, 1))
    torch.testing.assert_close(scores, expected, rtol=0, atol=rounding(expected, LAYERS))


def test_scores_of_int8_files_are_close(model, exported, tmp_path):
    for number in range(6):
        Image.fromarray(photo(64, 80, number)).save(tmp_path / f"{number}.png")
    for kind in ("onnx", "openvino"):
        form = FORMATS[kind]
        pytest.importorskip("nncf" if kind == "openvino" else "onnxruntime")
        source = exported(kind)
        path = tmp_path / f"small{form.suffix}"
        description = open_exported(source).description
        form.quantize(source, path, calibration_inputs(str(tmp_path), description))
        image = torch.from_numpy(photo(64, 80, 9)).permute(2, 0, 1)[None]
        exact, small = (open_exported(x).logits(image).flatten() for x in (source, path))
        assert 0.95 < float(torch.corrcoef(torch.stack([exact, small]))[0, 1]) < 0.99999
        assert open_exported(path).description.classes.names == NAMES


def test_the_command_writes_a_file_that_predict_and_eval_take(
    make_model, make_images, tmp_path, capsys, monkeypatch
):
    installed(FORMATS["onnx"])
    monkeypatch.chdir(tmp_path)
    cfg = make_model(tmp_path / "model", NAMES, DATASET__label_offset=0)
    make_images(tmp_path / "data", [(48, 64), (40, 40)])
    images = str(tmp_path / "data" / "img")
    (file,) = export_model(cfg.DIR, "onnx", photos=[photo()], say=lambda text: None)
    assert file.name == "model.onnx"
    assert main(["predict", images, "--model", str(file)]) == 0
    assert main(["predict", images, "--model", cfg.DIR, "TEST.result", "other"]) == 0
    for path in sorted((tmp_path / "predictions").rglob("*_color.png")):
        other = tmp_path / "other" / path.relative_to(tmp_path / "predictions")
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(other))).mean() > 0.999
    figures = []
    for name in (str(file), cfg.DIR):
        data = ["--data", str(tmp_path / "data" / "val.odgt"), "--out", str(tmp_path / "eval")]
        capsys.readouterr()
        assert (
            main(["eval", "--model", name, *data, "DATASET.root_dataset", str(tmp_path / "data")])
            == 0
        )
        lines = capsys.readouterr().out.splitlines()
        figures.append([x.partition(", Inference")[0] for x in lines if "Mean IoU" in x])
    assert figures[0] == figures[1]
    with pytest.raises(ValueError, match="for prediction only"):
        training_options(str(file), "photos:masks")


def test_files_whose_labels_differ_are_not_kept(make_model, tmp_path, monkeypatch):
    cfg = make_model(tmp_path / "model", NAMES)
    form = FORMATS["torchscript"]
    forward = Graph.forward
    monkeypatch.setattr(
        Graph, "forward", lambda self, image: forward(self, image.flip(2))
    )  # an exporter that makes a mistake
    with pytest.raises(ValueError, match="of the labels are equal to those of this toolkit"):
        export_model(
            cfg.DIR,
            form.name,
            tmp_path / "out.torchscript",
            photos=[photo()],
            say=lambda text: None,
        )
    assert not (tmp_path / "out.torchscript").exists()
    assert not list(tmp_path.glob(".export*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "onnx", "out": "a.pt2"}, "files of onnx end in .onnx"),
        ({"kind": "pt2", "resize": True}, "--resize needs --size"),
        ({"kind": "pt2", "resize": True, "raw": True, "size": (48, 64)}, "leave out --raw"),
        ({"kind": "pt2", "size": (50, 64)}, "use multiples of 8"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, make_model, tmp_path, monkeypatch):
    installed(FORMATS[options["kind"]])
    monkeypatch.chdir(tmp_path)
    cfg = make_model(tmp_path / "model", NAMES)
    with pytest.raises(ValueError, match=message):
        export_model(cfg.DIR, photos=[], **options)


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs openvino: pip install 'mit_semseg\[openvino\]'"):
        FORMATS["openvino"].check()


def test_a_torch_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    with pytest.raises(
        ValueError, match="--format onnx needs torch 2.6 or newer, and this is 2.4.1"
    ):
        FORMATS["onnx"].check()


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_files_of_other_origin_are_refused(kind, tmp_path):
    form = FORMATS[kind]
    installed(form)
    path = tmp_path / f"other{form.suffix}"
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match="cannot be read by"):
        open_exported(path)
    if kind == "torchscript":
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), str(path))
        with pytest.raises(ValueError, match="export the model with `mit-semseg export`"):
            open_exported(path)


def test_exported_files_refuse_what_they_cannot_do(exported):
    file = exported("onnx")
    with pytest.raises(ValueError, match="computes in fp32, not in bf16"):
        Segmenter.from_pretrained(file, device="cpu", precision="bf16")
    with pytest.raises(ValueError, match="set compile False"):
        Segmenter.from_pretrained(file, device="cpu", compile=True)
