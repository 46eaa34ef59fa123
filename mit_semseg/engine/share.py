"""Sharing a model: a folder with weights, configuration, classes and model card, and its upload."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mit_semseg import __version__, shipped
from mit_semseg.config import Options, dump_config
from mit_semseg.engine.checkpoint import CONFIG, CheckpointFolder, load_model, pack
from mit_semseg.engine.eval_page import sizes_text
from mit_semseg.engine.from_model import recipe
from mit_semseg.engine.hub import HubName, library, talking
from mit_semseg.visualize.pages import rendered

CARD = "README.md"
# Subfolders in which evaluations are found; "": the folder itself.
EVALUATIONS = ("result_eval", "evaluation", "")
# Pictures of a card: file, and its title.
CHARTS = {
    "class_iou.png": "IoU of each class",
    "confusion.png": "Confusion matrix",
    "curves.png": "Training",
}
MAX_PICTURES = 4


def push(
    source: str | os.PathLike[str],
    repo: str,
    *,
    checkpoint: str | None = None,
    private: bool | None = None,
    license: str = "",
) -> str:
    """Upload a model to the Hugging Face Hub, as one commit; creates the repository if needed.

    Args:
        source: a checkpoint folder, or the name of the shipped model.
        repo: `USER/NAME`; `USER/NAME@BRANCH` for an existing branch.
        checkpoint: such as `epoch_20.pth`; None for the best, else the latest.
        private: whether a new repository is private; None: as the account's settings say.
        license: of the weights, as the hub names it, such as `cc-by-4.0`.

    Returns:
        The address of the model.

    Raises:
        FileNotFoundError: the folder or the checkpoint does not exist.
        ValueError: a wrong name, or huggingface_hub is not installed.
        OSError: the upload failed.
    """
    name = HubName.of(repo)
    hub = library(f"push to {repo}")
    api = hub.HfApi(library_name="mit_semseg", library_version=__version__)
    failure = f"{repo} cannot be uploaded"
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare(source, Path(temporary) / "model", repo, checkpoint, license)
        files = sorted(path for path in folder.rglob("*") if path.is_file())

        def upload() -> Any:
            api.create_repo(name.repo, private=private, exist_ok=True)
            added = [
                hub.CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files
            ]
            title = f"Upload a model of mit_semseg {__version__}"
            return api.create_commit(name.repo, added, commit_message=title, revision=name.revision)

        talking(upload, failure, name)
    return f"{api.endpoint}/{name.repo}"


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    repo: str,
    checkpoint: str | None = None,
    license: str = "",
) -> Path:
    """Write the files of a model to share: what `push` uploads.

    These are the weights as `.safetensors` in their own precision, `config.yaml` without absolute
    paths, the class table, a model card (`README.md`), and pictures of an evaluation.

    Args:
        source: a checkpoint folder, or the name of the shipped model.
        out: the folder to write; created.
        repo: `USER/NAME`, which the card shows.
        checkpoint: such as `epoch_20.pth`; None for the best, else the latest.
        license: of the weights.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: the folder or the checkpoint does not exist.
        ValueError: huggingface_hub or safetensors is not installed.
    """
    name = HubName.of(repo)
    library(f"the model card of {repo}")
    folder = CheckpointFolder(shipped.model(source))
    checkpoint = checkpoint or folder.best_or_latest()
    packed = pack(folder.path, Path(out), checkpoint, suffix=".safetensors", half=False)
    for unwanted in ("log.txt", "metrics.jsonl"):  # may name folders of the author's machine
        (packed / unwanted).unlink(missing_ok=True)
    shared = CheckpointFolder(packed)
    options = _portable(shared.options(), name)
    dump_config(options, packed / CONFIG)
    found = _evaluation(folder.path, checkpoint)
    result, pictures = {}, ["curves.png"] if (packed / "curves.png").is_file() else []
    if found is not None:
        result = json.loads(found.read_text(encoding="utf-8"))
        pictures = _copy_pictures(found.parent, packed) + pictures
    text = card(options, shared, name.repo, result, pictures, license)
    (packed / CARD).write_text(text, encoding="utf-8")
    return packed


def card(
    options: Options,
    folder: CheckpointFolder,
    repo: str,
    result: dict[str, Any],
    pictures: list[str],
    license: str = "",
) -> str:
    """The model card of a folder in Markdown, with the metadata that the hub reads.

    Args:
        options: settings of the model.
        folder: the files of the model.
        repo: `USER/NAME`.
        result: content of `eval.json`; {}: no evaluation.
        pictures: files in the folder.
        license: of the weights.
    """
    classes = folder.classes()
    module = load_model(replace(options, DIR=str(folder.path)), folder.best_or_latest())
    ious = {row["name"]: row["iou"] for row in result.get("classes", ())}
    return rendered(
        "model_card.md",
        charts=[(CHARTS.get(Path(file).name, Path(file).stem), file) for file in pictures],
        classes=[
            (label, "#{:02x}{:02x}{:02x}".format(*color), ious.get(label))
            for label, color in zip(classes.names, classes.colors.tolist())
        ],
        dataset=options.DATASET.format or "own data",
        license=license,
        metadata=_metadata(options, repo, result, license),
        model=options.MODEL.name,
        name=repo.rpartition("/")[2],
        parameters=sum(parameter.numel() for parameter in module.parameters()) / 1e6,
        recipe=recipe(options).strip(),
        repo=repo,
        result=result,
        evaluated=sizes_text(result) if result else "",
        sizes=options.DATASET.at_scales(options.TEST.imgSizes, options.TEST.scales).sizes_text,
    )


def _metadata(options: Options, repo: str, result: dict[str, Any], license: str) -> str:
    """The YAML header, from which the hub makes its filters and its table of figures."""
    hub = library(f"the model card of {repo}")
    data = options.DATASET.format or "own data"
    figures = [
        hub.EvalResult(
            task_type="image-segmentation",
            dataset_type=data,
            dataset_name=data,
            metric_type=kind,
            metric_name=title,
            metric_value=round(result[kind], 4),
        )
        for kind, title in (("mean_iou", "mean IoU"), ("pixel_accuracy", "pixel accuracy"))
        if result.get(kind) is not None
    ]
    header = hub.ModelCardData(
        license=license or None,
        library_name="mit_semseg",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "pytorch"],
        model_name=repo.rpartition("/")[2] if figures else None,
        eval_results=figures or None,
    )
    text: str = header.to_yaml()
    return text.strip()


def _evaluation(folder: Path, checkpoint: str) -> Path | None:
    """The newest `eval.json` of a checkpoint."""
    stem = os.path.splitext(checkpoint)[0]
    files = [folder / part / "eval.json" for part in EVALUATIONS]
    found = [
        file
        for file in files
        if file.is_file()
        and Path(json.loads(file.read_text(encoding="utf-8")).get("checkpoint", "")).stem == stem
    ]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _copy_pictures(evaluation: Path, out: Path) -> list[str]:
    """Copy charts, and the first pictures of images; returns their paths in the folder."""
    samples = sorted((evaluation / "pictures").rglob("*.png"))[:MAX_PICTURES]
    charts = [evaluation / name for name in CHARTS if name != "curves.png"]
    copied = []
    for file in (*samples, *(chart for chart in charts if chart.is_file())):
        target = out / "pictures" / file.name if file in samples else out / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
        copied.append(target.relative_to(out).as_posix())
    return copied


def _portable(options: Options, name: HubName) -> Options:
    """The options without absolute paths, of which the last part is kept."""
    data, model = options.DATASET, options.MODEL
    return replace(
        options,
        DIR=name.repo.rpartition("/")[2],
        DATASET=replace(
            data,
            root_dataset=_last(data.root_dataset),
            list_train=_last_of_each(data.list_train),
            list_val=_last_of_each(data.list_val),
            classes="",  # the folder has the table
        ),
        MODEL=replace(
            model,
            weights_encoder=_last(model.weights_encoder),
            weights_decoder=_last(model.weights_decoder),
        ),
        TEST=replace(options.TEST, result="./predictions"),
    )


def _last_of_each(lists: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return _last(lists) if isinstance(lists, str) else tuple(map(_last, lists))


def _last(path: str) -> str:
    """`/a/b:/c/d` -> `b:d`; relative paths, urls and names are unchanged."""
    parts = path.split(":") if "://" not in path else [path]
    return ":".join(os.path.basename(part) if os.path.isabs(part) else part for part in parts)
