"""Torchvision's models: the encoders and decoders here give the same with the same weights."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pairs import randomise
from tolerances import rounding
from torch import nn

from mit_semseg.dataset.classes import table_of
from mit_semseg.models import ENCODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.decoders.fcn import FCN
from mit_semseg.models.inference import inference_copy
from mit_semseg.weights import (
    TORCHVISION,
    load_decoder,
    load_encoder,
    load_into,
    sources,
    torchvision_decoder,
    torchvision_encoder,
)

SEGMENTATION = {
    "fcn_resnet50": ("torchvision_resnet50dilated", "fcn_head_deepsup"),
    "fcn_resnet101": ("torchvision_resnet101dilated", "fcn_head_deepsup"),
    "deeplabv3_resnet50": ("torchvision_resnet50dilated", "deeplabv3_deepsup"),
    "deeplabv3_resnet101": ("torchvision_resnet101dilated", "deeplabv3_deepsup"),
    "deeplabv3_mobilenet_v3_large": ("mobilenetv3_large_dilated16", "deeplabv3_wide_deepsup"),
    "lraspp_mobilenet_v3_large": ("mobilenetv3_large_dilated16", "lraspp"),
}


def published(name):
    """Torchvision's module with random weights, and BatchNorms that have seen a batch of noise."""
    torch.manual_seed(0)
    if name in SEGMENTATION:
        theirs = segmentation(name)
    else:
        theirs = getattr(torchvision.models, name)(weights=None)
    norms = [layer for layer in randomise(theirs) if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0  # one batch sets the running statistics
    with torch.no_grad():
        theirs.train()(torch.randn(2, 3, 64, 64))
    for layer in norms:  # means over an image of noise hardly vary
        layer.running_var.clamp_(min=0.1)
    return theirs.eval()


def segmentation(name):
    build = getattr(torchvision.models.segmentation, name)
    auxiliary = {} if "lraspp" in name else {"aux_loss": True}
    return build(weights=None, weights_backbone=None, num_classes=21, **auxiliary)


def built(name):
    arch_encoder, arch_decoder = SEGMENTATION[name]
    encoder = ModelBuilder.build_encoder(arch_encoder, weights="none").eval()
    decoder = ModelBuilder.build_decoder(
        arch_decoder, num_class=21, channels=encoder.channels, strides=encoder.strides
    ).eval()
    return encoder, decoder


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if "101" in n else []) for n in SEGMENTATION]
)
@torch.no_grad()
def test_segmentation_models_give_the_same_logits(name):
    theirs, (encoder, decoder) = published(name), built(name)
    state = theirs.state_dict()
    reports = [
        load_into(encoder, torchvision_encoder(state), what="encoder", strict=True),
        load_into(decoder, torchvision_decoder(state), what="decoder", strict=True),
    ]
    assert [report.unexpected for report in reports] == [[], []]
    assert sum(len(report.matched) for report in reports) == len(state)
    module = SegmentationModule(encoder, decoder, None)
    if "mobilenet" in name:  # in deeper ones folding rounds more than this
        module = inference_copy(module, "cpu")
    for height, width in ((64, 96), (65, 97)):
        image = torch.randn(1, 3, height, width)
        wanted = theirs(image)
        features = encoder(image, return_feature_maps=True)
        main = decoder.logits(features)[0]
        given = [(main, "out"), (module.logits(image), "out")]
        if "aux" in wanted:
            given.append((decoder.conv_last_deepsup(decoder.cbr_deepsup(features[-2])), "aux"))
        for ours, key in given:
            scores = F.interpolate(ours, (height, width), mode="bilinear", align_corners=False)
            atol = rounding(wanted[key], 101)
            torch.testing.assert_close(scores, wanted[key], rtol=0, atol=atol)
            assert wanted[key].std() > 0.1


@pytest.mark.parametrize("name", [name for name in SEGMENTATION if "101" in name])
def test_segmentation_models_have_the_same_tensors(name):
    with torch.device("meta"):
        state, (encoder, decoder) = segmentation(name).state_dict(), built(name)
    for ours, given in (
        (encoder, torchvision_encoder(state)),
        (decoder, torchvision_decoder(state)),
    ):
        wanted = {k: v.shape for k, v in ours.state_dict().items()}
        assert {k: v.shape for k, v in given.items()} == wanted


def test_by_name_and_from_a_file(tmp_path, monkeypatch):
    name = "deeplabv3_mobilenet_v3_large"
    state = published(name).state_dict()
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    asked = []

    def fetch(urls, dest, sha256=None):
        asked.append([*urls, dest.name, str(sha256)])
        return path

    monkeypatch.setattr(sources, "fetch", fetch)
    monkeypatch.delenv("MIT_SEMSEG_MIRROR", raising=False)
    file = "deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    for source in (f"torchvision:{name}", f"torchvision:{path}"):
        encoder, decoder = built(name)
        report = load_encoder(encoder, SEGMENTATION[name][0], source)
        assert report is not None and report.ok
        report = load_decoder(decoder, SEGMENTATION[name][1], source)
        assert report is not None and report.ok
        assert torch.equal(encoder.features[0][0].weight, state["backbone.0.0.weight"])
        assert torch.equal(decoder.conv_last.bias, state["classifier.4.bias"])
    url = f"https://download.pytorch.org/models/{file}"
    assert asked == [[url, file, "fc3c493d"]] * 2


def test_the_classifier_of_vgg_becomes_the_convolutions_of_fcn(tmp_path, monkeypatch):
    """Paper: Long et al. 2015, fig. 2. On the map of one 224x224 image both are the same."""
    monkeypatch.setattr(FCN, "width", 20)
    torch.manual_seed(0)
    layers = [nn.Linear(8 * 7 * 7, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 20)]
    theirs = nn.Sequential(*layers, nn.ReLU(), nn.Dropout(), nn.Linear(20, 1000)).eval()
    torch.save({f"classifier.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "v.pth")
    decoder = ModelBuilder.build_decoder("fcn32s", channels=(8,), num_class=5).eval()
    report = load_decoder(decoder, "fcn32s", f"torchvision:{tmp_path / 'v.pth'}")
    assert report is not None and not report.unexpected
    assert report.matched == ["fc6.weight", "fc6.bias", "fc7.weight", "fc7.bias"]
    assert report.missing == ["conv_last.weight", "conv_last.bias"]
    x = torch.randn(1, 8, 7, 7)
    with torch.no_grad():
        ours = decoder.fc7(decoder.fc6(x).relu())[0, :, 3, 3]
        torch.testing.assert_close(ours, theirs[:4](x.flatten(1))[0])


def test_heads_that_differ_in_part():
    """Another number of classes leaves out the classifiers, no auxiliary head that of theirs."""
    state = torchvision_decoder(segmentation("deeplabv3_mobilenet_v3_large").state_dict())
    decoder = ModelBuilder.build_decoder(
        "deeplabv3_wide_deepsup", num_class=5, channels=(24, 40, 960)
    )
    report = load_into(decoder, state, what="decoder")
    names = [f"{c}.{p}" for c in ("conv_last", "conv_last_deepsup") for p in ("bias", "weight")]
    assert (sorted(report.mismatched), report.missing) == (names, [])
    state = torchvision_decoder(segmentation("fcn_resnet50").state_dict())
    decoder = ModelBuilder.build_decoder("fcn_head", num_class=21, channels=(256, 512, 1024, 2048))
    report = load_into(decoder, state, what="decoder")
    left_over = {name.split(".")[0] for name in report.unexpected}
    assert report.ok and left_over == {"cbr_deepsup", "conv_last_deepsup"}


@pytest.mark.parametrize(
    ("arch", "source", "reason"),
    [
        ("deeplabv3_deepsup", "fcn_resnet50", "MODEL.arch_decoder to fcn_head or fcn_head_deepsup"),
        ("deeplabv3", "deeplabv3_mobilenet_v3_large", "deeplabv3_wide_deepsup"),
        ("fcn_head", "resnet34", "'none': these are ImageNet weights"),
        ("fcn_head", "fcn_resnet5", "did you mean 'fcn_resnet50'"),
    ],
)
def test_weights_of_another_decoder_are_refused(arch, source, reason):
    with pytest.raises(ValueError, match=f"^.*{reason}.*$"):
        load_decoder(nn.Conv2d(3, 3, 1), arch, f"torchvision:{source}")


def test_a_file_without_a_head_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth.* has no head of torchvision"):
        load_decoder(nn.Conv2d(3, 3, 1), "fcn_head", f"torchvision:{tmp_path / 'x.pth'}")


# ------------------------------------------------------------------------------------- ImageNet
IMAGENET = [name for name, source in TORCHVISION.items() if not source.segments]


def model_of(name):
    """The model that weights are for: "ResNet50_Weights.IMAGENET1K_V2" -> "resnet50"."""
    return name.split("_Weights")[0].lower()


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_weights_have_the_same_tensors(name):
    backbone = TORCHVISION[name].encoder
    with torch.device("meta"):
        theirs = torchvision.models.get_model(model_of(name), weights=None).state_dict()
        ours = ENCODERS.get(backbone)().state_dict()
    given = {k: v.shape for k, v in torchvision_encoder(theirs).items()}
    assert given == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("name", TORCHVISION)
def test_urls_are_torchvisions(name):
    first = next(iter(torchvision.models.get_model_weights(model_of(name))))
    weights = torchvision.models.get_weight(name) if "." in name else first
    assert TORCHVISION[name].urls == (weights.url,)
    source = TORCHVISION[name]
    assert weights.transforms().mean == list(source.mean)
    assert weights.transforms().std == list(source.std)
    assert TORCHVISION[name].sha256 == TORCHVISION[name].file.rsplit("-", 1)[1][:8]


# What torchvision computes before its classifiers, of architectures not compared elsewhere.
@pytest.mark.parametrize(
    ("name", "arch", "last"),
    [
        ("resnet34", "resnet34", "layer4"),
        ("resnext50_32x4d", "resnext50", "layer4"),
        ("mobilenet_v2", "mobilenetv2", "features.17"),
        ("mobilenet_v3_large", "mobilenetv3_large", "features"),
    ],
)
@torch.no_grad()
def test_imagenet_encoders_compute_what_torchvision_does(name, arch, last):
    theirs = published(name)
    emitted = []
    theirs.get_submodule(last).register_forward_hook(lambda m, args, out: emitted.append(out))
    encoder = ModelBuilder.build_encoder(arch, weights="none").eval()
    load_into(encoder, torchvision_encoder(theirs.state_dict()), what="encoder", strict=True)
    image = torch.randn(1, 3, 64, 96)
    theirs(image)
    (ours,) = encoder(image)
    assert ours.shape == emitted[0].shape
    assert (ours - emitted[0]).abs().max() <= 1e-5 * emitted[0].abs().max()


def test_older_names_of_published_densenets():
    state = {
        "features.denseblock1.denselayer10.norm.1.weight": torch.ones(1),
        "features.denseblock1.denselayer10.conv.2.weight": torch.ones(1),
        "features.transition1.norm.weight": torch.ones(1),
        "classifier.weight": torch.ones(1),
    }
    assert list(torchvision_encoder(state)) == [
        "features.denseblock1.denselayer10.norm1.weight",
        "features.denseblock1.denselayer10.conv2.weight",
        "features.transition1.norm.weight",
    ]


def test_imagenet_weights_without_a_name_are_torchvisions(tmp_path, monkeypatch):
    state = published("resnet34").state_dict()
    path = tmp_path / "resnet34-b627a593.pth"
    torch.save(state, path)
    monkeypatch.setattr(sources, "fetch", lambda urls, dest, sha256=None: path)
    report = load_encoder(ENCODERS.get("resnet34dilated")(), "resnet34dilated", "")
    assert report is not None
    assert (report.ok, report.unexpected) == (True, [])
    assert report.file.endswith("resnet34-b627a593.pth (torchvision)")


@pytest.mark.parametrize("by", ["path", "url"])
def test_a_plain_file_of_torchvisions_densenet_is_recognised(by, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "cache_dir", lambda: tmp_path / "cache")
    with torch.device("meta"):
        encoder = ENCODERS.get("densenet121")().to_empty(device="cpu")
    state = {k: torch.ones(v.shape) for k, v in encoder.state_dict().items()}
    # As in the published files, whose module names are older.
    older = {re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", k): v for k, v in state.items()}
    older |= {"classifier.weight": torch.ones(1000, 1024)}
    path = tmp_path / "mine.pth"
    torch.save(older, path)
    source = path.as_uri() if by == "url" else str(path)
    report = load_encoder(encoder, "densenet121", source)
    assert report is not None and report.ok and report.unexpected == []
    torch.testing.assert_close(encoder.state_dict(), state, check_dtype=False)


def test_a_file_without_most_of_the_encoder_is_refused(tmp_path):
    path = tmp_path / "mine.pth"
    encoder = ENCODERS.get("mobilenetv2")()
    before = copy.deepcopy(encoder.state_dict())
    # Under torchvision's names may also be a MobileNetV2 of TF-slim, which expects another input.
    torch.save(torchvision.models.mobilenet_v2(weights=None).state_dict(), path)
    with pytest.raises(ValueError, match="tensors") as caught:
        load_encoder(encoder, "mobilenetv2dilated", str(path))
    message = str(caught.value)
    wanted = sum("num_batches" not in k for k in before)
    assert re.search(rf"mine\.pth does not fit .* \d+ of its {wanted} tensors", message)
    assert f"'torchvision:{path}'" in message and "\n" not in message
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)
    report = load_encoder(encoder, "mobilenetv2dilated", f"torchvision:{path}")
    assert report is not None and report.ok


def test_a_backbone_takes_the_weights_of_its_own_name(tmp_path, monkeypatch):
    source = ENCODERS.get("resnet18")()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr(sources, "fetch", lambda urls, dest, sha256=None: tmp_path / "w.pth")
    target = ENCODERS.get("bisenet_resnet18")()
    report = load_encoder(target, "bisenet_resnet18", "")
    assert report is not None and report.ok
    assert torch.equal(target.context.conv1.weight, source.conv1.weight)


def test_labels_are_in_the_order_of_voc():
    enum = torchvision.models.get_model_weights("fcn_resnet50")
    background, *others = next(iter(enum)).meta["categories"]
    table = table_of("voc2012", 21, "Pascal VOC 2012")
    assert background == "__background__"
    assert list(table.names) == ["background", *others]
