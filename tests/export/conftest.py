"""Exported files of a tiny network."""

import pytest
from tiny_model import installed, tiny_model

from mit_semseg.engine.export import graph_of
from mit_semseg.export import FORMATS


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """`exported(kind, **options of graph_of)` -> a file of the tiny model."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def write(kind, **options):
        form = FORMATS[kind]
        installed(form)
        key = (kind, *options.items())
        if key not in made:
            path = folder / f"{len(made)}{form.suffix}"
            form.write(graph_of(model, **options), path)
            made[key] = path
        return made[key]

    return write
