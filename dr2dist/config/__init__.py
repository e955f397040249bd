"""Configuration: YAML to a typed object at the edge."""

from dr2dist.config.load import (
    describe_config,
    dump_config,
    import_plugins,
    load_config,
    moved_settings,
)
from dr2dist.config.schema import Config

__all__ = [
    "Config",
    "describe_config",
    "dump_config",
    "import_plugins",
    "load_config",
    "moved_settings",
]
