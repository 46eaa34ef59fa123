"""The tables of settings in docs/settings.md are those of the code.

Run as a script, this writes them anew.
"""

import re
from pathlib import Path

import pytest

from mit_semseg.config.listing import table
from mit_semseg.config.options import SECTIONS, SETTINGS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
TABLES = {"DIR": "", **{section: section for section in SECTIONS}}


def between(mark):
    """What stands in the page between a mark and the next end."""
    return re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("mark", TABLES)
def test_a_table_is_what_the_code_says(mark):
    found = between(mark).search(PAGE.read_text("utf-8"))
    assert found and found[0].strip() == table(TABLES[mark])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_key_has_a_meaning_and_takes_its_default(name):
    setting = SETTINGS[name]
    assert len(setting.doc) >= 5
    assert setting.read(setting.default) == setting.default


def rewrite():
    text = PAGE.read_text("utf-8")
    for mark, section in TABLES.items():
        text = between(mark).sub(lambda _: f"\n{table(section)}\n\n", text)  # noqa: B023
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    rewrite()
