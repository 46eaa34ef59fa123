"""docs/data.md says what the data sets themselves say."""

import re
from pathlib import Path

import pytest

from mit_semseg.config import load_config
from mit_semseg.dataset import FORMATS
from mit_semseg.dataset.downloads import sources

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = {
    match[1]: [cell.strip() for cell in match[0].split("|")[1:-1]]
    for match in re.finditer(r"^\| `(\w+)` \|.*$", PAGE.split("## Use a public")[0], re.MULTILINE)
}


def test_every_data_set_has_a_row_and_every_row_a_data_set():
    assert sorted(ROWS) == sorted(FORMATS.names())


@pytest.mark.parametrize("name", sorted(sources()))
def test_rows_say_what_the_files_say(name):
    source = sources()[name]
    _, _, num_class, _, size, layout, licence = ROWS[name]
    assert num_class.split(",")[0] == str(FORMATS.get(name)().num_class)
    assert layout == f"`{source.layout}`"
    assert licence == source.licence
    stated = re.search(r"\(([\d.]+ GB)\)", source.title)
    assert size.split(", ")[0] == (stated[1] if stated else "by hand")
    assert size.endswith("by hand") == (not any(archive.urls for archive in source.archives))


def test_files_and_keys_on_the_page_exist():
    cfg = load_config(None, [])
    keys = set(re.findall(r"\b((?:DATASET|MODEL|TRAIN)\.\w+)", PAGE))
    assert len(keys) > 15
    for key in keys:
        section, name = key.split(".")
        assert name in cfg[section], key
    for path in re.findall(r"config/[\w-]+\.yaml", PAGE):
        assert (ROOT / path).is_file(), path
