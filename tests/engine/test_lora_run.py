"""Trainings with low-rank adapters."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import SIZES, Job
from small_runs import CPU, assert_same_weights, signal_after, state_of, trainer_of, weights

from mit_semseg.config import TrainOptions, load_config
from mit_semseg.engine.checkpoint import load_model, pack
from mit_semseg.engine.evaluate import evaluate
from mit_semseg.engine.train import train
from mit_semseg.engine.training.build import build
from mit_semseg.models.lora import merged_state

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("timm", reason="timm is not installed")
LORA = {
    "MODEL__arch_encoder": "timm:test_vit",
    "MODEL__arch_decoder": "linear",
    "MODEL__fc_dim": 64,
    "TRAIN__lora_rank": 4,
    "TRAIN__optim": "AdamW",
    "TRAIN__lr_encoder": 0.01,
    "TRAIN__lr_decoder": 0.01,
}


@pytest.mark.parametrize("devices", [1, 2])
def test_it_resumes_exactly_and_is_used_without_peft(
    devices, settings, tmp_path, monkeypatch, caplog
):
    common = {**LORA, "TRAIN__ema": 0.5, "TRAIN__eval_epochs": 1}
    common["TRAIN__activation_checkpointing"] = devices == 2
    whole, cut = (settings(name, **common) for name in ("whole", "cut"))
    initial = build(whole, [CPU] * devices).step.module.state_dict()
    before = {key: value.clone() for key, value in initial.items()}
    with caplog.at_level("INFO"):
        result = train(whole, [CPU] * devices, progress=False)
    assert "trainable parameters: 10,756 of 316,868 (3.39%)" in caplog.text
    with monkeypatch.context() as patch:
        signal_after(3, signal.SIGTERM, patch)
        train(cut, [CPU] * devices, progress=False)
    train(cut, [CPU] * devices, resume="auto", progress=False)
    assert_same_weights(whole, cut, "epoch_2.pth")
    first, second = state_of(whole), state_of(cut)
    for part in ("encoder", "decoder", "average"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())

    changed = {key for key, x in first["encoder"].items() if not x.equal(before[f"encoder.{key}"])}
    assert changed == {key for key in first["encoder"] if ".lora_" in key}

    # The files hold the averages, merged, under the names of the network itself.
    merged = weights(whole, "epoch_2.pth")
    for key, value in first["average"].items():
        if key.endswith("base_layer.weight"):
            layer = key.removesuffix("base_layer.weight")
            a, b = (first["average"][f"{layer}lora_{x}.default.weight"] for x in "AB")
            own = merged.pop(f"{layer.removeprefix('module.')}weight")
            torch.testing.assert_close(own, value + 16 / 4 * b @ a)
    assert "encoder.net.model.blocks.0.norm1.weight" in merged
    assert all("lora" not in key and "base_layer" not in key for key in merged)

    scored = evaluate(whole, [CPU], checkpoint="best.pth", progress=False)
    assert scored["mean_iou"] == result["best_mean_iou"]
    packed = pack(whole.DIR, tmp_path / "packed")
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import numpy as np; from mit_semseg import Segmenter\n"
        f"s = Segmenter.from_checkpoint({str(packed)!r}, device='cpu')\n"
        "print(s(np.zeros((48, 64, 3), np.uint8)).labels.shape)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "(48, 64)", found.stderr


def test_new_adapters_continue_from_weights_without_a_state(settings):
    cfg = settings(**LORA)
    train(cfg, [CPU], progress=False)
    for state in Path(cfg.DIR).glob("state_step_*.pth"):
        state.unlink()
    cfg.TRAIN.num_epoch, cfg.TRAIN.start_epoch = 3, 2
    trainer = trainer_of(cfg)
    trainer.resume()
    expected = load_model(cfg, "epoch_2.pth").encoder.state_dict()
    found = merged_state(trainer.parts.step.module.encoder)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert train(cfg, [CPU], progress=False)["step"] == 6


def test_ranks_train_the_adapters_as_replicas_do(tmp_path, make_images):
    job = Job(tmp_path)
    make_images(job.data, SIZES)
    changes = {**LORA, "TRAIN__optim": "SGD", "TRAIN__eval_epochs": 0}
    files = [job.config(name, **changes) for name in ("ranks", "replicas")]
    words = ("train", "--gpus", "cpu", "--threads", "1", "--cfg")
    codes, text = job.run_forked(*words, files[0], ranks=2)
    assert codes == [0, 0], text
    ranks, replicas = (load_config(file) for file in files)
    start = merged_state(build(replicas, [CPU] * 2).step.module.encoder)
    train(replicas, [CPU] * 2, progress=False)
    one, other = weights(ranks, "epoch_1.pth"), weights(replicas, "epoch_1.pth")
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)
    key = "net.model.blocks.0.attn.qkv.weight"
    assert not torch.equal(one[f"encoder.{key}"], start[key])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_targets": ("qkv",)},
            r"lora_targets is \['qkv'\] and TRAIN.lora_rank 0: set",
        ),
        ({"lora_rank": 4, "freeze": ("encoder",)}, "TRAIN.freeze would freeze its adapters"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**settings)
