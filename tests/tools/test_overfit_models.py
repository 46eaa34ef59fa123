"""Every registered model overfits one rendered scene: `make overfit`, for an hour.

Results are kept in the folder `$OVERFIT_OUT`, where the next run finds them. Of all of them,
`docs/overfit` gets a table and the predictions.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from every_model import every_model

from mit_semseg.config import load_config
from mit_semseg.demo import streets
from mit_semseg.models import ENCODERS
from mit_semseg.tools.overfit import TARGET, Overfit, overfit, table
from mit_semseg.visualize.sheets import Sample, image_grid

OUT = Path(os.environ.get("OVERFIT_OUT", ""))
PAGE = Path(__file__).parents[2] / "docs" / "overfit"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.environ.get("OVERFIT_OUT"), reason="an hour: run make overfit"),
]


def load(encoder, decoder):
    """What an earlier run found of a model."""
    try:
        with np.load(OUT / f"{encoder}+{decoder}.npz") as stored:
            figures = json.loads(str(stored["figures"]))
            arrays = [stored[key] for key in ("image", "truth", "prediction")]
    except FileNotFoundError:
        return None
    return Overfit(**figures, sample=Sample(figures["name"], *arrays))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return streets.write(tmp_path_factory.mktemp("scene"), 1, 1, size=(240, 320))


@pytest.mark.parametrize(("encoder", "decoder"), every_model())
def test_the_model_learns_one_image(encoder, decoder, scene):
    found = load(encoder, decoder)
    if found is None or found.accuracy < TARGET:
        opts = [
            *("MODEL.arch_encoder", encoder, "MODEL.arch_decoder", decoder),
            *("MODEL.fc_dim", ENCODERS.get(encoder).channels[-1]),
            *("MODEL.weights_encoder", "none", "MODEL.weights_decoder", "none"),
            *("DATASET.root_dataset", str(scene), "DATASET.num_class", len(streets.CLASSES)),
            *("DATASET.list_train", str(scene / "training.odgt")),
            *("DATASET.classes", str(scene / "classes.csv")),
        ]
        found = overfit(load_config(None, opts), torch.device("cpu"), progress=False)
        OUT.mkdir(parents=True, exist_ok=True)
        sample, figures = found.sample, json.dumps(found.figures())
        arrays = {key: getattr(sample, key) for key in ("image", "truth", "prediction")}
        np.savez_compressed(OUT / f"{encoder}+{decoder}.npz", figures=figures, **arrays)
    print(table([found]).splitlines()[4])  # the row of the page
    assert found.accuracy >= TARGET


def test_the_page_is_written():
    every = [load(*pair) for pair in every_model()]
    found = [one for one in every if one is not None]
    assert len(found) == len(every), "some models have not been run"
    names = [name for name, _ in streets.CLASSES]
    colors = np.array([color for _, color in streets.CLASSES])
    first = found[0].sample
    tiles = [("image\n", first.image), ("truth\n", first.truth)]
    for one in found:
        label = one.name.replace(" + ", "\n+ ") + f", {100 * one.accuracy:.1f} %"
        tiles.append((label, one.sample.prediction))
    title, file = "Overfitting one image", PAGE / "overfit.png"
    PAGE.mkdir(exist_ok=True)
    (PAGE / "overfit.md").write_text(table(found), "utf-8")
    image_grid(tiles, file, title=title, columns=6, names=names, colors=colors)
