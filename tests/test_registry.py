"""The registry: one name, one builder; a wrong name is answered with the right one."""

from __future__ import annotations

import pytest

from mit_semseg.registry import Registry, closest


@pytest.fixture
def colors() -> Registry:
    registry = Registry("color")

    @registry.register("red", "crimson")
    def red() -> str:
        return "#f00"

    @registry.register("blue")
    def blue() -> str:
        return "#00f"

    return registry


def test_entries_are_found_by_each_of_their_names(colors: Registry) -> None:
    assert colors.get("red") is colors.get("crimson")
    assert colors.get("red")() == "#f00"
    assert colors.get("blue")() == "#00f"
    assert colors.names() == ["blue", "crimson", "red"]
    assert "red" in colors
    assert "green" not in colors


def test_the_decorator_leaves_what_it_registers_alone() -> None:
    class Square:
        pass

    registry = Registry("shape")
    assert registry.register("square")(Square) is Square
    assert registry.get("square") is Square


def test_a_taken_name_is_refused_and_its_owner_stays(colors: Registry) -> None:
    owner = colors.get("red")
    with pytest.raises(ValueError, match=r"color 'red' is registered twice"):
        colors.register("red")(lambda: "#e00")
    assert colors.get("red") is owner


def test_registries_do_not_share_entries(colors: Registry) -> None:
    assert Registry("color").names() == []


def test_an_unknown_name_gets_the_nearest_and_the_list(colors: Registry) -> None:
    with pytest.raises(ValueError) as error:
        colors.get("crimsn")
    assert str(error.value) == (
        "unknown color 'crimsn'; did you mean 'crimson'? (known: blue, crimson, red)"
    )


def test_nothing_near_means_no_guess(colors: Registry) -> None:
    with pytest.raises(ValueError) as error:
        colors.get("xyzzy")
    assert str(error.value) == "unknown color 'xyzzy' (known: blue, crimson, red)"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet50_dilated", "; did you mean 'resnet50dilated'?"),
        ("hrnet", "; did you mean 'hrnetv2'?"),
        ("swin", ""),
    ],
)
def test_closest(name: str, hint: str) -> None:
    assert closest(name, ["resnet18dilated", "resnet50dilated", "hrnetv2"]) == hint
