"""Configuration of a run: schema, YAML loading, presets, checks. Imports no other room."""

from .checks import check_config, check_inputs
from .errors import ConfigError
from .loading import Resolved, load_config, resolve_config
from .schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "Resolved",
    "check_config",
    "check_inputs",
    "load_config",
    "resolve_config",
]
