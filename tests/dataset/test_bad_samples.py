"""Training samples that cannot be used: an error, or replaced by others."""

import numpy as np
import pytest
import torch
from dataset_files import put
from PIL import Image


def test_a_bad_sample_stops_or_is_replaced(samples):
    records = samples.mixed()
    bad = samples.cut(records[6])  # one of three upright ones
    stopping = samples.train(records, 2)
    which = next(k for k in range(5) if bad in stopping.files(k))
    with pytest.raises(ValueError, match=bad):
        stopping[which]
    assert all("skipped" not in stopping[k] for k in range(5) if k != which)

    data = samples.train(records, 2, on_error="skip")
    upright = {r["fpath_img"] for r in records if r["height"] > r["width"]}
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


def turn(samples, record):
    """Turns an image by its EXIF, its mask as it was."""
    exif = Image.Exif()
    exif[274] = 8
    samples.read(record).save(samples.root / record["fpath_img"], exif=exif)
    del record["width"], record["height"]


FAULTS = {
    "list": (lambda s, record: record.update(width=41), r"bad\.png: 40x30 .* list 41x30"),
    "no mask": (lambda s, record: (s.root / record["fpath_segm"]).unlink(), "no such file"),
    "mask size": (
        lambda s, record: put(s.root / record["fpath_segm"], np.zeros((30, 41), np.uint8)),
        r"masks.bad\.png: 41x30 .*images.bad\.png has 40x30",
    ),
    "label": (
        lambda s, record: put(s.root / record["fpath_segm"], np.full((30, 40), 200, np.uint8)),
        r"masks.bad\.png: label 200",
    ),
    "turned": (turn, r"40x30 pixels, but its image .* 30x40 \(upright by EXIF"),
}


@pytest.mark.parametrize("batching", ["aspect", "crop"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_a_sample_bad(samples, fault, batching):
    spoil, says = FAULTS[fault]
    good, bad = samples.write("good"), samples.write("bad")
    spoil(samples, bad)
    settings = {"batching": batching, "crop_size": [16, 16]}
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        samples.train([bad], **settings)[0]
    batch = samples.train([good, bad], 2, on_error="skip", **settings)
    batches = [batch[k] for k in range(batch.batches_per_pass)]
    assert {name for b in batches for name in b["info"]} == {good["fpath_img"]}
    ((file, reason),) = (one for b in batches for one in b["skipped"])
    assert file == bad["fpath_img"] and "bad.png" in reason


def test_the_only_one_of_its_orientation_is_replaced_by_another(samples):
    records = [samples.write("wide"), samples.write("tall", (30, 40))]
    samples.cut(records[1])
    data = samples.train(records, on_error="skip")
    assert [data[k]["info"] for k in range(4)] == [[records[0]["fpath_img"]]] * 4


def test_too_many_bad_samples_stop_after_eight_more(samples):
    records = [samples.write(f"bad{k}") for k in range(12)]
    for record in records:
        samples.cut(record)
    for count, tried in ((12, 8), (1, 0)):
        with pytest.raises(ValueError, match=rf"truncated.*none of {tried} random.*data check"):
            samples.train(records[:count], on_error="skip")[0]
    with pytest.raises(ValueError, match=r"on_error is 'ignore'; give one of stop, skip"):
        samples.train(records, on_error="ignore")
