"""Training samples that cannot be used: an error, or replaced by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mit_semseg.dataset import TrainDataset

Options = Callable[..., SimpleNamespace]
Writer = Callable[..., dict[str, Any]]


def one_by_one(batches: Any) -> list[dict[str, Any]]:
    return list(batches)


def damage(root: Path, record: dict[str, Any]) -> str:
    """Cut the image file in half; returns its path as listed."""
    file = root / record["fpath_img"]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return str(record["fpath_img"])


def same_batches(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    return all(
        a["info"] == b["info"]
        and a["skipped"] == b["skipped"]
        and torch.equal(a["img_data"], b["img_data"])
        and torch.equal(a["seg_label"], b["seg_label"])
        for a, b in zip(one, two, strict=True)
    )


def test_a_bad_sample_stops_or_is_replaced(
    tmp_path: Path, mixed: list[dict[str, Any]], options: Options
) -> None:
    bad = damage(tmp_path, mixed[6])  # one of three upright ones
    stopping = TrainDataset(tmp_path, mixed, options(), batch_per_gpu=2)
    which = next(k for k in range(5) if bad in stopping.files(k))
    with pytest.raises(ValueError, match=bad):
        stopping[which]
    assert all("skipped" not in stopping[k] for k in range(5) if k != which)

    data = TrainDataset(tmp_path, mixed, options(on_error="skip"), batch_per_gpu=2)
    upright = {r["fpath_img"] for r in mixed if r["height"] > r["width"]}
    for k in range(5):
        batch = data[k]
        if k != which:  # as if nothing were wrong anywhere
            assert batch["skipped"] == [] and batch["info"] == data.files(k)
            assert torch.equal(batch["img_data"], stopping[k]["img_data"])
            continue
        ((file, reason),) = batch["skipped"]
        assert file == bad and bad in reason and "truncated" in reason and "\n" not in reason
        assert bad not in batch["info"] and set(batch["info"]) <= upright
        assert len(batch["info"]) == len(data.files(k)) == len(batch["img_data"])


def test_replacements_are_the_same_for_any_number_of_workers(
    tmp_path: Path, mixed: list[dict[str, Any]], options: Options
) -> None:
    for record in mixed[::3]:
        damage(tmp_path, record)
    opt = options(on_error="skip", crop_size=(16, 16), color_jitter=0.3)
    data = TrainDataset(tmp_path, mixed, opt, batch_per_gpu=2)
    alone = [data[k] for k in range(12)]
    assert sum(len(batch["skipped"]) for batch in alone) > 4
    for workers in (1, 2):
        loader = torch.utils.data.DataLoader(
            data, sampler=range(12), num_workers=workers, collate_fn=one_by_one
        )
        assert same_batches(alone, [batch for (batch,) in loader])
    backwards = [data[k] for k in reversed(range(12))]
    assert same_batches(alone, backwards[::-1])


@pytest.mark.parametrize("fault", ["missing mask", "mask of another size", "unknown label", "list"])
def test_what_else_makes_a_sample_bad(
    tmp_path: Path, write_pair: Writer, options: Options, fault: str
) -> None:
    good, bad = write_pair("good"), write_pair("bad")
    mask = tmp_path / bad["fpath_segm"]
    if fault == "missing mask":
        mask.unlink()
    elif fault == "mask of another size":
        Image.new("L", (7, 7)).save(mask)
    elif fault == "unknown label":
        Image.new("L", (40, 30), 200).save(mask)
    else:
        bad["width"] += 1
    data = TrainDataset(tmp_path, [good, bad], options(on_error="skip"), batch_per_gpu=2)
    batch = data[0]
    assert batch["info"] == [good["fpath_img"]] * 2
    assert [file for file, _ in batch["skipped"]] == [bad["fpath_img"]]


def test_the_only_one_of_its_orientation_is_replaced_by_another(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    records = [write_pair("wide"), write_pair("tall", (30, 40))]
    damage(tmp_path, records[1])
    data = TrainDataset(tmp_path, records, options(on_error="skip"))
    assert [data[k]["info"] for k in range(4)] == [[records[0]["fpath_img"]]] * 4


def test_too_many_bad_samples_stop_after_eight_more(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    records = [write_pair(f"bad{k}") for k in range(12)]
    for record in records:
        damage(tmp_path, record)
    data = TrainDataset(tmp_path, records, options(on_error="skip"))
    with pytest.raises(ValueError, match=r"truncated.*any of 8 others.*data check"):
        data[0]
    with pytest.raises(ValueError, match="any of 0 others"):
        TrainDataset(tmp_path, records[:1], options(on_error="skip"))[0]
    with pytest.raises(ValueError, match=r"on_error is 'ignore'; it is one of stop, skip"):
        TrainDataset(tmp_path, records, options(on_error="ignore"))
