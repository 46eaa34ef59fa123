"""The registry: one name, one builder; a wrong name is answered with the right one."""

import pytest

from mit_semseg.registry import Registry, closest


@pytest.fixture
def colors():
    registry = Registry("color")

    @registry.register("red", "crimson")
    def red():
        return "#f00"

    @registry.register("blue")
    def blue():
        return "#00f"

    return registry


def test_entries_are_found_by_each_of_their_names(colors):
    assert colors.get("red") is colors.get("crimson")
    assert colors.get("red")() == "#f00"
    assert colors.get("blue")() == "#00f"
    assert colors.names() == ["blue", "crimson", "red"]
    assert "red" in colors
    assert "green" not in colors


def test_a_taken_name_is_refused_and_its_owner_stays(colors):
    owner = colors.get("red")
    with pytest.raises(ValueError, match=r"color 'red' is registered twice"):
        colors.register("red")(lambda: "#e00")
    assert colors.get("red") is owner


def test_an_unknown_name_gets_the_nearest_and_the_list(colors):
    for name, hint in (("crimsn", "; did you mean 'crimson'?"), ("xyzzy", "")):
        with pytest.raises(ValueError) as error:
            colors.get(name)
        assert str(error.value) == f"unknown color '{name}'{hint} (known: blue, crimson, red)"
    assert Registry("color").names() == []


def test_a_long_list_of_names_is_on_a_page():
    registry = Registry("color", "docs/colors.md")
    for name in ("red1", "red2", "red3", "red4", "blue"):
        registry.register(name)(dict)
    with pytest.raises(ValueError) as error:
        registry.get("red")
    hint = "; did you mean 'red4' or 'red3' or 'red2'? (all are in docs/colors.md)"
    assert str(error.value) == f"unknown color 'red'{hint}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet50_dilated", "; did you mean 'resnet50dilated'?"),
        ("hrnet", "; did you mean 'hrnetv2'?"),
        ("swin", ""),
    ],
)
def test_closest(name, hint):
    assert closest(name, ["resnet18dilated", "resnet50dilated", "hrnetv2"]) == hint
