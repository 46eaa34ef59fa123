"""Sharded training: the results of DistributedDataParallel, with half the parameters per rank."""

import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import exit_codes, start_ranks
from small_runs import (
    CPU,
    DROPOUT,
    assert_same_weights,
    register,
    state_of,
    trainer_of,
    weights,
)

from mit_semseg.config import TrainOptions
from mit_semseg.config.node import Config
from mit_semseg.engine import processes
from mit_semseg.engine.training import fsdp
from mit_semseg.engine.training.build import TrainProcess, build
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.trainer import Trainer

OLD = ""
try:
    fsdp.check_torch()
except ValueError as error:
    OLD = str(error)
needs_fsdp = pytest.mark.skipif(bool(OLD), reason=OLD)

# Learning rates that do not depend on the number of epochs, so that a run of one epoch can be
# continued by a second one; and the memory format of sharded weights, so that sums are the same.
COMMON = {"TRAIN__lr_pow": 0.0, "TRAIN__channels_last": False}
SHARDED = {**COMMON, "TRAIN__parallel": "fsdp"}


def join(rank, folder):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    register()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


def leave():
    dist.barrier()
    dist.destroy_process_group()


def trainer(text, rank, resume=""):
    cfg = Config.load_cfg(text)
    return Trainer(build(cfg, [CPU], rank, 2, progress=False, resume=resume))


def run_each(rank, folder, runs):
    join(rank, folder)
    for text, resume in runs:
        trainer(text, rank, resume).fit()
    leave()


@pytest.fixture
def ranks(tmp_path):
    """`ranks(function, *arguments)` calls it in two ranks, with rank and folder before these."""

    def start(function, *arguments, start=start_ranks):
        result = start(function, 2, str(tmp_path), *arguments)
        (tmp_path / "meeting").unlink(missing_ok=True)
        return result

    return start


@pytest.fixture
def run(ranks):
    """`run((cfg, resume), ...)` trains in two ranks."""
    return lambda *runs: ranks(run_each, [(cfg.dump(), resume) for cfg, resume in runs])


def figures_of(cfg):
    lines = (Path(cfg.DIR) / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([x.get("loss", x.get("mean_iou")) for x in map(json.loads, lines)])


# ------------------------------------------------------------------------------ training
VARIANTS = {
    "plain": {"TRAIN__fix_bn": True},
    "parts": {
        "TRAIN__clip_grad": 0.05,
        "TRAIN__ema": 0.9,
        "TRAIN__accumulate": 2,
        "TRAIN__eval_epochs": 1,
        "TRAIN__class_weights": (1.0, 0.5, 2.0, 0.1),
        **DROPOUT,
    },
    "adamw": {
        "TRAIN__optim": "AdamW",
        "TRAIN__layer_decay": 0.5,
        "TRAIN__freeze": ("encoder.norm",),
        "TRAIN__activation_checkpointing": True,
        "TRAIN__precision": "bf16",
    },
}
if find_spec("peft") and find_spec("timm"):
    VARIANTS["adapters"] = {
        "MODEL__arch_encoder": "timm:test_vit",
        "MODEL__arch_decoder": "linear",
        "MODEL__fc_dim": 64,
        "TRAIN__lora_rank": 4,
        "TRAIN__eval_epochs": 1,
    }


@needs_fsdp
def test_sharded_training_is_that_of_ddp(settings, run):
    pairs = [
        [
            settings(f"{name}_{parallel}", **{**COMMON, **changes, "TRAIN__parallel": parallel})
            for parallel in ("fsdp", "processes")
        ]
        for name, changes in VARIANTS.items()
    ]
    run(*[(cfg, "") for pair in pairs for cfg in pair])
    for sharded, replicated in pairs:
        assert len(figures_of(sharded)) >= 4
        torch.testing.assert_close(figures_of(sharded), figures_of(replicated))
        for checkpoint in RunFolder(replicated.DIR).names():
            torch.testing.assert_close(
                weights(sharded, checkpoint), weights(replicated, checkpoint)
            )


def measure(rank, folder, text):
    join(rank, folder)
    step = trainer(text, rank).parts.step
    kinds = (step.module, step.average.module)
    sizes = [
        [sum(size(x).nbytes for x in kind.parameters()) for kind in kinds]
        for size in (fsdp.local, lambda x: x)
    ]
    torch.save(sizes, f"{folder}/{rank}.pt")
    leave()


@needs_fsdp
def test_each_of_two_ranks_holds_half(settings, ranks, tmp_path):
    ranks(measure, settings(**SHARDED, TRAIN__ema=0.9).dump())
    for rank in range(2):
        local, whole = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert local == [size // 2 for size in whole] and whole[0] > 10_000


def spoil(rank, folder, text):
    join(rank, folder)
    one = trainer(text, rank)
    with torch.no_grad():
        next(iter(one.parts.step.module.parameters())).to_local().fill_(1 + rank * float("nan"))
    with pytest.raises(FloatingPointError, match="non-finite weights"):
        one._save_state()
    leave()


@needs_fsdp
def test_a_share_that_is_not_finite_stops_all_ranks(settings, ranks, tmp_path):
    ranks(spoil, settings(**SHARDED).dump())
    assert not list((tmp_path / "model").glob("state*"))


# ------------------------------------------------------------------------------ states
EXACT = {"TRAIN__ema": 0.9, "TRAIN__optim": "AdamW", **DROPOUT}


def run_killed(rank, folder, text):
    """Rank 0 is killed after the shards of step 4, before the file that makes a state of them."""
    join(rank, folder)
    save = RunFolder.save_state
    RunFolder.save_state = lambda *args: os._exit(9) if args[1] == 4 else save(*args)
    trainer(text, rank).fit()


@needs_fsdp
def test_states(settings, run, ranks):
    """In one test, as starting ranks takes seconds."""
    whole = settings("whole", **SHARDED, **EXACT)
    half = settings("half", **SHARDED, **EXACT, TRAIN__num_epoch=1)
    replicated = settings("replicated", **COMMON, **EXACT, TRAIN__num_epoch=1)
    run((whole, ""), (half, ""), (replicated, ""))
    first, second = (Path(half.DIR) / f"state_step_2.{kind}" for kind in ("pth", "shards"))
    assert {x.name for x in second.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert RunFolder(half.DIR).states() == [first]

    # On one rank it is the state of replicas.
    one = trainer_of(settings("one", **COMMON, **EXACT), resume=half.DIR)
    one.resume()
    expected, found = state_of(replicated), one.parts.state.state_dict()
    for part in ("encoder", "decoder", "average", "optimizer", "losses", "step"):
        torch.testing.assert_close(found[part], expected[part])
    assert one.fit()["step"] == 4

    cut = settings("cut", **SHARDED, **EXACT)
    assert ranks(run_killed, cut.dump(), start=exit_codes)[0] == 9
    unfinished = Path(cut.DIR) / "state_step_4.shards"
    assert {x.name for x in unfinished.iterdir()} == {x.name for x in second.iterdir()}
    (unfinished / "of_the_killed_run").touch()

    half.TRAIN.num_epoch = 2
    to_replicas = settings("to_replicas", **COMMON, **EXACT)
    from_replicas = settings("from_replicas", **SHARDED, **EXACT)
    others = ((to_replicas, str(first)), (from_replicas, replicated.DIR))
    run(*others, (half, "auto"), (cut, "auto"))
    for cfg in (half, cut):
        assert_same_weights(cfg, whole, "epoch_2.pth")
        assert torch.equal(figures_of(cfg), figures_of(whole))
    for cfg, _ in others:
        torch.testing.assert_close(weights(cfg, "epoch_2.pth"), weights(whole, "epoch_2.pth"))
    assert not (unfinished / "of_the_killed_run").exists()

    # A damaged one is not loaded, and nothing in it is executed.
    folder = RunFolder(whole.DIR)
    shard = folder.shards(4) / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert folder.newest_state(rename_damaged=False)[0].name == "state_step_2.pth"
    (folder.shards(4) / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match=r"state_step_4.pth cannot be read.*getcwd"):
        fsdp.check_shards(folder.path / "state_step_4.pth", {})


# ------------------------------------------------------------------------------ one rank
def run_alone(rank, folder, texts, device, backend):
    """Trains on one rank, sharded by force, and as usual."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # one thread
    register()
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    devices = [torch.device(device)]
    for text, is_sharded in zip(texts, (True, False)):
        TrainProcess.is_sharded = lambda self, train, value=is_sharded: value
        Trainer(build(Config.load_cfg(text), devices, progress=False)).fit()
    dist.destroy_process_group()


@needs_fsdp
@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "gloo"), pytest.param("cuda:0", "nccl", marks=pytest.mark.gpu)],
)
def test_a_single_rank_sharded_by_force(settings, tmp_path, device, backend):
    changes = {**COMMON, **VARIANTS["parts"]}
    runs = [settings(name, **changes) for name in ("sharded", "usual")]
    start_ranks(run_alone, 1, str(tmp_path), [cfg.dump() for cfg in runs], device, backend)
    torch.testing.assert_close(figures_of(runs[0]), figures_of(runs[1]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*(weights(cfg, "epoch_2.pth") for cfg in runs), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compile": True}, "TRAIN.compile True: set TRAIN.compile False, or TRAIN.parallel"),
        ({"precision": "fp16"}, "TRAIN.precision fp16: set TRAIN.precision bf16, or"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    with pytest.raises(ValueError, match=f"TRAIN.parallel fsdp does not work with {said}"):
        TrainOptions(parallel="fsdp", **changes)


def test_an_old_torch_is_refused(monkeypatch):
    for version, old in (("2.10.0+cu128", True), ("2.11.0", False), ("2.14.1+cpu", False)):
        monkeypatch.setattr(torch, "__version__", version)
        if old:
            with pytest.raises(ValueError, match=r"needs torch 2.11 or newer and this is 2\.10\.0"):
                fsdp.check_torch()
        else:
            fsdp.check_torch()


def test_a_command_starts_a_rank_per_device(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert processes.wanted("fsdp", [CPU, CPU]) and not processes.wanted("fsdp", [CPU])
