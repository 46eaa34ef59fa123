"""Models of every family export to every format that runs here; slow, as each is recorded anew."""

import pytest
import torch
from other_libraries import saved_hf
from tiny_model import installed

from mit_semseg.config import Options
from mit_semseg.dataset import ClassTable
from mit_semseg.demo.photos import pictures
from mit_semseg.engine.export import EQUAL, compare, graph_of
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.pretrained import Pretrained, load_pretrained
from mit_semseg.export import FORMATS, ExportedModule
from mit_semseg.models import ModelBuilder

# Encoder, decoder, channels of the deepest map, padding constant.
PAIRS = (
    ("resnet50dilated", "ppm_deepsup", 2048, 8),
    ("resnet18", "upernet", 512, 32),
    ("hrnetv2_w18", "c1", 270, 32),
    ("mobilenetv2", "segformer", 320, 32),
    ("mobilenetv2_dilated16", "deeplabv3plus", 320, 16),
    ("mobilenetv2dilated", "danet", 320, 8),
)
KINDS = ("onnx", "torchscript", "pt2", "openvino")


def random_model(encoder, decoder, channels, multiple):
    torch.manual_seed(0)
    options = Options.read(
        {
            "DATASET": {"num_class": 7, "imgSizes": (96,), "padding_constant": multiple},
            "MODEL": {
                "arch_encoder": encoder,
                "arch_decoder": decoder,
                "fc_dim": channels,
                "weights_encoder": "none",
            },
        }
    )
    module = ModelBuilder.from_config(options, inference=True).eval()
    return Pretrained(module, ClassTable.numbered(7), options)


def check(model, kind, folder):
    """The comparison of the command, on one photograph at three sizes."""
    form = FORMATS[kind]
    installed(form)
    graph = graph_of(model)
    path = folder / f"model{form.suffix}"
    form.write(graph, path)
    data = graph.description.options.DATASET
    rows = compare(
        Predictor(model.module, data, "cpu", tile="off"),
        ExportedModule(form, path),
        pictures((), 1),
    )
    assert len(rows) > 1
    assert min(row.equal for row in rows) > EQUAL


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}+{pair[1]}")
def test_labels_are_equal(pair, kind, tmp_path):
    check(random_model(*pair), kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_a_model_of_transformers_are_equal(kind, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path / "segformer"
    saved_hf("segformer", folder, size={"height": 128, "width": 128})
    check(load_pretrained(f"hf:{folder}"), kind, tmp_path)
