"""Names, paths and urls of weights to files, and published checkpoints."""

import os

import pytest
import torch
from heads import Head, same, values

from mit_semseg.download import DownloadError
from mit_semseg.weights import (
    WEIGHTS,
    fetch_published,
    imagenet_weights,
    load_decoder,
    load_encoder,
    load_into,
    published_checkpoint,
    resolve,
)


def test_a_missing_file_lists_what_is_there(tmp_path):
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


def test_every_source_says_where_it_comes_from():
    for source in WEIGHTS.values():
        assert source.urls
        assert source.file == source.urls[0].rsplit("/", 1)[-1]
        assert source.licence
        assert "arXiv:" in source.paper
        assert source.data
        assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_an_encoder_without_published_weights():
    with pytest.raises(ValueError, match="'resnet51'.*'none'.*did you mean 'resnet50'"):
        imagenet_weights("resnet51")


def test_imagenet_weights_by_name_are_fetched_once_and_cached(host, tmp_path):
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


def test_urls_that_end_alike_do_not_share_a_cached_file(host):
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


def test_offline_the_message_names_the_url_and_the_target(tmp_path, monkeypatch):
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DownloadError) as caught:
        load_encoder(Head(), "mobilenetv2dilated", "")
    text = str(caught.value)
    assert "http://sceneparsing.csail.mit.edu/model/pretrained_resnet/mobilenet_v2.pth.tar" in text
    assert str(tmp_path / "hub" / "checkpoints" / "mobilenet_v2.pth.tar") in text
    assert "'none'" in text
    assert "torchvision:mobilenet_v2" in text


def test_none_is_random_and_downloads_nothing(monkeypatch):
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    target = Head()
    before = values(target)
    assert load_encoder(target, "resnet50", "none") is None
    assert load_decoder(target, "c1", "none") is None
    assert load_decoder(target, "c1", "") is None
    assert same(target, before)


# ------------------------------------------------------------------------ published checkpoints
def test_published_checkpoint_urls():
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


def test_a_published_model_and_its_image_are_fetched(host, tmp_path):
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
