"""Configuration: YAML to a typed object at the edge."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: the schema needs torch, the text of a file does not."""
    if name not in __all__:
        raise AttributeError(f"module 'dr2dist.config' has no attribute '{name}'")
    home = "schema" if name == "Config" else "load"
    return getattr(importlib.import_module(f"dr2dist.config.{home}"), name)
