"""The corpus by the command line, as a user would: one line each, and the others go on."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpus
import pytest
import torch
from corpus import COLOR, LABELS
from PIL import Image

from mit_semseg.cli import main
from mit_semseg.config.node import Config

Untouched = Callable[..., AbstractContextManager[None]]
Command = Callable[..., Any]


def config_of(model: Config) -> str:
    return os.path.join(model.DIR, "config.yaml")


def write_all(folder: Path, cases: list[corpus.Case]) -> None:
    folder.mkdir(parents=True)
    for case in cases:
        case.write(folder / case.name)


def write_samples(root: Path, faulty: dict[str, corpus.Case], good: int = 4) -> Path:
    """A list of good samples and one for each faulty image or mask ("image x", "mask y")."""
    lines = []

    def add(name: str, image: Path, mask: Path) -> None:
        lines.append(json.dumps({"fpath_img": str(image), "fpath_segm": str(mask)}))

    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for k in range(good):
        image, mask = root / "images" / f"good{k}.png", root / "masks" / f"good{k}.png"
        Image.fromarray(COLOR).save(image)
        Image.fromarray(LABELS).save(mask)
        add(f"good{k}", image, mask)
    for kind, case in faulty.items():
        image, mask = root / "images" / f"{kind}.png", root / "masks" / f"{kind}.png"
        if kind.startswith("image"):
            image = image.with_name(case.name)
            case.write(image)
            Image.fromarray(LABELS).save(mask)
        else:
            mask = mask.with_name(case.name)
            Image.fromarray(COLOR).save(image)
            case.write(mask)
        add(kind, image, mask)
    path = root / "list.odgt"
    path.write_text("\n".join(lines) + "\n")
    return path


def by_name(cases: list[corpus.Case], *names: str) -> list[corpus.Case]:
    return [next(case for case in cases if case.name == name) for name in names]


BAD_IMAGES = by_name(
    corpus.IMAGES, "truncated.jpg", "empty.png", "bomb.png", "pipe.jpg", "page.jpg"
)
BAD_MASKS = by_name(corpus.MASKS, "turned.png", "colors.png", "far.png", "cut.png", "gone.png")


def faulty() -> dict[str, corpus.Case]:
    found = {f"image {k}": case for k, case in enumerate(BAD_IMAGES)}
    return {**found, **{f"mask {k}": case for k, case in enumerate(BAD_MASKS)}}


# ------------------------------------------------------------------------------ predict
def test_predict_goes_on_past_bad_images(
    tmp_path: Path, model: Config, command: Command, untouched: Untouched
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    cases = [case for case in corpus.IMAGES if case.name not in ("gone.jpg", "folder.jpg")]
    write_all(folder, cases)
    (folder / "loop").symlink_to(folder)
    for name in corpus.NAMES.values():
        Image.fromarray(COLOR).save(folder / name, "PNG")
    with untouched(but=out):
        outcome = command(
            "predict", "--cfg", config_of(model), "--gpu", "cpu", "--imgs", folder,
            "TEST.result", out, "TEST.save", "[index]",
        )  # fmt: skip
    assert outcome.code == 1
    report = outcome.out.partition("images failed:")[2]
    bad = [case for case in corpus.UNREADABLE if case in cases]
    results = {path.stem: path for path in out.rglob("*.png")}
    for case in bad:
        (line,) = [x for x in report.splitlines() if f"/{case.name}: " in x]
        assert re.search(case.message, line), line
        assert Path(case.name).stem not in results or case.name.split(".")[0] in (
            "empty", "truncated", "page", "header_only"
        )  # fmt: skip
    for case in cases:
        if case.good is None:
            continue
        stem, _, ending = case.name.rpartition(".")
        found = results.get(stem) or results[f"{stem}_{ending}"]
        with Image.open(found) as image:
            assert image.size == case.good.shape[1::-1], case.name


def test_predict_peculiar_names(
    tmp_path: Path, model: Config, command: Command, untouched: Untouched
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in corpus.NAMES.values():
        Image.fromarray(COLOR).save(folder / name, "PNG")
    with untouched(but=out):
        outcome = command(
            "predict", "--cfg", config_of(model), "--gpu", "cpu", "--imgs", folder,
            "TEST.result", out, "TEST.save", "[color]",
        )  # fmt: skip
    assert outcome.code == 0, outcome.out + outcome.err
    assert sorted(os.listdir(out)) == sorted(corpus.NAMES.values())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_of_any_bytes_where_output_takes_text_alone(
    tmp_path: Path, model: Config, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A terminal of UTF-8, or of ASCII alone: a name is no reason to stop, nor for a traceback."""
    folder = tmp_path / "in"
    folder.mkdir()
    for peculiar in ("not UTF-8", "unicode"):
        Image.fromarray(COLOR).save(folder / corpus.NAMES[peculiar], "PNG")
    os.link(folder / corpus.NAMES["unicode"], folder / os.fsdecode(b"bad\xff.jpg"))
    (folder / os.fsdecode(b"bad\xfe.jpg")).write_text("no picture")
    shown = {}
    for stream in ("stdout", "stderr"):
        shown[stream] = io.BytesIO()
        terminal = io.TextIOWrapper(shown[stream], encoding, "strict", write_through=True)
        monkeypatch.setattr(sys, stream, terminal)
    code = main(
        ["predict", "--cfg", config_of(model), "--gpu", "cpu", "--imgs", str(folder),
         "TEST.result", str(tmp_path / "out")],
    )  # fmt: skip
    out, err = shown["stdout"].getvalue(), shown["stderr"].getvalue()
    assert code == 1 and b"Traceback" not in err, err
    assert b"1 of 4 images failed" in out and b"bad\\udcfe.jpg" in out


def test_a_log_takes_names_of_any_bytes(tmp_path: Path, model: Config, command: Command) -> None:
    (case,) = by_name(corpus.IMAGES, "page.jpg")
    bad = replace(case, name=os.fsdecode(b"bad\xff.jpg"))
    listing = write_samples(tmp_path / "data", {"image 0": bad})
    folder = tmp_path / "run"
    outcome = command(
        *training(model, listing, folder, "DATASET.on_error", "skip", "TRAIN.workers", 0)
    )
    assert outcome.code == 0, outcome.out + outcome.err
    assert "bad\\udcff.jpg" in (folder / "log.txt").read_text()


def test_predict_names_that_are_too_long_with_an_ending(
    tmp_path: Path, model: Config, command: Command
) -> None:
    for name in (corpus.NAMES["255 bytes"], "short.png"):
        Image.fromarray(COLOR).save(tmp_path / name, "PNG")
    out = tmp_path / "out"
    outcome = command(
        "predict", "--cfg", config_of(model), "--gpu", "cpu", "--imgs", tmp_path,
        "TEST.result", out, "TEST.save", "[color,overlay]",
    )  # fmt: skip
    assert outcome.code == 1 and re.search("nnn.png: .*File name too long", outcome.out)
    assert {"short_color.png", "short_overlay.png"} <= set(os.listdir(out))


@pytest.mark.parametrize("name", ["truncated.jpg", "pipe.jpg", "dangling.png", "gone.jpg"])
def test_predict_one_bad_image(
    tmp_path: Path, model: Config, command: Command, untouched: Untouched, name: str
) -> None:
    (case,) = by_name(corpus.IMAGES, name)
    path = tmp_path / name
    case.write(path)
    out = tmp_path / "out"
    with untouched(but=out):
        outcome = command(
            "predict", "--cfg", config_of(model), "--gpu", "cpu", "--imgs", path,
            "TEST.result", out,
        )  # fmt: skip
    assert outcome.code in (1, 2)
    said = outcome.error if outcome.code == 2 else outcome.out
    assert str(path) in said
    assert not out.exists() or not any(out.iterdir())


# ------------------------------------------------------------------------------ data
def test_data_check_names_every_bad_sample(
    tmp_path: Path, command: Command, untouched: Untouched
) -> None:
    path = write_samples(tmp_path / "data", faulty())
    with untouched():
        outcome = command("data", "check", path, "--num-class", 3)
    assert outcome.code == 1
    for case in [*BAD_IMAGES, *BAD_MASKS]:
        (line,) = [x for x in outcome.out.splitlines() if f"/{case.name}: " in x]
        assert re.search(case.message, line), line


@pytest.mark.parametrize("case", [c for c in corpus.LISTS if c.good is None], ids=str)
def test_data_check_of_bad_lists(tmp_path: Path, command: Command, case: corpus.Case) -> None:
    path = tmp_path / case.name
    case.write(path)
    error = command("data", "check", path).error
    assert str(path) in error and re.search(case.message, error)


def test_make_odgt_leaves_out_what_cannot_be_read(
    tmp_path: Path, command: Command, untouched: Untouched
) -> None:
    write_samples(tmp_path / "data", {})
    for name in ("turned.png", "text.png", "empty.png", "folder.png", "pipe.png"):
        (case,) = by_name(corpus.MASKS, name)
        case.write(tmp_path / "data" / "masks" / name)
        Image.fromarray(COLOR).save(tmp_path / "data" / "images" / name)
    out = tmp_path / "lists"
    with untouched(but=out):
        outcome = command(
            "data", "make-odgt", "--images", tmp_path / "data/images",
            "--labels", tmp_path / "data/masks", "--out", out,
        )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "3 training and 1 validation samples" in outcome.out
    assert "2 images without mask, left out:\n  folder.png\n  pipe.png" in outcome.out
    assert "3 unusable, left out:" in outcome.out
    for said in ("turned.png: 24x40 pixels", "text.png: not a readable", "empty.png: not a"):
        assert said in outcome.out


# ------------------------------------------------------------------------------ train
def training(model: Config, listing: Path, folder: Path, *more: Any) -> list[Any]:
    return [
        "train", "--cfg", config_of(model), "--gpus", "cpu", "DIR", folder,
        "DATASET.list_train", listing, "DATASET.root_dataset", listing.parent,
        "DATASET.num_class", 3, "DATASET.imgSizes", "[24]", "DATASET.padding_constant", 8,
        "TRAIN.batch_size_per_gpu", 2, "TRAIN.num_epoch", 1, "TRAIN.epoch_iters", 4,
        "TRAIN.eval_epochs", 0, *more,
    ]  # fmt: skip


def resumed(words: list[Any], state: Path) -> list[Any]:
    return [*words[:1], "--resume", state, *words[1:]]


@pytest.mark.parametrize(
    ("case", "workers"),
    [(BAD_IMAGES[0], 0), (BAD_IMAGES[0], 2), (BAD_IMAGES[3], 2), (BAD_MASKS[2], 0)],
    ids=str,
)
def test_training_stops_at_a_bad_sample(
    tmp_path: Path, model: Config, command: Command, case: corpus.Case, workers: int
) -> None:
    kind = "image 0" if case in BAD_IMAGES else "mask 0"
    listing = write_samples(tmp_path / "data", {kind: case})
    error = command(*training(model, listing, tmp_path / "run", "TRAIN.workers", workers)).error
    assert case.name in error and re.search(case.message, error)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_bad_samples(
    tmp_path: Path, model: Config, command: Command, untouched: Untouched, workers: int
) -> None:
    listing = write_samples(tmp_path / "data", faulty(), good=6)
    folder = tmp_path / "run"
    with untouched(but=folder):
        outcome = command(
            *training(model, listing, folder, "DATASET.on_error", "skip", "TRAIN.workers", workers)
        )
    assert outcome.code == 0, outcome.out + outcome.err
    assert (folder / "encoder_epoch_1.pth").is_file()
    said = (folder / "log.txt").read_text()
    assert any(case.name in said for case in BAD_IMAGES)


# ------------------------------------------------------------------------------ eval
def test_eval_goes_on_past_bad_samples(
    tmp_path: Path, model: Config, command: Command, untouched: Untouched
) -> None:
    listing = write_samples(tmp_path / "data", faulty())
    out = tmp_path / "out"
    with untouched(but=out):
        outcome = command(
            "eval", "--cfg", config_of(model), "--gpus", "cpu", "--out", out,
            "DATASET.list_val", listing, "DATASET.root_dataset", listing.parent,
        )  # fmt: skip
    assert outcome.code == 1, outcome.out + outcome.err
    for case in [*BAD_IMAGES, *BAD_MASKS]:
        lines = [x for x in (outcome.out + outcome.err).splitlines() if f"/{case.name}: " in x]
        assert lines and re.search(case.message, lines[0]), case
    assert (out / "eval.json").is_file()


def test_pictures_of_images_from_anywhere_stay_in_the_result_folder(
    tmp_path: Path, model: Config, command: Command, untouched: Untouched
) -> None:
    root, out = tmp_path / "data" / "root", tmp_path / "out"
    write_samples(root, {}, good=1)
    lines = []
    for place, named in (
        (tmp_path / "beside" / "a.png", "../../beside/a.png"),
        (tmp_path / "far" / "b.png", str(tmp_path / "far" / "b.png")),
        (root / "images" / "good0.png", "images/../images/good0.png"),
    ):
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(COLOR).save(place)
        lines.append(json.dumps({"fpath_img": named, "fpath_segm": "masks/good0.png"}))
    listing = root / "list.odgt"
    listing.write_text("\n".join(lines) + "\n")
    with untouched(but=out):
        outcome = command(
            "eval", "--cfg", config_of(model), "--gpus", "cpu", "--out", out,
            "DATASET.list_val", listing, "DATASET.root_dataset", root, "VAL.visualize", True,
        )  # fmt: skip
    assert outcome.code == 0, outcome.out + outcome.err
    pictures = {path.relative_to(out / "pictures").as_posix() for path in out.rglob("*/*.png")}
    assert pictures == {"beside/a.png", "far/b.png", "data/root/images/good0.png"}


# ------------------------------------------------------------------------------ checkpoints
FAULTS = ("empty", "cut in the middle", "a bit flipped", "a web page", "code among weights",
          "old, with code", "TorchScript", "another architecture", "another width")  # fmt: skip


@pytest.mark.parametrize(
    "what", ["predict", "eval", "pack", "train --resume", "MODEL.weights_encoder"]
)
def test_bad_checkpoints(
    tmp_path: Path, model: Config, command: Command, untouched: Untouched, what: str
) -> None:
    marker = tmp_path / "marker"
    folder = tmp_path / "ckpt"
    shutil.copytree(model.DIR, folder)
    good = Path(model.DIR) / "encoder_best.pth"
    listing = write_samples(tmp_path / "data", {})
    image = tmp_path / "data/images/good0.png"
    out = tmp_path / "out"
    words: dict[str, list[Any]] = {
        "predict": ["predict", "--cfg", folder / "config.yaml", "--gpu", "cpu", "--imgs", image,
                    "DIR", folder, "TEST.result", out],
        "eval": ["eval", "--cfg", folder / "config.yaml", "--gpus", "cpu", "--out", out, "DIR",
                 folder, "DATASET.list_val", listing],
        "pack": ["pack", folder, out],
        "train --resume": resumed(training(model, listing, out), folder / good.name),
        "MODEL.weights_encoder": training(
            model, listing, out, "MODEL.weights_encoder", folder / good.name
        ),
    }  # fmt: skip
    files = corpus.weight_files(good, tmp_path / "faults", marker)
    for fault in FAULTS:
        if what == "pack" and fault.startswith("another"):
            continue  # packing takes any weights
        path, message = files[fault]
        if what == "train --resume" and fault.startswith("another"):
            message = "is no state of a run"  # weights alone are not
        shutil.copyfile(path, folder / "encoder_best.pth")
        with untouched(but=out):
            error = command(*words[what]).error
        assert str(folder / "encoder_best.pth") in error and re.search(message, error), error
        assert not marker.exists()


def test_bad_states(tmp_path: Path, model: Config, command: Command, untouched: Untouched) -> None:
    """Whole files of torch.save that no training, or one of another kind, has written."""
    listing = write_samples(tmp_path / "data", {})
    done = tmp_path / "done"
    assert command(*training(model, listing, done, "TRAIN.epoch_iters", 1)).code == 0
    good = torch.load(done / "state_step_1.pth", weights_only=True)
    unfit = "does not fit this run"
    odd = {"step": torch.ones(2, 2), "epoch_iters": 0, "position": None, "encoder": 3}
    every = "(decoder, encoder, epoch_iters, history, position, step: missing"
    cases: list[tuple[Any, str]] = [
        ([1, 2], "holds a list"),
        ({}, every),
        ({"epoch": 3, "step": "x", "state_dict": good["encoder"], "optimizer": {}}, every),
        (
            {**good, **odd, "history": [1], "config": 3},
            "(config, encoder, epoch_iters, history, position, step: missing",
        ),
        ({**good, "step": -1}, "is no state of a run (step: missing"),
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
    words = training(model, listing, out, "TRAIN.num_epoch", 2, "TRAIN.epoch_iters", 1)
    for state, message in cases:
        torch.save(state, file)
        with untouched(but=out):
            error = command(*resumed(words, file)).error
        assert str(file) in error and message in error and len(error) < 500, error
    torch.save(good, file)
    assert command(*resumed(words, file)).code == 0


# ------------------------------------------------------------------------------ configurations
@pytest.mark.parametrize("case", [c for c in corpus.CONFIGS if c.good is None], ids=str)
def test_bad_configurations(
    tmp_path: Path, command: Command, untouched: Untouched, monkeypatch: pytest.MonkeyPatch,
    case: corpus.Case,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = tmp_path / case.name
    case.write(path)
    with untouched():
        for words in (["train"], ["eval"], ["predict", "--imgs", "x.jpg"]):
            error = command(words[0], "--cfg", path, *words[1:]).error
            assert str(path) in error and re.search(case.message, error)
