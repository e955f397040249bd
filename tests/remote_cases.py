"""What ranks run in test_remote."""

from __future__ import annotations

import os
from typing import Any

from tests import cases


def run_config(path: str, environment: dict[str, str]) -> dict[str, Any]:
    """A whole run."""
    os.environ.update(environment)
    return cases.run_config(path, [])


def run_until(path: str, environment: dict[str, str], step: int) -> None:
    """A run that breaks off."""
    os.environ.update(environment)
    cases.run_until(path, [], step)
