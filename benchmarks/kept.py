"""Finished cases as lines of a file, so that a benchmark that is begun again does the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
"""Where benchmarks keep them."""


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def add(path: Path, record: dict[str, Any]) -> None:
    """One more, at the file's end."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
