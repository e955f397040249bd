"""Checkpoints' manifests, changed as an earlier version would have written them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def change(checkpoint: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a checkpoint says of itself, in format 1, which has no checksum of it."""
    path = checkpoint / "checkpoint.json"
    state = json.loads(path.read_text())
    state.pop("checksum", None)
    state["format"] = 1
    how(state)
    path.write_text(json.dumps(state))
