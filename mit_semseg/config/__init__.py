"""Settings: typed sections, read from YAML files and the command line."""

from mit_semseg.config.data import DataOptions
from mit_semseg.config.inference import EvalOptions, InferenceOptions, PredictOptions
from mit_semseg.config.loading import cfg, dump_config, get_defaults, load_config, load_options
from mit_semseg.config.model import ModelOptions
from mit_semseg.config.options import Options
from mit_semseg.config.train import TrainOptions

__all__ = [
    "DataOptions",
    "EvalOptions",
    "InferenceOptions",
    "ModelOptions",
    "Options",
    "PredictOptions",
    "TrainOptions",
    "cfg",
    "dump_config",
    "get_defaults",
    "load_config",
    "load_options",
]
