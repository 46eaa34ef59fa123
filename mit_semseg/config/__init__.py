"""Reading, checking and writing configurations."""

from mit_semseg.config.loading import cfg, dump_config, get_defaults, load_config

__all__ = ["cfg", "dump_config", "get_defaults", "load_config"]
