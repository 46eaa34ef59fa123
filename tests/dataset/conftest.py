"""Small generated images and masks, and where real data lie."""

import os
from pathlib import Path

import pytest
from dataset_files import ROOT, Samples


@pytest.fixture
def samples(tmp_path):
    """Writes images and masks into the folder of the test."""
    return Samples(tmp_path)


@pytest.fixture
def real_data():
    """The folder of real samples; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("SEMSEG_DATA", ROOT / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real samples at {folder}; set SEMSEG_DATA")
    return folder.resolve()
