"""Configuration: YAML to a typed object at the edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dr2dist.lazily import lazily

if TYPE_CHECKING:
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

# The schema needs torch, the text of a file does not.
__getattr__ = lazily(
    __name__,
    {
        "dr2dist.config.load": "describe_config dump_config import_plugins load_config "
        "moved_settings",
        "dr2dist.config.schema": "Config",
    },
)
