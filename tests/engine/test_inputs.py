"""Finding images, and names of results that never collide."""

from pathlib import Path

import pytest
from PIL import Image

from mit_semseg.engine.inputs import find_images, output_stems, result_endings


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


@pytest.mark.parametrize(
    ("files", "endings", "expected"),
    [
        (["a.jpg", "b.png"], [".png"], ["a", "b"]),
        (["a.jpg", "a.png", "a.tif"], [".png"], ["a_jpg", "a_png", "a_tif"]),
        (["s/a.jpg", "t/a.jpg"], [".png"], ["s/a", "t/a"]),
        (["A.jpg", "a.jpg"], [".png"], ["A_jpg", "a_jpg_2"]),
        # `a.jpg` and its legend beside an image of that very name.
        (["a.jpg", "a_legend.jpg"], [".png", "_legend.png"], ["a", "a_legend_jpg"]),
        (["a_color.jpg", "a.jpg"], ["_color.png", "_index.png"], ["a_color", "a"]),
        (["a"], [".png"], ["a"]),
    ],
)
def test_output_names_never_collide(tmp_path, files, endings, expected):
    stems = output_stems([tmp_path / f for f in files], tmp_path, tmp_path / "out", endings)
    assert stems == [tmp_path / "out" / x for x in expected]
    results = {f"{stem}{end}".casefold() for stem in stems for end in endings}
    assert len(results) == len(stems) * len(endings)


def test_outputs_through_a_symlink_do_not_overwrite_inputs(tmp_path):
    image = photo(tmp_path / "in" / "a.png")
    (tmp_path / "out").symlink_to(tmp_path / "in")
    (stem,) = output_stems([image], tmp_path / "in", tmp_path / "out", [".png"])
    assert stem.name == "a_png"


def test_result_endings():
    assert result_endings(["side"]) == {"side": ".png"}
    assert result_endings(["prob"]) == {"prob": ".npy"}
    assert result_endings(["side", "legend"]) == {"side": ".png", "legend": "_legend.png"}
    assert result_endings(["color", "prob"]) == {"color": "_color.png", "prob": "_prob.npy"}


def test_find_images(tmp_path, monkeypatch):
    a, b = photo(tmp_path / "s" / "a.JPG"), photo(tmp_path / "s" / "t" / "b.tiff")
    odd = tmp_path / "s" / "c.data"
    odd.write_bytes(a.read_bytes())
    (tmp_path / "s" / ".hidden.png").write_bytes(a.read_bytes())
    assert find_images(tmp_path / "s") == ([a, b], tmp_path / "s")
    assert find_images(str(tmp_path / "s" / "**" / "*.*")) == ([a, b], tmp_path / "s")
    assert find_images(odd) == ([odd], tmp_path / "s"), "a file that is named is taken"
    assert find_images([a, b, a, tmp_path / "s"]) == ([a, b], tmp_path / "s")
    monkeypatch.chdir(tmp_path / "s")
    assert find_images("*.JPG") == ([Path("a.JPG")], tmp_path / "s")
    # A name with brackets is that file before it is a pattern.
    odd_name = photo(tmp_path / "s" / "u" / "img[1].png")
    assert find_images(odd_name)[0] == [odd_name]


def test_nothing_found_says_what_is_there(tmp_path):
    for k in range(12):
        (tmp_path / f"{k}.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"found 0 images; saw 12 \.txt"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg: no such file or folder"):
        find_images(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match=r"\*\.jpg: found 0 images; saw no files"):
        find_images(str(tmp_path / "*.jpg"))
