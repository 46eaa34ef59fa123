"""What every decoder must do; a test class subclasses this and names its decoder."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from encoder_tester import unmoved
from torch import nn

from mit_semseg.models import DECODERS, Decoder, ModelBuilder
from mit_semseg.weights import load_into

WIDTHS = {
    320: (24, 32, 64, 160, 320),
    512: (64, 128, 256, 512),
    720: (720,),
    2048: (256, 512, 1024, 2048),
}


class DecoderTester:
    """Set `arch`, `published` (fc_dims in state_dicts.json), `min_feature_maps` and `auxiliary`."""

    arch: str
    published: tuple[int, ...] = ()
    min_feature_maps: int = 1
    auxiliary: bool = False
    channels: tuple[int, ...] = (12, 20, 28, 36)

    def build(self, **options: object) -> Decoder:
        torch.manual_seed(0)
        return ModelBuilder.build_decoder(
            self.arch, **{"channels": self.channels, "num_class": 5, **options}
        )

    def features(self, batch: int = 2) -> list[torch.Tensor]:
        torch.manual_seed(1)
        sides = [(12, 18), (6, 9), (3, 5), (3, 5)]
        return [torch.randn(batch, c, *side) for c, side in zip(self.channels, sides, strict=True)]

    def test_has_the_published_state_dict(
        self, published_shapes: dict[str, dict[str, list[int]]]
    ) -> None:
        prefix = f"decoder/{self.arch}/fc"
        stored = {int(x.removeprefix(prefix)) for x in published_shapes if x.startswith(prefix)}
        assert stored == set(self.published)
        for fc_dim in self.published:
            for channels in (None, WIDTHS[fc_dim]):
                with torch.device("meta"):
                    decoder = ModelBuilder.build_decoder(
                        self.arch, fc_dim=fc_dim, channels=channels
                    )
                own = {key: list(value.shape) for key, value in decoder.state_dict().items()}
                assert own == published_shapes[f"{prefix}{fc_dim}"]

    @pytest.mark.parametrize("channels", [(20,), (9, 8), (8, 12, 24), (6, 8, 12, 20, 8)])
    def test_works_with_any_widths_and_levels(self, channels: tuple[int, ...]) -> None:
        if len(channels) < self.min_feature_maps:
            message = f"{self.arch} needs at least {self.min_feature_maps} feature maps"
            with pytest.raises(ValueError, match=message):
                self.build(channels=channels)
            return
        with torch.device("meta"):
            decoder = self.build(channels=channels).eval()
            maps = [torch.zeros(2, c, 16 - i, 20 - i) for i, c in enumerate(channels)]
        (logits,) = decoder.logits(maps)
        assert logits.shape[:2] == (2, 5)

    def test_training_gives_log_probabilities_of_every_head(self) -> None:
        decoder = self.build().train()
        out = decoder(self.features())
        assert isinstance(out, tuple) == self.auxiliary == bool(DECODERS.get(self.arch).auxiliary)
        for head in out if self.auxiliary else (out,):
            assert head.shape[:2] == (2, 5)
            assert torch.allclose(head.exp().sum(1), torch.ones(()), atol=1e-5)

    def test_inference_resizes_logits_before_the_softmax(self) -> None:
        decoder = self.build(use_softmax=True).eval()
        (logits,) = decoder.logits(self.features())
        wanted = F.softmax(
            F.interpolate(logits, size=(31, 47), mode="bilinear", align_corners=False), dim=1
        )
        assert torch.equal(decoder(self.features(), segSize=(31, 47)), wanted)
        assert torch.equal(decoder(self.features()), F.softmax(logits, dim=1))
        decoder.use_softmax = False
        assert torch.allclose(decoder(self.features(), segSize=(31, 47)), wanted.log(), atol=1e-5)

    def test_starts_as_published(self) -> None:
        for module in self.build().modules():
            if isinstance(module, nn.BatchNorm2d):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert torch.equal(module.bias, torch.full_like(module.bias, 1e-4))
            elif isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                fan_in = module.weight[0].numel()
                assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)

    def test_one_sample_trains_every_parameter(self) -> None:
        decoder = self.build().train()
        out = decoder(self.features(batch=1))
        heads = out if isinstance(out, tuple) else (out,)
        sum((x * torch.randn_like(x)).sum() for x in heads).backward()
        assert unmoved(decoder) == []

    def test_a_coarse_label_trains_every_score(self) -> None:
        """DATASET.segm_downsampling_rate may be larger than the stride of the scores."""
        decoder = self.build().train()
        emitted: list[torch.Tensor] = []
        score = decoder.logits

        def watched(features: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            emitted.extend(score(features))
            for scores in emitted:
                scores.retain_grad()
            return tuple(emitted)

        decoder.logits = watched  # type: ignore[method-assign]
        losses = (None, *(head.loss for head in decoder.auxiliary))
        heads = decoder.log_probabilities(self.features(), (3, 2))
        sum((x * torch.randn_like(x)).sum() for x in heads).backward()
        assert [x.shape[2:] for x, loss in zip(heads, losses) if not loss] == [(3, 2)] * (
            len(heads) - sum(map(bool, losses))
        )
        assert all(scores.grad is not None and scores.grad.all() for scores in emitted)

    def test_another_number_of_classes_leaves_out_what_depends_on_it(self) -> None:
        source, target = self.build(num_class=7), self.build(num_class=5)
        with torch.no_grad():
            for value in source.state_dict().values():
                value.fill_(3)
        theirs, before = source.state_dict(), copy.deepcopy(target.state_dict())
        differ = [k for k, value in before.items() if value.shape != theirs[k].shape]
        report = load_into(target, theirs, what="decoder")
        assert (report.mismatched, report.missing, report.unexpected) == (differ, [], [])
        assert "conv_last" in str(differ)
        for key, value in target.state_dict().items():
            assert torch.equal(value, (before if key in differ else theirs)[key])
        wrong = {**theirs, differ[0]: theirs[differ[0]].unsqueeze(0)}
        with pytest.raises(ValueError, match="1 tensors differ in shape"):
            load_into(target, wrong, what="decoder")
