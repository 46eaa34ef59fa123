"""The published constructors of networks, beside what the published toolkit computed with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill, image
from torch import nn

from mit_semseg.compat import hrnet, mobilenet, models, resnet, resnext, urls
from mit_semseg.models import SegmentationModule

REFERENCE = np.load(Path(__file__).resolve().parents[1] / "fixtures" / "reference_public.npz")
CLASSIFIERS = {
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnext101": resnext.resnext101,
    "mobilenetv2": mobilenet.mobilenetv2,
}
ENCODERS = {
    "mobilenetv2dilated": lambda: models.MobileNetV2Dilated(mobilenet.mobilenetv2()),
    "resnet18": lambda: models.Resnet(resnet.resnet18()),
    "resnet18dilated": lambda: models.ResnetDilated(resnet.resnet18(), dilate_scale=8),
    "resnet50": lambda: models.Resnet(resnet.resnet50()),
    "resnet101dilated": lambda: models.ResnetDilated(resnet.resnet101()),
    "resnext101": lambda: models.Resnet(resnext.resnext101()),
    "hrnetv2": hrnet.hrnetv2,
}
DECODERS = {
    "c1_deepsup/fc320": lambda: models.C1DeepSup(150, 320),
    "c1/fc720": lambda: models.C1(fc_dim=720),
    "ppm/fc512": lambda: models.PPM(150, 512, True, (1, 2, 3, 6)),
    "ppm_deepsup/fc512": lambda: models.PPMDeepsup(fc_dim=512, use_softmax=True),
    "upernet/fc2048": lambda: models.UPerNet(fc_dim=2048, fpn_dim=512),
    "upernet_lite/fc2048": lambda: models.UPerNet(fc_dim=2048),
}
PAIRS = {
    "mobilenetv2dilated+c1_deepsup": "c1_deepsup/fc320",
    "resnet18dilated+ppm_deepsup": "ppm_deepsup/fc512",
    "resnet50+upernet": "upernet/fc2048",
}


@pytest.mark.parametrize(
    ("kind", "builders"), [("encoder", ENCODERS), ("decoder", DECODERS)], ids=["encoder", "decoder"]
)
def test_published_state_dicts(kind, builders, published_shapes):
    for name, build in builders.items():
        with torch.device("meta"):
            own = {key: list(value.shape) for key, value in build().state_dict().items()}
        assert own == published_shapes[f"{kind}/{name}"], name


@pytest.mark.parametrize("pair", PAIRS)
def test_published_outputs(pair):
    arch, _ = pair.split("+")
    encoder, decoder = fill(ENCODERS[arch]()).eval(), fill(DECODERS[PAIRS[pair]]()).eval()
    decoder.use_softmax = True
    x = image(72, 104, seed=7)
    with torch.no_grad():
        maps = encoder(x, return_feature_maps=True)
        prob = decoder(maps, segSize=(65, 97))[0, :, ::8, ::8].numpy()
        (feat,) = encoder(x)
    for name, got in (("prob", prob), ("feat", feat.mean((2, 3))[0].numpy())):
        wanted = REFERENCE[f"{pair}/{name}"]
        atol = np.finfo(np.float32).eps * np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=atol)
    assert [x.shape[1] for x in maps] == list(encoder.channels)
    assert [72 // x.shape[2] for x in maps[:2]] == list(encoder.strides[:2])


def test_strides_of_dilated_encoders():
    for scale in (16, 32):
        last = min(scale, 16), scale
        with torch.device("meta"):
            encoders = {
                (4, 8, *last): models.ResnetDilated(resnet.resnet18(), dilate_scale=scale),
                (4, 8, *last, scale): models.MobileNetV2Dilated(mobilenet.mobilenetv2(), scale),
            }
            for strides, encoder in encoders.items():
                maps = encoder.eval()(torch.zeros(1, 3, 64, 64), return_feature_maps=True)
                assert tuple(64 // x.shape[2] for x in maps) == encoder.strides == strides


def test_classifiers_have_the_classes_of_imagenet():
    for build in CLASSIFIERS.values():
        with torch.device("meta"):
            assert build().eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


def test_a_classifier_with_custom_blocks_and_classes():
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert resnet.resnet18(num_classes=5).fc.out_features == 5
    wide = mobilenet.MobileNetV2(n_class=3, width_mult=1.5)
    assert wide.last_channel == 1920
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="multiple of 32"):
        mobilenet.MobileNetV2(input_size=100)
    with pytest.raises(ValueError, match="stride is 3"):
        mobilenet.InvertedResidual(8, 8, 3, 6)


def test_small_parts():
    x = torch.zeros(1, 8, 9, 9)
    assert resnet.conv3x3(8, 4, 2)(x).shape == (1, 4, 5, 5)
    assert models.conv3x3_bn_relu(8, 4, 2)(x).shape == (1, 4, 5, 5)
    assert [type(m).__name__ for m in mobilenet.conv_bn(8, 4, 2)] == [
        *("Conv2d", "SynchronizedBatchNorm2d", "ReLU6")
    ]
    assert mobilenet.conv_1x1_bn(8, 4)[0].kernel_size == (1, 1)
    # A block of other shapes than its input needs to be told how to get there.
    with pytest.raises(RuntimeError):
        resnet.BasicBlock(8, 4)(x)
    shortcut = nn.Conv2d(8, 16, 1)
    assert resnet.Bottleneck(8, 4, downsample=shortcut).eval()(x).shape == (1, 16, 9, 9)
    assert resnext.GroupBottleneck(8, 4, groups=2).conv2.groups == 2


def test_pretrained_weights_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    trained = resnet.resnet18()
    file = tmp_path / "hub" / "checkpoints" / "resnet18-imagenet.pth"
    file.parent.mkdir(parents=True)
    torch.save(trained.state_dict(), file)
    assert resnet.model_urls["resnet18"].endswith("/pretrained_resnet/resnet18-imagenet.pth")
    loaded = resnet.resnet18(pretrained=True)
    assert all(map(torch.equal, loaded.state_dict().values(), trained.state_dict().values()))
    with pytest.raises(OSError, match="MIT_SEMSEG_OFFLINE"):
        mobilenet.mobilenetv2(pretrained=True)


def test_load_url_stores_the_file_in_the_given_folder(tmp_path):
    there, here = tmp_path / "host", tmp_path / "kept"
    there.mkdir()
    torch.save({"a": torch.ones(2)}, there / "weights.pth")
    url = (there / "weights.pth").as_uri()
    assert torch.equal(urls.load_url(url, str(here))["a"], torch.ones(2))
    (there / "weights.pth").unlink()
    onto = urls.load_url(url, model_dir=str(here), map_location="meta")  # no second download
    assert onto["a"].device.type == "meta"


# ------------------------------------------------------------------------------ heads, losses
class Maps(nn.Module):
    """Two feature maps of 8 and 16 channels, of any image."""

    def forward(self, x, return_feature_maps=False):
        small = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8)
        return [small.expand(-1, 8, -1, -1), small.expand(-1, 16, -1, -1)]


@pytest.mark.parametrize("kind", [models.C1DeepSup, models.PPMDeepsup])
def test_the_auxiliary_head_is_computed_unless_probabilities_are_asked_for(kind):
    """Published with `fix_bn`, which trains a module in evaluation mode."""
    torch.manual_seed(0)
    x, label = torch.randn(2, 3, 32, 48), torch.zeros(2, 4, 6, dtype=torch.long)
    decoder = kind(num_class=3, fc_dim=16).eval()
    main, auxiliary = decoder(Maps()(x))
    assert main.shape == auxiliary.shape == (2, 3, 4, 6)
    torch.testing.assert_close(auxiliary.exp().sum(1), torch.ones(2, 4, 6))
    crit = nn.NLLLoss(ignore_index=-1)
    loss, _ = SegmentationModule(Maps(), decoder, crit, deep_sup_scale=0.4)({
        "img_data": x,
        "seg_label": label,
    })  # fmt: skip
    torch.testing.assert_close(loss, crit(main, label) + 0.4 * crit(auxiliary, label))
    decoder.use_softmax = True
    assert decoder(Maps()(x), segSize=(32, 48)).shape == (2, 3, 32, 48)
    upernet = models.UPerNet(5, 16, fpn_inplanes=(8, 8, 8, 16), fpn_dim=8)
    assert set(upernet.class_tensors()) == {"conv_last.1.weight", "conv_last.1.bias"}


def test_pixel_accuracy_by_hand():
    scores = torch.tensor([[0.9, 0.2, 0.1, 0.4], [0.1, 0.8, 0.9, 0.6]])[None, :, None]  # 1 2 1 4
    label = torch.tensor([[[0, 1, 0, -1]]])
    module = models.SegmentationModuleBase()
    assert module.pixel_acc(scores, label).item() == pytest.approx(2 / 3)
    assert module.pixel_acc(scores, label.fill_(-1)).item() == 0
    assert issubclass(SegmentationModule, models.SegmentationModuleBase)

    class Mine(SegmentationModule):
        def pixel_acc(self, pred, label):
            return torch.tensor(7.0)

    module = Mine(Maps(), models.C1(3, 16), nn.NLLLoss(ignore_index=-1))
    batch = {"img_data": torch.randn(2, 3, 16, 16), "seg_label": torch.zeros(2, 2, 2).long()}
    assert module(batch)[1] == 7


def test_initial_weights_of_layers():
    torch.manual_seed(0)
    conv, norm, other = nn.Conv2d(64, 64, 3), resnet.BatchNorm2d(4), nn.Linear(2, 2)
    before = other.weight.clone()
    for layer in (conv, norm, other, nn.BatchNorm2d(2, affine=False)):
        models.ModelBuilder.weights_init(layer)
    # He et al. 2015: the variance is 2 over the number of inputs.
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert norm.weight.tolist() == [1] * 4
    assert norm.bias.tolist() == pytest.approx([1e-4] * 4)
    assert torch.equal(other.weight, before)


# ------------------------------------------------------------------------------ HRNet's module
def test_hrnets_module():
    widths = [8, 4]
    module = hrnet.HighResolutionModule(
        2, hrnet.blocks_dict["BOTTLENECK"], (1, 2), widths, (2, 4), "SUM"
    )
    assert widths == module.get_num_inchannels() == [8, 16]  # changed in place, as published
    assert [len(branch) for branch in module.branches] == [1, 2]
    assert "branches.1.0.downsample.0.weight" in module.state_dict()
    assert "fuse_layers.1.0.0.0.weight" in module.state_dict()
    one, two = module([torch.zeros(2, 8, 8, 12), torch.zeros(2, 4, 4, 6)])
    assert (one.shape, two.shape) == ((2, 8, 8, 12), (2, 16, 4, 6))
    only = hrnet.HighResolutionModule(
        2, hrnet.BasicBlock, (1, 1), [4, 4], (4, 4), "SUM", multi_scale_output=False
    )
    assert len(only([torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 4, 4)])) == 1
    with pytest.raises(ValueError, match=r"num_blocks is \[1\]; num_branches is 2"):
        hrnet.HighResolutionModule(2, hrnet.BasicBlock, (1,), [4, 4], (4, 4), "SUM")
