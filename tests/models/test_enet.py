"""ENet."""

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from encoder_tester import EncoderTester
from pair_tester import PairTester, build_pair, count
from torch import nn

from mit_semseg.models import ENCODERS
from mit_semseg.models.encoders.base import widen_input
from mit_semseg.models.encoders.enet import Bottleneck, Downsampling


class TestENetEncoder(EncoderTester):
    arch = "enet"


class TestENetDecoder(DecoderTester):
    arch = "enet"
    min_feature_maps = 3
    channels = (16, 64, 128)

    def features(self, batch: int = 2) -> list[torch.Tensor]:
        torch.manual_seed(1)
        planes = [torch.randn(batch, 16, 32, 48), torch.randn(batch, 64, 16, 24)]
        indices = [F.max_pool2d(plane, 2, return_indices=True)[1] for plane in planes]
        return [*indices, torch.randn(batch, 128, 8, 12)]

    @pytest.mark.parametrize("channels", [(20,), (8, 12)])
    def test_works_with_any_widths_and_levels(self, channels: tuple[int, ...]) -> None:
        """Its own encoder's are the only ones."""
        with pytest.raises(ValueError, match="enet needs at least 3"):
            self.build(channels=channels)
        assert self.build().eval().logits(self.features())[0].shape == (2, 5, 64, 96)


class TestENet(PairTester):
    encoder, decoder = "enet", "enet"
    rate = 5e-3


@pytest.mark.parametrize("classes", [12, 20])
def test_size(classes: int) -> None:
    parameters = count("enet", "enet", classes)
    assert parameters * 4 / 2**20 == pytest.approx(1.34, rel=0.04)
    assert parameters / 1e6 == pytest.approx(0.37, rel=0.03)  # table 3


def test_stages_are_those_of_table_1() -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get("enet")()
    for stage in (encoder.stage2, encoder.stage3):
        convs = [[m for m in block.modules() if isinstance(m, nn.Conv2d)][1:-1] for block in stage]
        kernels = [tuple(conv.kernel_size for conv in found) for found in convs]
        asymmetric = ((5, 1), (1, 5))
        assert kernels == [((3, 3),), ((3, 3),), asymmetric, ((3, 3),)] * 2
        assert [found[0].dilation[0] for found in convs] == [1, 2, 1, 4, 1, 8, 1, 16]
    drops = {m.p for m in encoder.stage1.modules() if isinstance(m, nn.Dropout2d)}
    later = {m.p for m in encoder.stage3.modules() if isinstance(m, nn.Dropout2d)}
    assert (drops, later) == ({0.01}, {0.1})


def test_the_main_branch_is_pooled_and_filled_up() -> None:
    block = Downsampling(16, 24, 0.0).eval()
    nn.init.zeros_(block.extension[-2].weight)  # of the BatchNorm: nothing is added
    x = torch.rand(1, 16, 7, 9)
    y, indices = block(x)
    torch.testing.assert_close(y[:, :16], F.max_pool2d(x, 2, ceil_mode=True))
    assert not y[:, 16:].any()
    assert torch.equal(x.flatten(2).gather(2, indices.flatten(2)), y[:, :16].flatten(2))


def test_depth_is_read_by_the_convolution_and_not_pooled() -> None:
    torch.manual_seed(0)
    encoder = ENCODERS.get("enet")()
    widen_input(encoder, 4)
    first, _, last = encoder.eval()(torch.randn(1, 4, 32, 32), return_feature_maps=True)
    assert first.shape == (1, 16, 8, 8) and last.shape == (1, 128, 4, 4)


@pytest.mark.parametrize("pair", [("enet", "enet"), ("vgg16_bn_indices", "segnet")])
@torch.no_grad()
def test_scores_beyond_an_odd_image_are_cropped_and_not_squeezed(pair: tuple[str, str]) -> None:
    module = build_pair(*pair).eval()
    image = torch.randn(1, 3, 33, 37)
    (emitted,) = module.decoder.logits(module.features(image))
    assert emitted.shape[2] > 33 and emitted.shape[3] > 37
    wanted = emitted[..., :33, :37]
    assert torch.equal(module.logits(image), wanted)
    assert torch.equal(module({"img_data": image}, segSize=(33, 37)), wanted.softmax(1))
    label = torch.randint(0, 5, (1, 33, 37))
    loss, _ = module({"img_data": image, "seg_label": label})
    torch.testing.assert_close(loss, F.cross_entropy(wanted, label))


@pytest.mark.parametrize("options", [{}, {"dilation": 8}, {"asymmetric": True}])
@torch.no_grad()
def test_a_bottleneck_adds_to_its_input(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    block = Bottleneck(16, 0.1, **options).eval()
    x = torch.randn(2, 16, 9, 11)
    added = block.extension(x)
    assert added.shape == x.shape and added.abs().max() > 0.1
    torch.testing.assert_close(block(x), F.prelu(x + added, torch.full((16,), 0.25)))


def test_batch_norm_adds_1e_3_to_the_variance() -> None:
    """As in the authors' models/encoder.lua and decoder.lua."""
    torch.manual_seed(0)
    module = build_pair("enet", "enet").eval()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 71 + 17 and {m.eps for m in norms} == {1e-3}
    norm = module.encoder.initial_act[0]
    norm.running_var.fill_(3e-3)
    x = torch.randn(1, 16, 2, 3)
    torch.testing.assert_close(norm(x), x / 4e-3**0.5)
