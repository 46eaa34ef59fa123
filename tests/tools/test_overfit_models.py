"""Every registered model, an encoder of timm and EoMT overfit one scene: `make overfit`, an hour.

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


def pair(encoder, decoder):
    opts = [*("MODEL.arch_encoder", encoder, "MODEL.arch_decoder", decoder)]
    if encoder in ENCODERS.names():
        opts += ["MODEL.fc_dim", ENCODERS.get(encoder).channels[-1]]
    return [*opts, *("MODEL.weights_encoder", "none", "MODEL.weights_decoder", "none")]


MODELS = {f"{encoder} + {decoder}": pair(encoder, decoder) for encoder, decoder in every_model()}
MODELS["timm:tf_efficientnet_lite0 + unet"] = pair("timm:tf_efficientnet_lite0", "unet")
MODELS["eomt:vit_small_patch16_dinov3"] = [
    *("MODEL.arch", "eomt:vit_small_patch16_dinov3"),
    *("MODEL.weights_encoder", "none", "MODEL.weights_decoder", "none"),
]


def file_of(name):
    return OUT / f"{name.replace(' ', '').replace(':', '-')}.npz"


def load(name):
    """What an earlier run found of a model."""
    try:
        with np.load(file_of(name)) as stored:
            figures = json.loads(str(stored["figures"]))
            arrays = [stored[key] for key in ("image", "truth", "prediction")]
    except FileNotFoundError:
        return None
    return Overfit(**figures, sample=Sample(figures["name"], *arrays))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return streets.write(tmp_path_factory.mktemp("scene"), 1, 1, size=(240, 320))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_learns_one_image(name, scene):
    found = load(name)
    if found is None or found.accuracy < TARGET:
        opts = [
            *MODELS[name],
            *("DATASET.root_dataset", str(scene), "DATASET.num_class", len(streets.CLASSES)),
            *("DATASET.list_train", str(scene / "training.odgt")),
            *("DATASET.classes", str(scene / "classes.csv")),
        ]
        options = load_config(None, opts)
        found = overfit(options, torch.device("cpu"), name=name, progress=False)
        OUT.mkdir(parents=True, exist_ok=True)
        sample, figures = found.sample, json.dumps(found.figures())
        arrays = {key: getattr(sample, key) for key in ("image", "truth", "prediction")}
        np.savez_compressed(file_of(name), figures=figures, **arrays)
    print(table([found]).splitlines()[4])  # the row of the page
    assert found.accuracy >= TARGET


def test_the_page_is_written():
    found = [one for one in map(load, MODELS) if one is not None]
    assert len(found) == len(MODELS), "some models have not been run"
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
