"""Weights: what loads, what is refused, and that conversions are exact."""

from __future__ import annotations

import http.server
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mit_semseg.download import DownloadError
from mit_semseg.models import Decoder
from mit_semseg.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WEIGHTS,
    convert_tfslim_mobilenet,
    fetch_published,
    imagenet_weights,
    load_decoder,
    load_encoder,
    load_into,
    loading,
    published_checkpoint,
    read_state_dict,
    rename_torchvision_mobilenet,
    resolve,
    sources,
)

REAL = (
    Path(os.environ.get("SEMSEG_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    / "../weights/mobilenet_v2_imagenet_tfslim.pth"
)


class Head(Decoder):
    """The names of a C1 head."""

    def __init__(
        self, channels: Any = (5,), num_class: int = 4, strides: Any = None, width: int = 3
    ) -> None:
        super().__init__(channels, num_class, strides)
        self.cbr = nn.Sequential(nn.Conv2d(5, width, 3, bias=False), nn.BatchNorm2d(width))
        self.conv_last = nn.Conv2d(width, num_class, 1)
        self.conv_last_deepsup = nn.Conv2d(width, num_class, 1)


class Pyramid(Decoder):
    """The names of a PPM head: its classifier is the last of several layers."""

    def __init__(
        self, channels: Any = (5,), num_class: int = 4, strides: Any = None, width: int = 3
    ) -> None:
        super().__init__(channels, num_class, strides)
        self.conv_last = nn.Sequential(
            nn.Conv2d(5, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_class, 1),
        )


def values(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module: nn.Module, state: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(v, state[k]) for k, v in module.state_dict().items() if k not in but)


# ------------------------------------------------------------------------------------ load_into
def test_everything_matches(tmp_path: Path) -> None:
    source, target = Head(), Head()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    report = load_into(target, tmp_path / "w.pth", what="decoder")
    assert same(target, values(source))
    assert report.ok
    assert (report.missing, report.unexpected, report.mismatched, report.dropped) == ([],) * 4
    assert sorted(report.matched) == sorted(target.state_dict())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_wrappers_and_prefixes(tmp_path: Path, wrapper: str | None) -> None:
    source, target = Head(), Head()
    state: Any = {f"module.{k}": v for k, v in source.state_dict().items()}
    if wrapper:
        state = {"epoch": 3, wrapper: state, "arch": "x"}
    torch.save(state, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=wrapper is None)
    load_into(target, tmp_path / "w.pth.tar", what="decoder")
    assert same(target, values(source))


def test_bookkeeping_is_dropped_and_batch_counts_are_not_missed() -> None:
    source, target = Head(), Head()
    state = values(source)
    del state["cbr.1.num_batches_tracked"]
    for name in ("_tmp_running_mean", "_tmp_running_var", "_running_iter"):
        state[f"cbr.1.{name}"] = torch.ones(7)
    report = load_into(target, state, what="decoder", file="old.pth")
    assert len(report.dropped) == 3
    assert (report.missing, report.unexpected) == ([], [])
    assert report.file == "old.pth"


def test_half_precision_is_cast() -> None:
    source, target = Head().half(), Head()
    load_into(target, source.state_dict(), what="decoder")
    for key, value in target.state_dict().items():
        expected = source.state_dict()[key]
        assert value.dtype == (torch.int64 if "num_batches" in key else torch.float32)
        assert torch.equal(value, expected.to(value.dtype))


@pytest.mark.parametrize(
    ("kind", "classifier"),
    [
        (
            Head,
            (
                "conv_last.weight",
                "conv_last.bias",
                "conv_last_deepsup.weight",
                "conv_last_deepsup.bias",
            ),
        ),
        (Pyramid, ("conv_last.4.weight", "conv_last.4.bias")),
    ],
)
def test_another_class_count_loads_all_but_the_classifier(
    kind: Any, classifier: tuple[str, ...]
) -> None:
    source, target = kind(num_class=150), kind(num_class=4)
    before = values(target)
    report = load_into(target, source.state_dict(), what="decoder")
    assert sorted(report.mismatched) == sorted(classifier)
    assert report.missing == []
    assert same(target, values(source), but=classifier)
    assert all(torch.equal(target.state_dict()[k], before[k]) for k in classifier)
    assert "another number of classes" in str(report)


@pytest.mark.parametrize("kind", [Head, Pyramid])
def test_another_width_is_refused(kind: Any) -> None:
    target = kind(width=3)
    before = values(target)
    with pytest.raises(ValueError, match="differ in shape") as caught:
        load_into(target, kind(width=2).state_dict(), what="decoder", file="w.pth")
    assert "w.pth" in str(caught.value)
    assert "MODEL.fc_dim" in str(caught.value)
    assert same(target, before)


def test_no_common_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor name matches.*fc.weight.*cbr.0.weight"):
        load_into(Head(), {"fc.weight": torch.ones(2)}, what="decoder", file="w.pth")


def test_missing_and_left_over_are_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    state = values(Head())
    del state["cbr.0.weight"]
    state |= {f"extra{i}.weight": torch.ones(1) for i in range(7)}
    with caplog.at_level(logging.INFO, logger="mit_semseg"):
        report = load_into(Head(), state, what="decoder", file="w.pth")
    assert report.missing == ["cbr.0.weight"]
    assert len(report.unexpected) == 7
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    line = caplog.records[0].getMessage()
    assert line == (
        "decoder from w.pth: 9 tensors matched, 1 missing (cbr.0.weight), 7 left over "
        "(extra0.weight, extra1.weight, extra2.weight, extra3.weight, extra4.weight, ...)"
    )


def test_a_full_match_is_told_without_alarm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mit_semseg"):
        load_into(Head(), Head().state_dict(), what="decoder", file="w.pth")
    assert [r.levelname for r in caplog.records] == ["INFO"]


def test_it_is_printed_where_no_logging_is_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "logger", logging.Logger("silent"))
    load_into(Head(), Head().state_dict(), what="decoder", file="w.pth")
    assert (
        capsys.readouterr().out
        == "decoder from w.pth: 10 tensors matched, 0 missing, 0 left over\n"
    )


def test_strict() -> None:
    state = values(Head())
    del state["cbr.0.weight"]
    target = Head()
    before = values(target)
    with pytest.raises(ValueError, match="1 missing"):
        load_into(target, state, what="decoder", strict=True)
    assert same(target, before)
    with pytest.raises(ValueError, match="number of classes"):
        load_into(target, Head(num_class=9).state_dict(), what="decoder", strict=True)


def test_values_that_are_not_finite_are_refused() -> None:
    state = values(Head())
    state["cbr.1.running_var"][0] = float("nan")
    with pytest.raises(ValueError, match="cbr.1.running_var"):
        load_into(Head(), state, what="decoder", file="w.pth")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code of the file ran",)


@pytest.mark.parametrize("content", ["code", "garbage", "list", "empty"])
def test_what_is_no_weight_file_is_refused_by_name(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pth"
    if content == "code":
        torch.save({"a": Evil()}, path)
    elif content == "garbage":
        path.write_bytes(b"<html>not here</html>")
    elif content == "list":
        torch.save([1, 2], path)
    else:
        torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="w.pth") as caught:
        load_into(Head(), path, what="decoder")
    assert "\n" not in str(caught.value)
    assert "code of the file ran" not in capsys.readouterr().out


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(Head().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"w\.pth is damaged \(cut short"):
        read_state_dict(path)


# -------------------------------------------------------------------------------------- resolve
def test_a_missing_file_lists_what_is_there(tmp_path: Path) -> None:
    for name in ("encoder_epoch_1.pth", "encoder_epoch_2.pth", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError) as caught:
        resolve(tmp_path / "encoder_epoch_3.pth")
    assert "encoder_epoch_1.pth, encoder_epoch_2.pth" in str(caught.value)
    assert "notes" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        resolve(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone"):
        load_into(Head(), tmp_path / "gone" / "x.pth", what="decoder")


def test_every_source_says_where_it_comes_from() -> None:
    for source in WEIGHTS.values():
        assert source.urls
        assert source.file == source.urls[0].rsplit("/", 1)[-1]
        assert source.licence
        assert "arXiv:" in source.paper
        assert source.data
        assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_an_encoder_without_published_weights() -> None:
    with pytest.raises(ValueError, match="'resnet51'.*'none'.*did you mean 'resnet50'"):
        imagenet_weights("resnet51")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A mirror on this machine and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(served), **kwargs)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for proxy in ("http_proxy", "HTTP_PROXY", "MIT_SEMSEG_OFFLINE"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", f"http://127.0.0.1:{server.server_address[1]}/")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_imagenet_weights_by_name_are_fetched_once_and_cached(host: Path, tmp_path: Path) -> None:
    source, target = Head(), Head()
    torch.save(source.state_dict(), host / "resnet18-imagenet.pth")
    report = load_encoder(target, "resnet18dilated", "")
    assert report is not None
    assert same(target, values(source))
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-imagenet.pth"
    assert cached.is_file()
    (host / "resnet18-imagenet.pth").unlink()
    assert load_encoder(Head(), "resnet18dilated", "") is not None
    assert resolve("resnet18") == cached


def test_urls_that_end_alike_do_not_share_a_cached_file(host: Path) -> None:
    base = os.environ["MIT_SEMSEG_MIRROR"]
    sources = {}
    for name in ("a", "b"):
        (host / name).mkdir()
        sources[name] = Head()
        torch.save(sources[name].state_dict(), host / name / "encoder_epoch_20.pth")
    for name, source in sources.items():
        target = Head()
        load_decoder(target, "c1", f"{base}{name}/encoder_epoch_20.pth")
        assert same(target, values(source))


def test_offline_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DownloadError) as caught:
        load_encoder(Head(), "mobilenetv2dilated", "")
    text = str(caught.value)
    assert "http://sceneparsing.csail.mit.edu/model/pretrained_resnet/mobilenet_v2.pth.tar" in text
    assert str(tmp_path / "hub" / "checkpoints" / "mobilenet_v2.pth.tar") in text
    assert "'none'" in text
    assert "torchvision:mobilenet_v2" in text


def test_none_is_random_and_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    target = Head()
    before = values(target)
    assert load_encoder(target, "resnet50", "none") is None
    assert load_decoder(target, "c1", "none") is None
    assert load_decoder(target, "c1", "") is None
    assert same(target, before)


# ------------------------------------------------------------------------ published checkpoints
def test_published_checkpoint_urls() -> None:
    host = "http://sceneparsing.csail.mit.edu/model/pytorch"
    name = "ade20k-resnet50dilated-ppm_deepsup"
    assert published_checkpoint(name) == (
        [f"{host}/{name}/encoder_epoch_20.pth"],
        [f"{host}/{name}/decoder_epoch_20.pth"],
    )
    encoder, _ = published_checkpoint("ade20k-hrnetv2")  # the recipe's name
    assert encoder == [f"{host}/ade20k-hrnetv2-c1/encoder_epoch_30.pth"]
    with pytest.raises(ValueError, match="did you mean 'ade20k-resnet50-upernet'"):
        published_checkpoint("ade20k-resnet50-uppernet")


def test_a_published_model_and_its_image_are_fetched(host: Path, tmp_path: Path) -> None:
    folder = host / "ade20k-resnet50-upernet"
    folder.mkdir()
    for part in ("encoder", "decoder"):
        torch.save(Head().state_dict(), folder / f"{part}_epoch_30.pth")
    (host / "ADE_val_00001519.jpg").write_bytes(b"jpeg")
    paths = fetch_published("ade20k-resnet50-upernet", tmp_path / "ckpt")
    assert [p.name for p in paths] == [
        "encoder_epoch_30.pth",
        "decoder_epoch_30.pth",
        "ADE_val_00001519.jpg",
    ]
    assert all(p.is_file() for p in paths)


# ------------------------------------------------------------------ MobileNetV2 from elsewhere
class Flat(nn.Module):
    """Torchvision's MobileNetV2 features under the published names: blocks counted through."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v2
        from torchvision.models.mobilenetv2 import InvertedResidual

        features = mobilenet_v2(weights=None).features[:18]
        for block in features:
            if isinstance(block, InvertedResidual):
                flat: list[nn.Module] = []
                for part in block.conv:
                    flat += list(part) if isinstance(part, nn.Sequential) else [part]
                block.conv = nn.Sequential(*flat)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def torchvision_mobilenet(eps: float = 1e-5) -> nn.Module:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    net = mobilenet_v2(weights=None, norm_layer=lambda c: nn.BatchNorm2d(c, eps=eps))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch sets the running statistics
            nn.init.uniform_(module.weight, 0.05, 0.4)  # small, so that eps 1e-3 shows
            nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        net(torch.rand(4, 3, 96, 96) * 2 - 1)
    return net.eval()


def test_torchvision_names_become_the_published_ones() -> None:
    source, target = torchvision_mobilenet(), Flat().eval()
    state = rename_torchvision_mobilenet(source.state_dict())
    assert sorted(state) == sorted(target.state_dict())
    load_into(target, state, what="encoder", strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(target(x), source.features[:18](x))


def test_the_projects_own_encoder_takes_them_all() -> None:
    from mit_semseg.models import ENCODERS

    state = rename_torchvision_mobilenet(torchvision_mobilenet().state_dict())
    report = load_into(ENCODERS.get("mobilenetv2dilated")(), state, what="encoder", strict=True)
    assert (len(report.matched), report.unexpected) == (306, [])


def test_torchvision_weights_from_a_mirror_and_from_a_file(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = torchvision_mobilenet(), Flat()
    path = tmp_path / "mine.pth"
    torch.save(source.state_dict(), path)
    report = load_encoder(target, "mobilenetv2dilated", f"torchvision:{path}")
    assert report is not None
    assert report.ok
    assert report.unexpected == []

    # The published file's digest is in its name, and ours is another file.
    torch.save(source.state_dict(), host / "mobilenet_v2-b0353104.pth")
    monkeypatch.setattr(sources, "mirrored", lambda name, urls: [f"{_mirror()}{name}"])
    with pytest.raises(DownloadError, match="expected b0353104"):
        load_encoder(target, "mobilenetv2dilated", "torchvision:mobilenet_v2")


def _mirror() -> str:
    return os.environ["MIT_SEMSEG_MIRROR"]


@pytest.mark.parametrize(
    ("arch", "name", "reason"),
    [
        ("resnet50dilated", "torchvision:resnet50", "7x7.*set .*_encoder to torchvision_resnet50"),
        ("resnet50dilated", "torchvision:mobilenet_v2", "'resnet50dilated': set .* to mobilenetv2"),
        ("torchvision_resnet50", "torchvision:resnet34", "set MODEL.arch_encoder to resnet34"),
        ("resnet18", "tfslim:x.pth", "mobilenetv2dilated"),
        ("mobilenetv2dilated", "torchvision:mobilenet_v3", "did you mean 'mobilenet_v2'"),
    ],
)
def test_weights_of_another_architecture_are_refused(arch: str, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_encoder(Head(), arch, name)


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))]
)
def test_tfslim_conversion_is_exact(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Both nets see one picture, each in its own convention; no zero padding is involved."""
    source = torchvision_mobilenet(eps=1e-3)
    target = Flat().eval()
    state = convert_tfslim_mobilenet(source.state_dict(), mean=mean, std=std)
    load_into(target, state, what="encoder", strict=True)
    nets = [source.features[:18].double(), target.features.double()]
    for net in nets:
        # Only the first convolution pads with another grey in either convention.
        net[0][0].padding = (0, 0)
    torch.manual_seed(1)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    y = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected, got = nets[0](2 * x - 1), nets[1](y)
        plain = rename_torchvision_mobilenet(source.float().state_dict())
        load_into(target.float(), plain, what="encoder")
        unconverted = target.double().features(2 * x - 1)  # only eps differs now
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert (unconverted - expected).abs().max() > 100 * tolerance


def test_tfslim_needs_a_mobilenet() -> None:
    with pytest.raises(ValueError, match="not a MobileNetV2"):
        convert_tfslim_mobilenet(Head().state_dict())


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there")
def test_the_real_tfslim_file_loads_and_is_the_same_net() -> None:
    from torchvision.models import mobilenet_v2

    source = mobilenet_v2(weights=None, norm_layer=lambda c: nn.BatchNorm2d(c, eps=1e-3))
    source.load_state_dict(torch.load(REAL, weights_only=True), strict=False)
    target = Flat().eval()
    report = load_encoder(target, "mobilenetv2dilated", f"tfslim:{REAL}")
    assert report is not None
    assert report.ok
    torch.manual_seed(1)
    x = torch.rand(1, 3, 320, 320)
    y = (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = source.eval().features[:7](2 * x - 1)
        got = target.features[:7](y)
    # Stride 8 here: what the border's padding reaches stays within a few pixels of it.
    inner = (..., slice(8, -8), slice(8, -8))
    error = (got[inner] - expected[inner]).abs().max() / expected.abs().max()
    assert error < 1e-4
