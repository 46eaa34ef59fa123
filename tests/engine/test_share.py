"""Models on the hub: pushed to and fetched from a stand-in of its API on this machine."""

import importlib
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub
from PIL import Image

from mit_semseg import Segmenter
from mit_semseg.cli import main
from mit_semseg.engine import hub as hub_names
from mit_semseg.engine.checkpoint import CheckpointFolder
from mit_semseg.engine.hub import HubName
from mit_semseg.engine.share import prepare, push
from mit_semseg.weights import load_checked

huggingface_hub = pytest.importorskip("huggingface_hub")
NAMES = ("road", "sky|dusk", "car")
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the hub with a cache of its own, and a token that may write."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    constants = importlib.import_module("huggingface_hub.constants")
    for name, value in {
        "ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_names, "PAUSES", (0.01, 0.01))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(tmp_path, make_model):
    folder = tmp_path / "model"
    make_model(
        *(folder, NAMES),
        DATASET__root_dataset=str(tmp_path / "secret" / "photos"),
        DATASET__list_train=(str(tmp_path / "secret" / "a.odgt"), "b.odgt"),
    )
    return folder


def evaluate(folder, checkpoint="best.pth", mean_iou=0.6543):
    """What an evaluation leaves in a folder."""
    out = folder / "result_eval"
    (out / "pictures").mkdir(parents=True)
    for name in ("class_iou.png", "pictures/b.png", "pictures/a.png"):
        Image.fromarray(IMAGE).save(out / name)
    result = {
        "checkpoint": checkpoint,
        "images": 7,
        "imgSizes": [32, 48],
        "flip": True,
        "precision": "fp32",
        "mean_iou": mean_iou,
        "pixel_accuracy": 0.875,
        "classes": [{"name": n, "iou": iou} for n, iou in zip(NAMES, (0.5, None, 0.25))],
    }
    (out / "eval.json").write_text(json.dumps(result))


def refused(call):
    with pytest.raises(OSError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pushed_model_predicts_the_same_elsewhere(hub, model, tmp_path):
    evaluate(model)
    before = Segmenter.from_checkpoint(model, device="cpu")
    assert before.push_to_hub("me/streets", license="mit") == f"{hub.url}/me/streets"
    expected = before(IMAGE)
    shutil.rmtree(model)
    after = Segmenter.from_pretrained("hub:me/streets", device="cpu")
    found = after(IMAGE)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.names == NAMES
    np.testing.assert_array_equal(found.classes.colors, expected.classes.colors)
    files = next(iter(reversed(hub.models["me/streets"]["commits"].values())))
    assert set(files) == {
        *(".gitattributes", "README.md", "config.yaml", "classes.csv", "class_iou.png"),
        *("encoder_best.safetensors", "decoder_best.safetensors", "pictures/a.png"),
        "pictures/b.png",
    }
    assert not [name for name, data in files.items() if b"secret" in data]
    # Only what the model needs was downloaded.
    cached = {path.name for path in (tmp_path / "cache").glob("**/snapshots/*/*")}
    assert cached == {
        *("config.yaml", "classes.csv", "encoder_best.safetensors", "decoder_best.safetensors")
    }


def test_the_command_pushes_and_predicts(hub, model, tmp_path, capsys):
    assert main(["push", str(model), "me/streets", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/me/streets"
    assert hub.models["me/streets"]["private"]
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    words = ["--gpu", "cpu", "TEST.result", str(tmp_path / "out")]
    assert main(["predict", str(tmp_path / "a.png"), "--model", "hub:me/streets", *words]) == 0
    assert list((tmp_path / "out").glob("a*"))
    # A second version with the same files is no new commit.
    count = len(hub.models["me/streets"]["commits"])
    assert main(["push", str(model), "me/streets"]) == 0
    assert len(hub.models["me/streets"]["commits"]) <= count + 1


def test_versions_by_name_and_commit(hub, model):
    push(model, "me/streets")
    first = hub.models["me/streets"]["refs"]["main"]
    hub.models["me/streets"]["refs"]["v1"] = first
    bias = CheckpointFolder(model).files("best.pth")[1]
    weights = torch.load(bias, weights_only=True)
    weights["conv_last.bias"] += 1e3 * torch.tensor([0.0, 0.0, 1.0])
    torch.save(weights, bias)
    push(model, "me/streets")
    newest = Segmenter.from_pretrained("hub:me/streets", device="cpu")(IMAGE)
    assert set(np.unique(newest.labels)) == {2}
    for revision in ("v1", first):
        older = Segmenter.from_pretrained(f"hub:me/streets@{revision}", device="cpu")(IMAGE)
        assert set(np.unique(older.labels)) != {2}
    message = refused(lambda: hub_names.fetch("hub:me/streets@v9"))
    assert "me/streets has no branch, tag or commit v9" in message


def test_the_cache_works_without_a_connection(hub, model, monkeypatch):
    push(model, "me/streets")
    folder = hub_names.fetch("hub:me/streets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert hub_names.fetch("hub:me/streets") == folder
    message = refused(lambda: hub_names.fetch("hub:me/others"))
    assert "not in the cache, and HF_HUB_OFFLINE is set" in message
    assert not hub.requests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.faults.append(["GET", "/api/", 503, 99])
    assert hub_names.fetch("hub:me/streets") == folder


def test_errors_are_one_line(hub, model, monkeypatch):
    push(model, "me/hidden", private=True)
    assert "127.0.0.1" in (message := refused(lambda: hub_names.fetch("hub:me/nothing")))
    assert "check the name; for a private model set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "set HF_TOKEN" in refused(lambda: hub_names.fetch("hub:me/hidden"))
    assert "a token that may write" in refused(lambda: push(model, "me/new"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.append(["GET", "/api/", 500, 99])
    message = refused(lambda: hub_names.fetch("hub:me/hidden"))
    assert "not in the cache" in message and "HTTP status 500" in message


def test_another_library_s_model_is_named(hub):
    hub.models["them/segformer"] = {"private": False, "refs": {}, "commits": {}}
    hub.commit("them/segformer", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(FileNotFoundError, match="for one of transformers give hf:them/segformer"):
        Segmenter.from_pretrained("hub:them/segformer", device="cpu")


@pytest.mark.parametrize(
    "fault",
    [
        ["GET", "/api/models", 503, 2],
        ["GET", "encoder_best.safetensors", 503, 1],
        ["GET", "encoder_best.safetensors", "cut", 1],
        ["HEAD", "config.yaml", 502, 1],
    ],
    ids=lambda fault: f"{fault[0]}-{fault[2]}",
)
def test_temporary_failures_are_tried_again(hub, model, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # also of the library
    push(model, "me/streets")
    hub.faults.append(fault)
    folder = CheckpointFolder(hub_names.fetch("hub:me/streets"))
    assert not hub.faults[0][3] or fault[0] == "HEAD"
    for mine, theirs in zip(
        folder.files("best.safetensors"), CheckpointFolder(model).files("best.pth")
    ):
        expected = torch.load(theirs, weights_only=True)
        found = load_checked(mine)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in found)


@pytest.mark.parametrize("part", ["/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_an_upload_is_tried_again(hub, model, part, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.append(["PUT" if part == "/lfs/" else "POST", part, 503, 1])
    push(model, "me/streets")
    assert not hub.faults[0][3]
    assert (
        "config.yaml"
        in hub.models["me/streets"]["commits"][hub.models["me/streets"]["refs"]["main"]]
    )


def test_damage_in_the_cache_is_found(hub, model):
    push(model, "me/streets")
    file = hub_names.fetch("hub:me/streets") / "decoder_best.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.resolve().write_bytes(data)
    with pytest.raises(ValueError, match=r"decoder_best\.safetensors is damaged"):
        Segmenter.from_pretrained("hub:me/streets", device="cpu")


def test_a_model_of_others_names_no_code_to_run(hub, model):
    from mit_semseg.engine.pretrained import locate

    file = model / "config.yaml"
    file.write_text(re.sub("transform: .*", "transform: os:system", file.read_text()))
    assert "os:system" in file.read_text()
    push(model, "me/streets")
    assert locate("hub:me/streets")[0].DATASET.transform == ""


def test_the_card(model, tmp_path):
    evaluate(model)
    out = prepare(model, tmp_path / "shared", "me/streets", license="cc-by-4.0")
    text = (out / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["pipeline_tag"] == "image-segmentation"
    (index,) = metadata["model-index"]
    metrics = {m["type"]: m["value"] for m in index["results"][0]["metrics"]}
    assert metrics == {"mean_iou": 0.6543, "pixel_accuracy": 0.875}
    for line in (
        "| mean IoU | 0.6543 |",
        "| 0 | road | #",
        "| 1 | sky\\|dusk | #",
        "![IoU of each class](class_iou.png)",
        "![a](pictures/a.png)",
        "On 7 validation images",
        "and flipped images",
        'from_pretrained("hub:me/streets")',
        "root_dataset: photos",
    ):
        assert line in body, line
    rows = [line for line in body.splitlines() if re.match(r"\| (\d+|\||---)", line)]
    assert {line.replace("\\|", "").count("|") for line in rows[-3:]} == {5}
    assert [line.rsplit("|", 2)[1] for line in rows[-3:]] == [" 0.5000 ", " – ", " 0.2500 "]
    assert "| # |\n|---|---|---|---|\n| 0 |" in body.replace("| | class | colour | IoU |", "| # |")
    assert not re.search(r"\n\n\n\n|None|undefined", text)
    for name in re.findall(r"\]\((\S+\.png)\)", body):
        assert (out / name).is_file()


def test_a_card_without_an_evaluation_of_this_checkpoint(model, tmp_path):
    evaluate(model, checkpoint="epoch_1.pth")
    text = (prepare(model, tmp_path / "shared", "me/streets") / "README.md").read_text()
    assert "No evaluation was uploaded" in text and "0.6543" not in text
    assert "has not stated a licence" in text
    assert "license" not in yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("name", ["streets", "a/b/c", "hub:", "me/..", "me/a b", "/me/a", "../a"])
def test_names(name):
    with pytest.raises(ValueError, match="give USER/NAME"):
        HubName.of(name)
    assert HubName.of("hub:me/a.b-c_1@v1.0") == HubName("me/a.b-c_1", "v1.0")


def test_a_segmenter_without_a_checkpoint_is_refused(model):
    segmenter = Segmenter.from_checkpoint(model, device="cpu")
    segmenter.checkpoint = None
    with pytest.raises(ValueError, match="make the Segmenter by from_checkpoint"):
        segmenter.push_to_hub("me/streets")


@pytest.mark.parametrize("call", ["fetch", "push", "prepare"])
def test_without_the_package_the_extra_is_named(model, tmp_path, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    calls = {
        "fetch": lambda: hub_names.fetch("hub:me/streets"),
        "push": lambda: push(model, "me/streets"),
        "prepare": lambda: prepare(model, tmp_path / "out", "me/streets"),
    }
    with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'mit_semseg\[hub\]'"):
        calls[call]()
    assert not (tmp_path / "out").exists()
