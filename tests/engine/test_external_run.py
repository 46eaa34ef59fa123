"""Models of other libraries in training, evaluation and prediction."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from other_libraries import NAMES, saved_hf, saved_smp
from PIL import Image
from small_runs import CPU, assert_same_weights, signal_after

from mit_semseg import Segmenter
from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.dataset import ClassTable
from mit_semseg.engine.checkpoint import CheckpointFolder, load_model, pack, pack_for_library
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.predict import predict
from mit_semseg.engine.pretrained import load_pretrained
from mit_semseg.engine.train import train
from mit_semseg.models import DECODERS, ENCODERS, ModelBuilder
from mit_semseg.tools.models import HUB, listing
from mit_semseg.weights import MODELS, published_checkpoint

pytest.importorskip("transformers")
pytest.importorskip("segmentation_models_pytorch")
# As they take them.
SIZES = {"DATASET__imgSizes": [64], "DATASET__padding_constant": 32, "DATASET__num_class": 5}


def save(kind, folder, **preprocessing):
    """Save a model, and name it as `MODEL.arch`."""
    if kind == "unet":
        saved_smp("unet", folder, encoder_depth=3, decoder_channels=(16, 16, 8))
        return f"smp:{folder}"
    saved_hf(kind, folder, **preprocessing)
    return f"hf:{folder}"


@pytest.mark.parametrize("kind", ["segformer", "unet", "mask2former"])
def test_it_learns_and_resumes_exactly_and_needs_its_source_no_more(
    kind, settings, tmp_path, monkeypatch
):
    common = {
        "MODEL__arch": save(kind, tmp_path / "source"),
        "MODEL__weights_encoder": "",
        **SIZES,
        "DATASET__num_class": 4,  # a new head
        "TRAIN__optim": "AdamW",
        "TRAIN__lr_encoder": 3e-3,
        "TRAIN__lr_decoder": 3e-3,
        "TRAIN__eval_epochs": 2,
    }
    whole, cut = (settings(name, **common) for name in ("whole", "cut"))
    result = train(whole, [CPU], progress=False)
    first, last = result["history"]["train"]["loss"]
    assert last < first
    with monkeypatch.context() as patch:
        signal_after(1, signal.SIGTERM, patch)
        assert train(cut, [CPU], progress=False)["step"] == 2
    shutil.rmtree(tmp_path / "source")
    train(cut, [CPU], resume="auto", progress=False)
    assert_same_weights(whole, cut, "epoch_2.pth")

    scored = evaluate(cut, [CPU], checkpoint="best.pth", progress=False)
    assert scored["mean_iou"] == pytest.approx(result["best_mean_iou"], abs=1e-6)
    out = pack_for_library(cut.DIR, tmp_path / "out")
    assert (out / "config.json").is_file()
    packed = pack(cut.DIR, tmp_path / "packed")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ours, half, theirs = (
        Segmenter.from_pretrained(x, device="cpu", imgSizes=64)(image).labels
        for x in (cut.DIR, packed, out)
    )
    assert (half == ours).mean() > 0.95 and np.array_equal(theirs, ours)


def test_a_source_is_evaluated_and_predicts_as_it_is(settings, tmp_path):
    arch = save("segformer", tmp_path / "source")
    cfg = settings(
        MODEL__arch=arch, **SIZES, VAL__checkpoint="pretrained", TEST__checkpoint="pretrained"
    )
    cfg.TEST.result = str(tmp_path / "out")
    result = evaluate(cfg, [CPU], progress=False)
    assert result["images"] == 4 and 0 <= result["mean_iou"] <= 1
    image = tmp_path / "photo.png"
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(image)
    assert "error" not in predict(cfg, [str(image)], CPU)[0]

    cfg.DATASET.num_class = 4
    with pytest.raises(ValueError, match="is for 5 classes: set DATASET.num_class 5"):
        load_model(cfg, "pretrained")
    cfg.MODEL.arch = ""
    with pytest.raises(ValueError, match=r"pretrained is for .*other libraries: set MODEL.arch"):
        evaluate(cfg, [CPU], progress=False)


def test_a_folder_of_transformers_predicts_as_its_own_pipeline(tmp_path):
    from transformers import SegformerImageProcessor

    own = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    model = saved_hf(
        "segformer", tmp_path, **own, size={"height": 64, "width": 64}, do_normalize=True
    )
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    segmenter = Segmenter.from_pretrained(tmp_path, device="cpu")
    assert segmenter.opt.imgSizes == (64,) and segmenter.classes.names == NAMES

    processor = SegformerImageProcessor(**own, do_resize=False)
    with torch.no_grad():
        found = model(**processor(Image.fromarray(image), return_tensors="pt"))
    theirs = processor.post_process_semantic_segmentation(found, target_sizes=[(64, 96)])[0]
    assert len(theirs.unique()) > 1
    assert (segmenter(image).labels == theirs.numpy()).mean() > 0.999  # ties of rounding


@pytest.mark.parametrize("kind", ["eomt", "beit", "dpt"])
def test_one_size_means_windows(kind, tmp_path):
    saved_hf(kind, tmp_path)
    segmenter = Segmenter.from_pretrained(f"hf:{tmp_path}", device="cpu", imgSizes=64)
    assert segmenter.predictor.tiled.window is not None
    image = np.random.default_rng(0).integers(0, 256, (64, 112, 3), dtype=np.uint8)
    logits = segmenter.predictor.logits(segmenter.predictor.scales(image))[0]
    module, stride = segmenter.predictor.module, 112 // logits.shape[-1]
    parts = [torch.from_numpy(image[None, :, x : x + 64]).permute(0, 3, 1, 2) for x in (0, 48)]
    with torch.no_grad():
        left, right = (module.logits(part) for part in parts)
    shared = 16 // stride  # where both windows see the image: the mean of both
    assert torch.allclose(logits[..., : 48 // stride], left[..., : 48 // stride], atol=1e-5)
    assert torch.allclose(logits[..., 64 // stride :], right[..., shared:], atol=1e-5)
    mean = (left[..., 48 // stride :] + right[..., :shared]) / 2
    assert torch.allclose(logits[..., 48 // stride : 64 // stride], mean, atol=1e-5)


def test_a_published_name_is_downloaded_once(tmp_path, monkeypatch):
    name = "ade20k-mobilenetv2dilated-c1_deepsup"
    model = MODELS[name]
    arch = ModelOptions(
        arch_encoder=model.encoder,
        arch_decoder=model.decoder,
        fc_dim=model.fc_dim,
        weights_encoder="none",
    )
    module = ModelBuilder.from_config(Options(MODEL=arch, DATASET=DataOptions()))
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", (tmp_path / "mirror").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for urls, part in zip(published_checkpoint(name), (module.encoder, module.decoder)):
        file = Path(urls[0].removeprefix("file://"))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(part.state_dict(), file)
    loaded = load_pretrained(name)
    assert len(loaded.classes.names) == 150 and loaded.classes.names[0] == "wall"
    shutil.rmtree(tmp_path / "mirror")
    assert load_pretrained(name).options == loaded.options
    with pytest.raises(FileNotFoundError, match="did you mean 'ade20k-mobilenetv2dilated"):
        load_pretrained("ade20k-mobilenetv2dilated-c1_deepsap")


def test_what_has_no_trained_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an architecture without trained weights"):
        load_pretrained("smp:unet:tu-test_resnet")
    from transformers import SegformerForImageClassification

    model = saved_hf("segformer", tmp_path)
    SegformerForImageClassification(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights for the decoder: train it first"):
        load_pretrained(f"hf:{tmp_path}")


def test_the_listing_names_every_model():
    text = listing()
    assert all(name in text for name in MODELS) and all(f"hf:{x.name}" in text for x in HUB)
    assert all(x.source.startswith(("arXiv:", "https://")) for x in HUB)


@pytest.mark.parametrize("name", MODELS)
def test_the_listed_size_of_a_published_model_is_its_own(name):
    model = MODELS[name]
    with torch.device("meta"):
        encoder = ENCODERS.get(model.encoder)()
        decoder = DECODERS.get(model.decoder)(encoder.channels, num_class=150)
    count = sum(p.numel() for part in (encoder, decoder) for p in part.parameters())
    assert count / 1e6 == pytest.approx(model.millions, abs=0.05)


def test_classes_of_a_checkpoint_folder_are_kept(settings, tmp_path):
    cfg = settings(MODEL__arch=save("unet", tmp_path / "source"), **SIZES)
    options = Options.read(cfg)
    folder = CheckpointFolder(options.DIR)
    module = ModelBuilder.from_config(options)
    folder.prepare(options, ClassTable.of(NAMES), module.encoder.architecture)
    folder.save("best.pth", module.encoder.state_dict(), module.decoder.state_dict())
    assert load_pretrained(options.DIR).classes.names == NAMES


def test_libraries_are_imported_when_they_are_used():
    code = (
        "import sys, mit_semseg.segmenter, mit_semseg.models.external.hf, "
        "mit_semseg.models.external.smp\n"
        "print({'transformers', 'segmentation_models_pytorch', 'timm'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
