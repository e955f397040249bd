"""What takes seconds to import: when it is first asked for, or not at all."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562). homes: modules, each with names that live there.

    Torch and timm take seconds to import, which the command line's help and refusals need not wait.
    """
    modules = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(modules[name]), name)

    return find


@contextlib.contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Packages that count as not installed within it, unless they are imported already.

    For those that others import unasked, and do without where they are not there.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
