"""Checkpoint folders: no half file, no silent mismatch, messages that list what is there."""

import errno
import fcntl
import os
import pickle
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, exit_codes

from mit_semseg.dataset import ClassTable
from mit_semseg.engine.checkpoint import (
    CheckpointFolder,
    atomic_save,
    load_model,
    make_writable,
    resolve_checkpoint,
)
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.run_lock import HOLDER, RunLock

NAMES = ("wall", "floor", "tree", "sky")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_model):
    """A configuration whose folder has `best.pth`, and that checkpoint's tensors."""
    cfg = make_model(tmp_path_factory.mktemp("model"), NAMES)
    files = CheckpointFolder(cfg.DIR).files("best.pth")
    return cfg, [torch.load(file, weights_only=True) for file in files]


@pytest.fixture
def elsewhere(trained, tmp_path):
    """The same model, its folder empty."""
    cfg, halves = trained
    cfg = cfg.clone()
    cfg.DIR = str(tmp_path)
    return cfg, halves


def touch(folder, *names):
    for name in names:
        (folder / name).touch()
    return RunFolder(folder)


def pairs(folder, *names):
    return touch(folder, *(f"{half}_{name}" for half in ("encoder", "decoder") for name in names))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------ writing
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    file, other = tmp_path / "new" / "weights.pth", tmp_path / "new" / "other.pth"
    atomic_save({file: {"a": torch.arange(3)}})
    assert torch.load(file, weights_only=True)["a"].tolist() == [0, 1, 2]
    assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444, "others may read it"
    before = file.read_bytes()
    # Pickling fails after the tensor before it has been written.
    with pytest.raises((AttributeError, pickle.PicklingError)):
        atomic_save({file: {"a": torch.zeros(1000)}, other: {"b": lambda: None}})

    def half(obj, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        atomic_save({file: {}})
    assert file.read_bytes() == before and names_in(file.parent) == {"weights.pth"}


def test_a_full_disk_leaves_the_earlier_files(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save_state(1, {"step": 1})
    # /dev/full is a disk without room: what goes through the file's buffer fails there.
    real = os.fdopen

    def full(handle, mode):
        return real(os.open("/dev/full", os.O_WRONLY), mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        with pytest.raises(OSError, match=r"No space left on device.*state_step_2\.pth"):
            folder.save_state(2, {"step": 2, "weights": torch.zeros(1 << 20)})
    assert names_in(tmp_path) == {"state_step_1.pth"}
    assert folder.newest_state() == (tmp_path / "state_step_1.pth", {"step": 1})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    make_writable(tmp_path / "a" / "b", "DIR")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "c").write_text("a file")
    with pytest.raises(OSError, match=r"DIR .*c/d cannot be written to \(.*\): use another folder"):
        RunLock(tmp_path / "c" / "d").acquire()
    with pytest.raises(OSError, match=r"--out /proc/self/results cannot be written to"):
        make_writable("/proc/self/results", "--out")


# ------------------------------------------------------------------------------ names
def test_only_complete_checkpoints_are_listed_in_order(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.latest_epoch() == 0
    pairs(tmp_path, "best.pth")
    assert folder.latest_epoch() == 0
    pairs(tmp_path, "epoch_10.pth", "epoch_2.pth")
    touch(
        tmp_path,
        "encoder_epoch_11.pth",  # the run was killed before its decoder was written
        "decoder_epoch_12.pth",
        ".encoder_epoch_13.pth.x1",  # a killed save
        ".decoder_epoch_13.pth.x2",
        "history_epoch_10.pth",
        "config.yaml",
    )
    assert folder.names() == ["epoch_2.pth", "epoch_10.pth", "best.pth"]
    assert folder.latest_epoch() == 10
    halves = [tmp_path / f"{half}_epoch_2.pth" for half in ("encoder", "decoder")]
    assert list(folder.files("epoch_2.pth")) == halves
    assert folder.best_or_latest() == "best.pth"
    (tmp_path / "decoder_best.pth").unlink()
    assert folder.best_or_latest() == "epoch_10.pth"


def test_a_missing_checkpoint_is_answered_with_those_there_are(tmp_path):
    folder = pairs(tmp_path, "epoch_2.pth", "best.pth")
    touch(tmp_path, "encoder_epoch_3.pth")
    with pytest.raises(FileNotFoundError) as error:
        folder.files("epoch_20.pth")
    wanted = tmp_path / "encoder_epoch_20.pth"
    assert str(error.value) == f"{wanted} does not exist; {tmp_path} has epoch_2.pth, best.pth"
    (tmp_path / "new" / "earlier_1").mkdir(parents=True)
    pairs(tmp_path / "new" / "earlier_1", "best.pth")
    with pytest.raises(FileNotFoundError, match=r"that of an earlier run is in .*earlier_1"):
        CheckpointFolder(tmp_path / "new").files("best.pth")
    with pytest.raises(FileNotFoundError, match=r"decoder_epoch_3\.pth does not exist"):
        folder.files("epoch_3.pth")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml does not exist.*not a checkpoint"):
        folder.config()


@pytest.mark.parametrize("ask", ["files", "best_or_latest"])
def test_a_folder_without_checkpoints_is_answered_with_what_it_holds(tmp_path, ask):
    def message(folder):
        with pytest.raises(FileNotFoundError) as error:
            folder.files("best.pth") if ask == "files" else folder.best_or_latest()
        assert "\n" not in str(error.value)
        fix = "train first, or copy encoder_best.pth and"
        assert (fix in str(error.value)) == (ask == "files")
        return str(error.value)

    assert "no file" in message(CheckpointFolder(tmp_path))
    assert "does not exist" in message(CheckpointFolder(tmp_path / "none"))
    folder = touch(tmp_path, "notes.txt", "encoder_epoch_1.pth")
    assert "encoder_epoch_1.pth, notes.txt" in message(folder)
    touch(tmp_path, *(f"z{k:02}" for k in range(20)))
    assert "z05 ..." in message(folder) and "z06" not in message(folder)  # long lists are cut


@pytest.mark.parametrize(
    ("checkpoint", "folder", "name"),
    [
        ("best.pth", "mine", "best.pth"),
        ("other/epoch_3.pth", "other", "epoch_3.pth"),
        ("/far/away/best.pth", "/far/away", "best.pth"),
        ("./best.pth", ".", "best.pth"),
    ],
)
def test_resolve_checkpoint(checkpoint, folder, name):
    found, found_name = resolve_checkpoint("mine", checkpoint)
    assert (found.path, found_name) == (Path(folder), name)


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [1, 2, 10]), (1, [10]), (2, [2, 10]), (9, [1, 2, 10])]
)
def test_old_epochs_are_removed_with_their_history(tmp_path, keep, left):
    folder = pairs(tmp_path, "epoch_1.pth", "epoch_2.pth", "epoch_10.pth", "best.pth")
    touch(tmp_path, "history_epoch_1.pth", "history_epoch_2.pth", "history_epoch_10.pth")
    folder.drop_epochs(keep)
    assert folder.names() == [*(f"epoch_{n}.pth" for n in left), "best.pth"]
    assert {p.name for p in tmp_path.glob("history*")} == {f"history_epoch_{n}.pth" for n in left}


# ------------------------------------------------------------------------------ states
def test_the_newest_two_states_are_kept(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.newest_state() is None
    for step in (9, 10, 200):
        folder.save_state(step, {"step": torch.tensor(step)})
    assert [file.name for file in folder.states()] == ["state_step_200.pth", "state_step_10.pth"]
    found = folder.newest_state()
    assert found == (tmp_path / "state_step_200.pth", {"step": torch.tensor(200)})
    folder.save_history(2, {"train": {"loss": [0.5, 0.25]}})
    assert folder.load_history(2) == {"train": {"loss": [0.5, 0.25]}}
    assert folder.load_history(3) == {}


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "cut short":
        del content[-len(content) // 3 :]
    elif how == "emptied":
        content.clear()
    else:  # one bit, in the middle of the weights
        at = content.index(torch.arange(1000.0).numpy().tobytes()[2000:2040])
        content[at] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut short", "emptied", "one bit flipped"])
def test_a_damaged_state_is_named_and_the_one_before_taken(tmp_path, how, caplog):
    folder = RunFolder(tmp_path)
    for step in (5, 7):
        folder.save_state(step, {"step": step, "weights": torch.arange(1000.0)})
    damage(tmp_path / "state_step_7.pth", how)
    assert folder.newest_state()[1]["step"] == 5
    assert "state_step_7.pth" in caplog.text and "damaged" in caplog.text
    left = {"state_step_5.pth", "state_step_7.pth.damaged"}
    assert names_in(tmp_path) == left, "nothing is thrown away"
    damage(tmp_path / "state_step_5.pth", how)
    with pytest.raises(ValueError, match=r"all 1 states in .* are damaged.*start_epoch"):
        folder.newest_state()


def test_a_state_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save_state(1, {"step": 1})

    def no_memory(*args, **options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(ValueError, match=r"state_step_1\.pth cannot be read"):
        folder.newest_state()
    assert [file.name for file in folder.states()] == ["state_step_1.pth"]


# ------------------------------------------------------------------------------ locks
def acquire(rank, folder, output):
    try:
        RunLock(folder).acquire()
    except ValueError as error:
        output.write_text(str(error))
        sys.exit(2)


def test_one_run_at_a_time_uses_a_folder(tmp_path):
    lock, output = RunLock(tmp_path / "model"), tmp_path / "said"
    leftover = tmp_path / "model" / ".state_step_7.pth.abc123"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half of a state")
    lock.acquire()
    RunFolder(lock.folder).remove_unfinished()
    assert not leftover.exists(), "what a killed run was writing is of no use"
    assert exit_codes(acquire, 1, lock.folder, output) == [2]
    assert f"model is in use by process {os.getpid()} on " in output.read_text()
    with pytest.raises(ValueError, match="in use by another run of this process"):
        RunLock(lock.folder).acquire()
    lock.release()
    assert exit_codes(acquire, 1, lock.folder, output) == [0]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def no_locks(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert os.strerror(number) in caplog.text
    assert not (tmp_path / HOLDER).exists()


def test_the_lock_of_a_killed_run_is_free_though_its_workers_live(tmp_path):
    run = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from mit_semseg.engine.training.run_lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire()\n"
        "worker = os.fork()\n"
        "if not worker: os.close(1); time.sleep(60)\n"
        "print(worker, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", run, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    try:
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


# ------------------------------------------------------------------------------ models
def predictions(cfg, checkpoint="best.pth"):
    image = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load_model(cfg, checkpoint).logits(image)


def test_a_checkpoint_folder_holds_configuration_and_classes(trained, tmp_path):
    cfg, _ = trained
    folder = CheckpointFolder(cfg.DIR)
    assert folder.config() == cfg
    assert folder.classes().names == NAMES
    assert (folder.classes().colors == ClassTable.of(NAMES).colors).all()
    # Without classes.csv the configuration's data set names them.
    moved = CheckpointFolder(tmp_path)
    moved.prepare(cfg, ClassTable.of(NAMES))
    (tmp_path / "classes.csv").unlink()
    assert len(moved.classes()) == len(NAMES)
    assert str(tmp_path) == moved.config().DIR


def test_a_model_comes_back_as_it_was_saved(trained, monkeypatch):
    cfg, halves = trained[0].clone(), trained[1]
    cfg.MODEL.weights_encoder = ""  # as published: ImageNet weights, from the network
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", cfg.DIR)
    model = load_model(cfg, "best.pth")
    assert not model.training
    assert cfg.MODEL.weights_encoder == "", "the caller's configuration stays as it was"
    for module, expected in zip((model.encoder, model.decoder), halves):
        state = module.state_dict()
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(state[key], value), key


def test_files_of_the_published_training_load_from_any_folder(elsewhere, trained):
    """`module.` before each name, bookkeeping beside each BatchNorm, no batch counts."""
    cfg, halves = elsewhere

    def as_published(state):
        old = {}
        for key, value in state.items():
            if key.endswith("num_batches_tracked"):
                continue
            old[f"module.{key}"] = value
            if key.endswith("running_mean"):
                part = f"module.{key.removesuffix('running_mean')}"
                # Of another value than the statistics, to be seen if it were taken for them.
                old[f"{part}_tmp_running_mean"] = value + 7
                old[f"{part}_tmp_running_var"] = value + 7
                old[f"{part}_running_iter"] = torch.ones(1)
        return old

    published = [as_published(state) for state in halves]
    assert any("_tmp_running_mean" in key for key in published[0])
    CheckpointFolder(cfg.DIR).save("epoch_20.pth", *published)
    expected = predictions(trained[0])
    assert torch.equal(predictions(cfg, "epoch_20.pth"), expected)
    assert torch.equal(predictions(trained[0], f"{cfg.DIR}/epoch_20.pth"), expected)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            ["DATASET.num_class", 7],
            ["decoder_best.pth does not fit", "conv_last.weight", "DATASET.num_class"],
        ),
        (
            ["MODEL.arch_encoder", "resnet18dilated", "MODEL.fc_dim", 512],
            ["encoder_best.pth does not fit the encoder"],
        ),
    ],
)
def test_another_network_names_the_file_and_the_fix(trained, changes, names):
    cfg = trained[0].clone()
    cfg.merge_from_list(changes)
    with pytest.raises(ValueError) as error:
        load_model(cfg, "best.pth")
    message = str(error.value)
    assert message.startswith(f"{cfg.DIR}/{names[0]}") and "\n" not in message
    assert all(name in message for name in names)


def test_damaged_files_and_lost_tensors_are_refused_by_name(elsewhere):
    """A trained model with a random part would predict nonsense."""
    cfg, (encoder, decoder) = elsewhere
    lost = next(key for key in encoder if key.endswith("running_var"))
    folder, rest = CheckpointFolder(cfg.DIR), {k: v for k, v in encoder.items() if k != lost}
    folder.save("best.pth", rest, decoder)
    with pytest.raises(ValueError) as error:
        load_model(cfg, "best.pth")
    message = str(error.value)
    assert message.startswith(f"{cfg.DIR}/encoder_best.pth does not fit")
    assert lost in message and "MODEL.arch_encoder" in message
    folder.save("best.pth", encoder, decoder)
    file = folder.files("best.pth")[1]
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"decoder_best\.pth is damaged"):
        load_model(cfg, "best.pth")
