"""Weight files of the corpus: refused in one line, and none of them runs code."""

import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from corpus import weight_files
from torch import nn

from mit_semseg.weights import check_archive, load_into, read_state_dict


class Net(nn.Module):
    """Two layers, their names as anywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3)
        self.bn = nn.BatchNorm2d(16)


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "good" / "encoder_best.pth"
    path.parent.mkdir()
    torch.save(Net().state_dict(), path)
    return path


def test_foreign_and_damaged_files(tmp_path, whole):
    marker = tmp_path / "marker"
    for fault, (path, message) in weight_files(whole, tmp_path, marker).items():
        module = Net()
        with pytest.raises(ValueError) as caught:
            load_into(module, path, what="encoder")
        text = str(caught.value)
        assert str(path) in text and "\n" not in text and len(text) < 500, (fault, text)
        assert re.search(message, text), (fault, text)
        assert not marker.exists(), fault
        expected = Net().state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in module.state_dict().items()), fault


def test_undamaged_files_pass(tmp_path, whole):
    check_archive(whole)
    old = tmp_path / "old.pth"
    torch.save(Net().state_dict(), old, _use_new_zipfile_serialization=False)
    check_archive(old)
    assert set(read_state_dict(old)) == set(read_state_dict(whole))
    # An old file may hold what ends a zip archive.
    torch.save(
        {"t": torch.tensor([*b"PK\5\6" + bytes(18)], dtype=torch.uint8)},
        old,
        _use_new_zipfile_serialization=False,
    )
    check_archive(old)
    with pytest.raises(FileNotFoundError):
        check_archive(tmp_path / "gone.pth")


def regions(path):
    """Where the kinds of bytes of an archive of `torch.save` are: kind -> (start, end)."""
    content = path.read_bytes()

    def data(record):
        name, extra = struct.unpack_from("<HH", content, record.header_offset + 26)
        start = record.header_offset + 30 + name + extra
        return start, start + record.file_size

    with zipfile.ZipFile(path) as archive:
        biggest = max(archive.infolist(), key=lambda record: record.file_size)
        pickled = next(r for r in archive.infolist() if r.filename.endswith("data.pkl"))
        entry = content.index(b"PK\1\2", archive.start_dir + 1)
        while not content[entry + 46 :].startswith(biggest.filename.encode()):
            entry = content.index(b"PK\1\2", entry + 1)
        ends = content.index(b"PK\6\6")  # of 64 bits, their locator, and the old one
        return {
            "local header": (pickled.header_offset, data(pickled)[0]),
            "later header": (biggest.header_offset, data(biggest)[0]),
            "pickle": data(pickled),
            "tensor": data(biggest),
            "directory": (archive.start_dir, ends),
            "its entry of a tensor": (entry, entry + 46),
            "ends": (ends, len(content)),
            "anywhere": (0, len(content)),
        }


def test_every_kind_of_byte_may_be_flipped(tmp_path, whole):
    """Either the file is refused, or the very same tensors come out of it."""
    content = whole.read_bytes()
    expected = read_state_dict(whole)
    rng = np.random.default_rng(5)
    path = tmp_path / "flipped.pth"
    refused = {}
    for kind, (start, end) in regions(whole).items():
        every = kind in ("its entry of a tensor", "ends")
        bits = np.arange(8 * start, 8 * end)
        refused[kind] = 0
        for bit in (bits if every else rng.choice(bits, 60)).tolist():
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                found = read_state_dict(path)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error), (kind, bit)
                refused[kind] += 1
                continue
            assert found.keys() == expected.keys(), (kind, bit)
            assert all(torch.equal(found[key], expected[key]) for key in expected), (kind, bit)
    assert refused["tensor"] == refused["pickle"] == 60, refused
    assert all(refused.values()), refused


def test_cut_anywhere(tmp_path, whole):
    content = whole.read_bytes()
    path = tmp_path / "cut.pth"
    for length in np.random.default_rng(6).integers(0, len(content), 60).tolist():
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            read_state_dict(path)
