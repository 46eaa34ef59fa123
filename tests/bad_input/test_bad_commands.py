"""The corpus by the command line, as a user would: one line each, and the others go on."""

import io
import json
import os
import re
import shutil
import sys
from dataclasses import replace

import corpus
import pytest
import torch
from corpus import COLOR, LABELS
from PIL import Image

from mit_semseg.cli import main


def config_of(model):
    return os.path.join(model.DIR, "config.yaml")


def write_samples(root, *faulty, good=4):
    """A list of good samples, and of one for each faulty image or mask."""
    lines = []

    def sample(name, image=None, mask=None):
        files = {}
        for key, case, pixels in (("img", image, COLOR), ("segm", mask, LABELS)):
            case = case or corpus.ok(f"{name}.png", corpus.png(pixels), pixels)
            file = root / {"img": "images", "segm": "masks"}[key] / case.name
            file.parent.mkdir(parents=True, exist_ok=True)
            case.write(file)
            files[f"fpath_{key}"] = str(file)
        lines.append(json.dumps(files))

    for k in range(good):
        sample(f"good{k}")
    for case in faulty:
        sample(f"with_{case.name}", **{"mask" if case in corpus.MASKS else "image": case})
    path = root / "list.odgt"
    path.write_text("\n".join(lines) + "\n")
    return path


def by_name(cases, *names):
    return [next(case for case in cases if case.name == name) for name in names]


BAD_IMAGES = by_name(
    corpus.IMAGES, "truncated.jpg", "empty.png", "bomb.png", "pipe.jpg", "page.jpg"
)
BAD_MASKS = by_name(corpus.MASKS, "turned.png", "colors.png", "far.png", "cut.png", "gone.png")
ALL_BAD = [*BAD_IMAGES, *BAD_MASKS]


# ------------------------------------------------------------------------------ predict
def predicting(model, images, out, *more):
    where = ["--gpu", "cpu", "--imgs", images, "TEST.result", out]
    return ["predict", "--cfg", config_of(model), *where, *more]


def test_predict_goes_on_past_bad_images(tmp_path, model, command, untouched):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    cases = [case for case in corpus.IMAGES if case.name not in ("gone.jpg", "folder.jpg")]
    for case in cases:
        case.write(folder / case.name)
    (folder / "loop").symlink_to(folder)
    with untouched(but=out):
        outcome = command(*predicting(model, folder, out, "TEST.save", "[index]"))
    assert outcome.code == 1
    report = outcome.out.partition("images failed:")[2]
    results = {path.stem: path for path in out.rglob("*.png")}
    stems = [case.name.rpartition(".")[0] for case in cases]
    for case, stem in zip(cases, stems):
        if case.good is None:
            (line,) = [x for x in report.splitlines() if f"/{case.name}: " in x]
            assert re.search(case.message, line), line
            assert stem not in results or stems.count(stem) > 1
            continue
        ending = case.name.rpartition(".")[2]
        with Image.open(results.get(stem) or results[f"{stem}_{ending}"]) as image:
            assert image.size == case.good.shape[1::-1], case.name


def test_predict_peculiar_names(tmp_path, model, command, untouched):
    """One of them is too long with an ending, which the others do not suffer from."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in corpus.NAMES.values():
        (folder / name).write_bytes(corpus.png(COLOR))
    with untouched(but=out):
        outcome = command(*predicting(model, folder, out, "TEST.save", "[color]"))
    assert outcome.code == 0, outcome.out + outcome.err
    assert sorted(os.listdir(out)) == sorted(corpus.NAMES.values())
    inside = folder / "out"  # whose pictures are no images to predict
    outcome = command(*predicting(model, folder, inside, "TEST.save", "[color,overlay]"))
    assert outcome.code == 1 and re.search("nnn.png: .*File name too long", outcome.out)
    assert len(os.listdir(inside)) == 2 * (len(corpus.NAMES) - 1)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_of_any_bytes_where_output_takes_text_alone(tmp_path, model, monkeypatch, encoding):
    """A terminal of UTF-8, or of ASCII alone: a name is no reason to stop, nor for a traceback."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (corpus.NAMES["not UTF-8"], corpus.NAMES["unicode"], os.fsdecode(b"x\xff.jpg")):
        (folder / name).write_bytes(corpus.png(COLOR))
    (folder / os.fsdecode(b"bad\xfe.jpg")).write_text("no picture")
    shown = {}
    for stream in ("stdout", "stderr"):
        shown[stream] = io.BytesIO()
        terminal = io.TextIOWrapper(shown[stream], encoding, "strict", write_through=True)
        monkeypatch.setattr(sys, stream, terminal)
    code = main([str(word) for word in predicting(model, folder, tmp_path / "out")])
    out, err = shown["stdout"].getvalue(), shown["stderr"].getvalue()
    assert code == 1 and b"Traceback" not in err, err
    assert b"1 of 4 images failed" in out and b"bad\\udcfe.jpg" in out


@pytest.mark.parametrize("name", ["truncated.jpg", "pipe.jpg", "dangling.png", "gone.jpg"])
def test_predict_one_bad_image(tmp_path, model, command, untouched, name):
    (case,) = by_name(corpus.IMAGES, name)
    path, out = tmp_path / name, tmp_path / "out"
    case.write(path)
    with untouched(but=out):
        outcome = command(*predicting(model, path, out, "TEST.save", "[index]"))
    assert outcome.code in (1, 2)
    assert str(path) in (outcome.error if outcome.code == 2 else outcome.out)
    assert not out.exists() or not any(out.iterdir())


# ------------------------------------------------------------------------------ data
def test_data_check_names_every_bad_sample(tmp_path, command, untouched):
    path = write_samples(tmp_path / "data", *ALL_BAD)
    with untouched():
        outcome = command("data", "check", path, "--num-class", 3)
    assert outcome.code == 1
    for case in ALL_BAD:
        (line,) = [x for x in outcome.out.splitlines() if f"/{case.name}: " in x]
        assert re.search(case.message, line), line


def test_make_odgt_leaves_out_what_cannot_be_read(tmp_path, command, untouched):
    write_samples(tmp_path / "data")
    for case in by_name(
        corpus.MASKS, "turned.png", "text.png", "empty.png", "folder.png", "pipe.png"
    ):
        case.write(tmp_path / "data/masks" / case.name)
        (tmp_path / "data/images" / case.name).write_bytes(corpus.png(COLOR))
    out = tmp_path / "lists"
    with untouched(but=out):
        outcome = command(
            "data", "make-odgt", "--images", tmp_path / "data/images",
            "--labels", tmp_path / "data/masks", "--out", out,
        )  # fmt: skip
    assert outcome.code == 0, outcome.err
    for output in (
        "3 training and 1 validation samples", "3 unusable pairs, left out:", "empty.png: not a",
        "2 images without mask, left out:\n  folder.png\n  pipe.png",
        "turned.png: 24x40 pixels", "text.png: not a readable",
    ):  # fmt: skip
        assert output in outcome.out


# ------------------------------------------------------------------------------ train
def training(model, listing, folder, *more):
    return [
        "train", "--cfg", config_of(model), "--gpus", "cpu", "DIR", folder,
        "DATASET.list_train", listing, "DATASET.root_dataset", listing.parent,
        "DATASET.num_class", 3, "DATASET.imgSizes", "[24]", "DATASET.padding_constant", 8,
        "TRAIN.batch_size_per_gpu", 2, "TRAIN.num_epoch", 1, "TRAIN.epoch_iters", 1,
        "TRAIN.eval_epochs", 0, *more,
    ]  # fmt: skip


def resumed(words, state):
    return [*words[:1], "--resume", state, *words[1:]]


@pytest.mark.parametrize(
    ("case", "workers"),
    [(BAD_IMAGES[0], 0), (BAD_IMAGES[0], 2), (BAD_IMAGES[3], 2), (BAD_MASKS[2], 0)],
    ids=str,
)
def test_training_stops_at_a_bad_sample(tmp_path, model, command, case, workers):
    listing = write_samples(tmp_path / "data", case)
    error = command(*training(model, listing, tmp_path / "run", "TRAIN.workers", workers)).error
    assert case.name in error and re.search(case.message, error)


def test_training_skips_bad_samples(tmp_path, model, command, untouched):
    (case,) = by_name(corpus.IMAGES, "page.jpg")
    odd = replace(case, name=os.fsdecode(b"bad\xff.jpg"))  # the log takes names of any bytes
    listing = write_samples(tmp_path / "data", *ALL_BAD, odd, good=2)
    folder = tmp_path / "run"
    more = ("DATASET.on_error", "skip", "TRAIN.workers", 2, "TRAIN.epoch_iters", 4)
    with untouched(but=folder):
        outcome = command(*training(model, listing, folder, *more))
    assert outcome.code == 0, outcome.out + outcome.err
    assert (folder / "encoder_epoch_1.pth").is_file()
    output = (folder / "log.txt").read_text()
    assert any(case.name in output for case in BAD_IMAGES) and "bad\\udcff.jpg" in output


# ------------------------------------------------------------------------------ eval
def evaluating(model, listing, out, *more):
    return [
        "eval", "--cfg", config_of(model), "--gpus", "cpu", "--out", out,
        "DATASET.list_val", listing, "DATASET.root_dataset", listing.parent, *more,
    ]  # fmt: skip


def test_eval_goes_on_past_bad_samples(tmp_path, model, command, untouched):
    listing, out = write_samples(tmp_path / "data", *ALL_BAD), tmp_path / "out"
    with untouched(but=out):
        outcome = command(*evaluating(model, listing, out))
    assert outcome.code == 1, outcome.out + outcome.err
    for case in ALL_BAD:
        lines = [x for x in (outcome.out + outcome.err).splitlines() if f"/{case.name}: " in x]
        assert lines and re.search(case.message, lines[0]), case
    assert (out / "eval.json").is_file()


def test_pictures_of_images_from_anywhere_stay_in_the_result_folder(
    tmp_path, model, command, untouched
):
    root, out = tmp_path / "data/root", tmp_path / "out"
    listing = write_samples(root, good=1)
    lines = []
    for place, named in (
        ("beside/a.png", "../../beside/a.png"),
        ("far/b.png", str(tmp_path / "far/b.png")),
        ("data/root/images/good0.png", "images/../images/good0.png"),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(corpus.png(COLOR))
        lines.append(json.dumps({"fpath_img": named, "fpath_segm": "masks/good0.png"}))
    listing.write_text("\n".join(lines) + "\n")
    with untouched(but=out):
        outcome = command(*evaluating(model, listing, out, "VAL.visualize", True))
    assert outcome.code == 0, outcome.out + outcome.err
    pictures = {path.relative_to(out / "pictures").as_posix() for path in out.rglob("*/*.png")}
    assert pictures == {"beside/a.png", "far/b.png", "data/root/images/good0.png"}


# ------------------------------------------------------------------------------ checkpoints
FAULTS = {
    "predict": ("empty", "a bit flipped", "code among weights", "another architecture"),
    "eval": ("cut in the middle", "old, with code", "another width"),
    "pack": ("a web page", "code among weights", "a bit flipped"),
    "train --resume": ("TorchScript", "code among weights", "another architecture"),
    "MODEL.weights_encoder": ("a bit flipped", "old, with code", "another width"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_bad_checkpoints(tmp_path, model, command, untouched, what):
    marker, folder, out = (tmp_path / name for name in ("marker", "ckpt", "out"))
    shutil.copytree(model.DIR, folder)
    bad, listing = folder / "encoder_best.pth", write_samples(tmp_path / "data")
    words = {
        "predict": [*predicting(model, tmp_path / "data/images/good0.png", out), "DIR", folder],
        "eval": evaluating(model, listing, out, "DIR", folder),
        "pack": ["pack", folder, out],
        "train --resume": resumed(training(model, listing, out), bad),
        "MODEL.weights_encoder": training(model, listing, out, "MODEL.weights_encoder", bad),
    }[what]
    files = corpus.weight_files(bad, tmp_path / "faults", marker, FAULTS[what])
    for fault, (path, message) in files.items():
        if what == "train --resume" and fault.startswith("another"):
            message = "is not a state of a run"  # weights alone are not
        shutil.copyfile(path, bad)
        with untouched(but=out):
            error = command(*words).error
        assert str(bad) in error and re.search(message, error), error
        assert not marker.exists()


def test_bad_states(tmp_path, model, command, untouched):
    """Whole files of torch.save that no training, or one of another kind, has written."""
    listing = write_samples(tmp_path / "data")
    done = tmp_path / "done"
    assert command(*training(model, listing, done)).code == 0
    good = torch.load(done / "state_step_1.pth", weights_only=True)
    unfit = "does not fit this run"
    odd = {"step": torch.ones(2, 2), "epoch_iters": 0, "position": None, "encoder": 3}
    every = "(decoder, encoder, epoch_iters, history, position, step: missing"
    cases = [
        ([1, 2], "contains a list"),
        ({}, every),
        ({"epoch": 3, "step": "x", "state_dict": good["encoder"], "optimizer": {}}, every),
        (
            {**good, **odd, "history": [1], "config": 3},
            "(config, encoder, epoch_iters, history, position, step: missing",
        ),
        ({**good, "step": -1}, "is not a state of a run (step: missing"),
        ({**good, "encoder": {"conv1.weight": 3}}, unfit),
        ({**good, "history": {"train": 3}}, unfit),
        ({**good, "history": {"train": {"loss": 3}}}, unfit),
        ({**good, "losses": 3}, unfit),
        ({**good, "seconds": "x"}, unfit),
        ({**good, "optimizer": 3}, unfit),
        ({**good, "optimizers": [3, 4]}, unfit),
        ({**good, "random": 3}, unfit),
        ({**good, "random": [{"torch": 3}]}, unfit),
    ]
    file, out = tmp_path / "odd" / "x.pth", tmp_path / "out"
    file.parent.mkdir()
    words = training(model, listing, out, "TRAIN.num_epoch", 2)
    for state, message in cases:
        torch.save(state, file)
        with untouched(but=out):
            error = command(*resumed(words, file)).error
        assert str(file) in error and message in error, error
    torch.save(good, file)
    assert command(*resumed(words, file)).code == 0
