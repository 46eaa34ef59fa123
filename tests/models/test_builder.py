"""ModelBuilder: signatures as published, weights, and whole models from a configuration."""

import copy

import pytest
import torch

from mit_semseg.config import load_config
from mit_semseg.models import ModelBuilder
from mit_semseg.models.encoders.base import widen_input


@pytest.mark.parametrize(
    ("fc_dim", "channels"),
    [
        (320, (24, 32, 64, 160, 320)),
        (512, (64, 128, 256, 512)),
        (720, (720,)),
        (2048, (256, 512, 1024, 2048)),
        (1024, (128, 256, 512, 1024)),
    ],
)
def test_a_decoder_needs_only_fc_dim(fc_dim, channels):
    with torch.device("meta"):
        assert ModelBuilder.build_decoder("c1", fc_dim=fc_dim).channels == channels


TABLE = "Idx,Name\n1,Road\n2,car\n3,sky\n"


@pytest.mark.parametrize(
    ("classes", "rows"),
    [
        (("sky", "road", "tram", "car"), (2, 0, None, 1)),  # one more
        (("sky", "road"), (2, 0)),
        (("car", "road", "sky"), (1, 0, 2)),  # as many, in another order
        (("road", "bus", "sky"), (0, 1, 2)),  # one renamed
        (("a", "b", "c"), (0, 1, 2)),
        (("a", "b"), (None, None)),
        (("class 0", "class 1"), (None, None)),
    ],
)
def test_rows_of_classes_are_loaded_by_name(tmp_path, classes, rows):
    (tmp_path / "classes.csv").write_text(TABLE)
    saved = ModelBuilder.build_decoder("c1_deepsup", fc_dim=512, num_class=3)
    torch.save(saved.state_dict(), tmp_path / "decoder.pth")
    weights = str(tmp_path / "decoder.pth")
    torch.manual_seed(0)
    fresh = ModelBuilder.build_decoder("c1_deepsup", fc_dim=512, num_class=len(classes))
    torch.manual_seed(0)
    loaded = ModelBuilder.build_decoder(
        "c1_deepsup", fc_dim=512, num_class=len(classes), weights=weights, classes=classes
    )
    assert torch.equal(loaded.cbr[0].weight, saved.cbr[0].weight)
    for layer in ("conv_last", "conv_last_deepsup"):
        new, old, initial = (getattr(net, layer) for net in (loaded, saved, fresh))
        for i, row in enumerate(rows):
            source, at = (initial, i) if row is None else (old, row)
            assert torch.equal(new.weight[i], source.weight[at])
            assert torch.equal(new.bias[i], source.bias[at])


def config(*options):
    base = ["MODEL.arch_encoder", "resnet18dilated", "MODEL.fc_dim", 512]
    base += ["MODEL.weights_encoder", "none", "DATASET.num_class", 6]
    return load_config(None, [str(x) for x in [*base, *options]])


def test_from_config_builds_the_configured_model():
    weights = torch.linspace(1, 2, 6)
    module = ModelBuilder.from_config(
        config("MODEL.arch_decoder", "ppm_deepsup", "TRAIN.deep_sup_scale", 0.3),
        inference=False,
        class_weights=weights,
    )
    assert module.deep_sup_scale == 0.3
    assert not module.decoder.use_softmax
    assert torch.equal(module.crit.weight, weights)
    assert module.decoder.channels == module.encoder.channels == (64, 128, 256, 512)
    assert module.decoder.strides == (4, 8, 8, 8)


def test_from_config_checks_what_it_is_told():
    deep = config("MODEL.arch_decoder", "ppm_deepsup", "TRAIN.aux_weights", "(0.3,)")
    assert ModelBuilder.from_config(deep, inference=False).aux_weights == (0.3,)
    with pytest.raises(ValueError, match=r"set MODEL\.fc_dim 512"):
        ModelBuilder.from_config(config("MODEL.fc_dim", 2048))


def test_from_config_for_inference():
    module = ModelBuilder.from_config(
        config("MODEL.arch_decoder", "upernet", "TRAIN.loss", "nll+lovasz"), inference=True
    ).eval()
    assert module.decoder.use_softmax
    assert module.deep_sup_scale is None
    with torch.no_grad():
        p = module({"img_data": torch.randn(1, 3, 64, 64)}, segSize=(50, 70))
    assert p.shape == (1, 6, 50, 70)
    assert torch.allclose(p.sum(1), torch.ones(1, 50, 70), atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "enet"])
def test_weights_of_three_and_of_four_channels_start_an_encoder_of_four(arch, tmp_path):
    path = tmp_path / "encoder.pth"

    def started(in_channels):
        encoder = ModelBuilder.build_encoder(arch, weights=str(path), in_channels=in_channels)
        assert encoder.in_channels == in_channels
        return encoder.state_dict()

    torch.manual_seed(0)
    three = ModelBuilder.build_encoder(arch, weights="none")
    torch.save(three.state_dict(), path)
    torch.testing.assert_close(started(3), three.state_dict(), rtol=0, atol=0)
    widened = copy.deepcopy(three)
    widen_input(widened, 4)
    torch.testing.assert_close(started(4), widened.state_dict(), rtol=0, atol=0)

    four = ModelBuilder.build_encoder(arch, weights="none", in_channels=4)
    torch.save(four.state_dict(), path)
    torch.testing.assert_close(started(4), four.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"differ in shape.*MODEL\.in_channels"):
        started(3)
