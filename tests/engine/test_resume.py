"""Resuming: bit by bit where nothing changed, and with a word about what did."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT
from small_runs import (
    CPU,
    DROPOUT,
    assert_same_weights,
    signal_after,
    state_of,
    trainer_of,
    weights,
)

from mit_semseg.cli import main
from mit_semseg.config import dump_config
from mit_semseg.engine.train import train
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.optim import parameter_groups


def figures_of(cfg):
    return [json.loads(x) for x in (Path(cfg.DIR) / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------ bit by bit
@pytest.mark.parametrize(
    ("number", "steps", "accumulate", "ema"),
    # In the first step, before the end of an epoch, and at the end of the last one.
    [(signal.SIGTERM, 0, 2, 0.0), (signal.SIGINT, 2, 1, 0.9), (signal.SIGTERM, 3, 1, 0.9)],
)
def test_a_signalled_run_resumes_exactly(settings, monkeypatch, number, steps, accumulate, ema):
    common = {"TRAIN__accumulate": accumulate, "TRAIN__ema": ema, "TRAIN__eval_epochs": 1}
    whole, cut = (settings(name, **DROPOUT, **common) for name in ("whole", "cut"))
    train(whole, [CPU], progress=False)
    with monkeypatch.context() as patch:
        signal_after(steps, number, patch)
        result = train(cut, [CPU], progress=False)
    assert (result["stopped"], result["step"], result["steps"]) == (number.name, steps + 1, 4)
    assert state_of(cut)["step"] == steps + 1
    assert train(cut, [CPU], resume="auto", progress=False)["stopped"] == ""
    for checkpoint in ("epoch_2.pth", "best.pth"):
        assert_same_weights(whole, cut, checkpoint)
    expected, found = (
        [(x["kind"], x.get("step"), x.get("loss"), x.get("mean_iou")) for x in figures_of(cfg)]
        for cfg in (whole, cut)
    )
    assert found == expected and len(found) == 6


def test_a_stopped_command_prints_how_to_resume(settings, monkeypatch, capfd, tmp_path):
    cfg = settings()
    file = tmp_path / "job.yaml"
    dump_config(cfg, file)
    words = ["train", "--gpus", "cpu", "--cfg", str(file)]
    monkeypatch.setattr(sys, "argv", ["bin/mit-semseg", *words])
    signal_after(2, signal.SIGINT, monkeypatch)
    assert main(words) == 0
    output = capfd.readouterr()
    assert "Stopped by SIGINT after step 3 of 4" in output.out and "Traceback" not in output.err
    assert f"\n  mit-semseg train --resume auto --gpus cpu --cfg {file}\n" in output.out
    assert main([*words, "--resume", "auto"]) == 0
    output = capfd.readouterr()
    assert f"resuming from {cfg.DIR}/state_step_3.pth" in output.out
    assert "Training done: " in output.out


def test_a_state_holds_the_loss_scaling(settings, monkeypatch):
    """fp16 needs a GPU; what is saved of its scaling does not."""
    trainers = [trainer_of(settings(), resume=resume) for resume in ("", "auto")]
    for one in trainers:
        one.parts.step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        one.parts.state.register("scaler", one.parts.step.scaler)
    cut, resumed = trainers
    signal_after(2, signal.SIGTERM, monkeypatch)
    cut.fit()
    resumed.resume()
    assert resumed.progress.step == 3
    scalers = [one.parts.step.scaler for one in trainers]
    assert scalers[0].get_scale() == 2048.0, "it has grown after two of the three steps"
    assert scalers[1].state_dict() == scalers[0].state_dict()
    assert scalers[1].state_dict()["_growth_tracker"] == 1


def test_states_are_written_by_time_and_described(settings):
    cfg = settings(TRAIN__epoch_iters=4, TRAIN__num_epoch=1, TRAIN__checkpoint_minutes=1e-9)
    train(cfg, [CPU], progress=False)
    names = [file.name for file in RunFolder(cfg.DIR).states()]
    assert names == ["state_step_4.pth", "state_step_3.pth"]
    state = state_of(cfg)
    expected = {"encoder", "decoder", "optimizer", "scaler", "random", "position", "history"}
    assert expected | {"step", "best", "config", "max_iters"} <= state.keys()
    described = (ROOT / "docs" / "design_notes.md").read_text(encoding="utf-8")
    assert [key for key in state if f"`{key}`" not in described] == []
    assert set(state["random"][0]) == {"torch", "cuda", "numpy", "python"}


def test_a_state_with_two_optimizers_resumes_exactly(settings, tmp_path):
    """As states were written before encoder and decoder shared one."""
    whole = settings("whole", **DROPOUT, TRAIN__lr_decoder=0.005)
    train(whole, [CPU], progress=False)
    file = f"{whole.DIR}/state_step_2.pth"
    state = torch.load(file, weights_only=True)
    trainer = trainer_of(settings("other", **DROPOUT), resume=file)
    trainer.resume()
    state["optimizers"] = []
    step = trainer.parts.step
    for half in (step.module.encoder, step.module.decoder):
        of_half = torch.optim.SGD(parameter_groups(half, 1e-4), lr=0.02, momentum=0.9)
        of_half.state.update({p: step.optimizer.state[p] for p in half.parameters()})
        state["optimizers"].append(of_half.state_dict())
    del state["optimizer"], state["skipped"]
    torch.save(state, tmp_path / "old.pth")
    resumed = settings(**DROPOUT, TRAIN__lr_decoder=0.005)
    train(resumed, [CPU], resume=str(tmp_path / "old.pth"), progress=False)
    assert_same_weights(whole, resumed, "epoch_2.pth")


# ------------------------------------------------------------------------------ where from
def test_resume_takes_a_file_or_a_folder(settings, tmp_path):
    source = settings("source", **DROPOUT, TRAIN__num_epoch=3)
    train(source, [CPU], progress=False)
    for name, resume in (("file", f"{source.DIR}/state_step_4.pth"), ("folder", source.DIR)):
        cfg = settings(name, **DROPOUT, TRAIN__num_epoch=3)
        result = train(cfg, [CPU], resume=resume, progress=False)
        assert_same_weights(source, cfg, "epoch_3.pth")
        assert len(result["history"]["train"]["loss"]) == 3
    for resume in ("nowhere", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"--resume .*state_step_N\.pth"):
            train(settings("other"), [CPU], resume=resume, progress=False)
    assert train(settings("new"), [CPU], resume="auto", progress=False)["step"] == 4


def test_without_a_state_weights_start_momentum_and_average(settings, caplog):
    cfg = settings(TRAIN__num_epoch=1)
    train(cfg, [CPU], progress=False)
    (Path(cfg.DIR) / "state_step_2.pth").unlink()
    trainer = trainer_of(settings(TRAIN__start_epoch=1, TRAIN__ema=0.9))
    trainer.resume()
    assert "the optimizer state is reset" in caplog.text and trainer.progress.step == 2
    step = trainer.parts.step
    for averaged, own in zip(step.evaluated.parameters(), step.module.parameters()):
        assert averaged is not own and torch.equal(averaged, own)


def test_a_half_written_last_line_is_dropped(settings):
    cfg = settings(TRAIN__num_epoch=1)
    train(cfg, [CPU], progress=False)
    with (Path(cfg.DIR) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    result = train(settings(), [CPU], resume=True, progress=False)
    assert len(result["history"]["train"]["loss"]) == 2
    assert [one["epoch"] for one in figures_of(cfg)] == [1, 1, 2, 2]


def test_initial_weights_are_not_needed(settings, tmp_path):
    train(settings(TRAIN__num_epoch=1), [CPU], progress=False)
    source = tmp_path / "backbone.pth"
    shutil.copyfile(Path(settings().DIR) / "encoder_epoch_1.pth", source)
    begun = settings(TRAIN__num_epoch=1, MODEL__weights_encoder=str(source))
    train(begun, [CPU], progress=False)
    source.unlink()
    more = settings(MODEL__weights_encoder=str(source))
    assert train(more, [CPU], resume="auto", progress=False)["step"] == 4
    with pytest.raises(FileNotFoundError, match=r"backbone\.pth"):
        train(more, [CPU], progress=False)


def test_a_restarted_job_resumes_its_own_state(settings, monkeypatch):
    cfg, start = settings(), settings("start", TRAIN__num_epoch=1)
    train(start, [CPU], progress=False)
    first = f"{start.DIR}/state_step_2.pth"
    with monkeypatch.context() as patch:
        signal_after(2, signal.SIGTERM, patch)
        train(cfg, [CPU], resume=first, job="job 7", progress=False)
    assert state_of(cfg)["step"] == 3
    # Restarted with the same command it is not thrown back to where the command says.
    trainer = trainer_of(cfg, resume=first, job="job 7")
    trainer.resume()
    assert trainer.progress.step == 3
    trainer.fit()
    other = trainer_of(cfg, job="job 7")  # completed: a new one starts anew
    other.resume()
    assert other.progress.step == 0 and (Path(cfg.DIR) / "earlier_1").is_dir()


# ------------------------------------------------------------------------------ earlier runs
def test_an_earlier_run_is_set_aside(settings):
    cfg = settings()
    train(cfg, [CPU], progress=False)
    before = weights(cfg, "epoch_2.pth")
    (Path(cfg.DIR) / "result_eval").mkdir()
    train(settings(TRAIN__num_epoch=1), [CPU], progress=False)
    assert RunFolder(cfg.DIR).names() == ["epoch_1.pth"]
    aside = RunFolder(f"{cfg.DIR}/earlier_1")
    assert aside.names() == ["epoch_1.pth", "epoch_2.pth"] and aside.config().TRAIN.num_epoch == 2
    assert all(
        torch.equal(value, before[key])
        for key, value in weights(settings("model/earlier_1"), "epoch_2.pth").items()
    )
    # What an evaluation of it found is none of the new run's.
    assert (aside.path / "result_eval").is_dir() and not (Path(cfg.DIR) / "result_eval").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("end", ["", "not JSON\n{}\n"])
def test_metrics_of_a_run_killed_before_its_first_state_are_not_continued(settings, resume, end):
    cfg = settings()
    file = Path(cfg.DIR) / "metrics.jsonl"
    file.parent.mkdir()
    line = {"kind": "train", "epoch": 1, "step": 1, "loss": 9.0, "accuracy": 0.0}
    file.write_text(json.dumps(line) + "\n" + end)
    train(cfg, [CPU], resume=resume, progress=False)
    assert [x["step"] for x in figures_of(cfg)] == [1, 2, 3, 4]
    assert (file.parent / "earlier_1" / "metrics.jsonl").is_file() == (not resume)


def test_start_epoch_sets_newer_checkpoints_aside(settings):
    cfg = settings(TRAIN__num_epoch=4, TRAIN__eval_epochs=1)
    scores = train(cfg, [CPU], progress=False)["history"]["val"]["mean_iou"]
    folder, aside = RunFolder(cfg.DIR), RunFolder(f"{cfg.DIR}/earlier_1")
    before = weights(cfg, "epoch_4.pth")
    options = {"TRAIN__num_epoch": 4, "TRAIN__eval_epochs": 1}
    trainer_of(settings(**options, TRAIN__start_epoch=2)).resume()
    assert folder.names() == ["epoch_1.pth", "epoch_2.pth", "best.pth"]
    left = weights(settings("model/earlier_1"), "epoch_4.pth")
    assert all(torch.equal(value, before[key]) for key, value in left.items())
    assert (aside.path / "metrics.jsonl").is_file()
    # The best weights are again those of the epochs that are left.
    best = 1 + scores.index(max(scores[:2]))
    assert_same_weights(cfg, cfg, f"epoch_{best}.pth")
    old, new = weights(cfg, "best.pth"), weights(cfg, f"epoch_{best}.pth")
    assert all(torch.equal(old[key], new[key]) for key in old)
    # Told to resume, a run is not thrown back by a start_epoch of its configuration.
    result = train(settings(**options, TRAIN__start_epoch=1), [CPU], resume=True, progress=False)
    assert result["step"] == 8 and not (folder.path / "earlier_2").exists()


# ------------------------------------------------------------------------------ other settings
def test_more_devices_resume_at_the_same_position_in_the_data(settings, caplog):
    train(settings(TRAIN__epoch_iters="auto", TRAIN__num_epoch=1), [CPU], progress=False)
    # 2 steps, each a batch of 2 of the 4 images
    more = settings(TRAIN__epoch_iters="auto", TRAIN__lr_encoder=0.01, TRAIN__workers=1)
    trainer = trainer_of(more, [CPU, CPU], resume="auto")
    assert trainer.progress.epoch_iters == 1
    trainer.resume()
    assert (trainer.progress.step, trainer.progress.position) == (1, 2)
    assert "TRAIN.lr_encoder was 0.02 and is now 0.01" in caplog.text
    assert "TRAIN.workers" not in caplog.text


def test_another_epoch_length_resumes_at_the_same_position(settings, monkeypatch):
    long = settings(TRAIN__epoch_iters=8, TRAIN__checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        signal_after(6, signal.SIGTERM, patch)
        train(long, [CPU], progress=False)
    short = settings()
    for _ in range(2):  # also when it is killed before it writes a state of its own
        trainer = trainer_of(short, resume="auto")
        trainer.resume()
        # 7 of 8 steps; what is left of the epoch is 1 of 2, not none.
        assert (trainer.progress.step, trainer.progress.position) == (1, 7)
        assert [file.name for file in RunFolder(long.DIR).states()] == ["state_step_1.pth"]
    result = train(short, [CPU], resume="auto", progress=False)
    assert result["history"]["train"]["epoch"] == [1, 2]
    with pytest.raises(ValueError, match=r"at epoch 2, but TRAIN\.num_epoch is 1"):
        train(settings(TRAIN__num_epoch=1), [CPU], resume="auto")


def test_resumed_optimizers_follow_the_configuration(settings, caplog):
    train(settings(), [CPU], progress=False)
    cfg = settings(TRAIN__num_epoch=3, TRAIN__weight_decay=0.5, TRAIN__beta1=0.5)
    trainer = trainer_of(cfg, resume="auto")
    trainer.resume()
    optimizer = trainer.parts.step.optimizer
    decayed, plain = optimizer.param_groups[:2]
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["momentum"]) == (0.5, 0.0, 0.5)
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    result = train(settings(TRAIN__num_epoch=3, TRAIN__optim="AdamW"), [CPU], resume="auto")
    assert result["step"] == 6 and "its momentum is not loaded" in caplog.text
    with pytest.raises(ValueError, match=r"state_step_6\.pth does not fit this run"):
        train(settings(MODEL__arch_decoder="ppm"), [CPU], resume="auto", progress=False)
