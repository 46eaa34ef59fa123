"""What other people's code and files rely on: names, architectures, keys.

Those of the published toolkit, with their signatures, are in `compat/test_compat_names.py`.

`api_surface.json` lists them; a name that disappears fails here. After adding some (or taking one
away on purpose, with a line in the changelog) write the list anew:

    PYTHONPATH=. python tests/test_api_surface.py
"""

import importlib
import inspect
import json
from pathlib import Path

import pytest

from mit_semseg.config import get_defaults
from mit_semseg.config.node import keys
from mit_semseg.dataset import FORMATS
from mit_semseg.losses import LOSSES
from mit_semseg.models import DECODERS, ENCODERS

FILE = Path(__file__).with_name("api_surface.json")
REGISTRIES = {"encoders": ENCODERS, "decoders": DECODERS, "losses": LOSSES, "formats": FORMATS}

# What is to be imported from where, None standing for a module's `__all__`; the rest may move.
PUBLIC = {
    "mit_semseg": None,
    "mit_semseg.config": None,
    "mit_semseg.dataset": None,
    "mit_semseg.download": ("DownloadError", "fetch"),
    "mit_semseg.engine.checkpoint": ("CheckpointFolder", "load_model"),
    "mit_semseg.engine.evaluate": ("evaluate",),
    "mit_semseg.engine.launch": ("read_config", "resolve_devices"),
    "mit_semseg.engine.predict": ("predict",),
    "mit_semseg.engine.predictor": ("Predictor",),
    "mit_semseg.engine.train": ("train",),
    "mit_semseg.models.activation_checkpointing": ("checkpoint_activations",),
    "mit_semseg.dataset.transforms": ("Normalize",),
    "mit_semseg.lib.nn": None,
    "mit_semseg.lib.utils": None,
    "mit_semseg.losses": None,
    "mit_semseg.losses.functional": ("dice", "focal", "lovasz", "nll", "ohem"),
    "mit_semseg.metrics": None,
    "mit_semseg.models": None,
    "mit_semseg.registry": ("Registry",),
    "mit_semseg.scores": ("class_map", "probabilities", "probability_bands"),
    "mit_semseg.segmenter": ("Result", "Segmenter"),
    "mit_semseg.utils": None,
    "mit_semseg.visualize": None,
    "mit_semseg.weights": (
        "LoadReport",
        "WeightSource",
        "imagenet_weights",
        "load_decoder",
        "load_encoder",
        "load_into",
        "published_checkpoint",
        "read_state_dict",
        "resolve",
    ),
}


def surface():
    """What there is today, in the layout of `api_surface.json`."""
    return {
        "modules": {module: sorted(public_names(module)) for module in PUBLIC},
        "registries": {kind: registry.names() for kind, registry in REGISTRIES.items()},
        "config": keys(get_defaults()),
    }


def public_names(module):
    """The names of a public module; classes with their methods and fields, not torch's."""
    namespace = importlib.import_module(module)
    for name in PUBLIC[module] or namespace.__all__:
        if not hasattr(namespace, name):
            continue
        yield name
        value = getattr(namespace, name)
        if inspect.isclass(value):
            own = [base for base in value.__mro__ if base.__module__.startswith("mit_semseg")]
            parts = {part for base in own for part in (*vars(base), *_annotations(base))}
            yield from (f"{name}.{part}" for part in parts if not part.startswith("_"))


def _annotations(cls):
    # Fields without a default are no attributes of the class.
    return inspect.get_annotations(cls)


def recorded():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", PUBLIC)
def test_no_public_name_disappears(module):
    lost = set(recorded()["modules"][module]) - set(public_names(module))
    assert not lost


def test_no_public_module_is_unrecorded():
    assert set(recorded()["modules"]) == set(PUBLIC)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_no_registered_name_disappears(kind):
    registry = REGISTRIES[kind]
    assert set(recorded()["registries"][kind]) <= set(registry.names())


def test_no_configuration_key_disappears():
    assert set(recorded()["config"]) <= set(keys(get_defaults()))


def test_all_names_only_what_exists():
    """`from mit_semseg.x import *` works, and no name is listed twice."""
    for module in PUBLIC:
        namespace = importlib.import_module(module)
        listed = getattr(namespace, "__all__", [])
        assert len(set(listed)) == len(listed), module
        assert not [name for name in listed if not hasattr(namespace, name)], module


if __name__ == "__main__":
    FILE.write_text(json.dumps(surface(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
