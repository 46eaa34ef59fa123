"""Lists and configurations of the corpus, by the functions that read them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import corpus
import pytest
from corpus import Case
from PIL import Image

from mit_semseg.config import load_config
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.records import read_odgt


@pytest.mark.parametrize("case", corpus.LISTS, ids=str)
def test_lists(tmp_path: Path, case: Case) -> None:
    path = tmp_path / case.name
    case.write(path)
    if case.good is None:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            read_odgt(path)
        text = str(caught.value)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 500
        assert re.search(case.message, text), text
        return
    records = read_odgt(path)
    assert len(records) == case.good
    for record in records:
        expected = json.loads(corpus.RECORD)
        for key, value in record.items():
            assert str(Path(str(value))).replace("masks/../", "") == str(expected[key])


@pytest.mark.parametrize("case", corpus.SAMPLES, ids=str)
def test_samples_that_cannot_be_used(tmp_path: Path, case: Case) -> None:
    for folder, pixels in (("images", corpus.COLOR), ("masks", corpus.LABELS)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    case.write(tmp_path / case.name)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        TrainDataset(tmp_path, str(tmp_path / case.name), {"num_class": 3, "imgSizes": [24]})[0]
    text = str(caught.value)
    assert "\n" not in text and re.search(case.message, text), text


@pytest.mark.parametrize("case", corpus.CONFIGS, ids=str)
def test_configurations(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / case.name
    case.write(path)
    if case.good is not None:
        assert load_config(path).TRAIN.seed == case.good
        return
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_config(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and re.search(case.message, text), text
    assert not (tmp_path / "MARKER").exists()
