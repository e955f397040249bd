"""The files of a run's folder that people and programs read, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dr2dist.errors import UserError, one_line

CONFIG = "config.yaml"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
LOGS = "logs"
STARTS = "starts.jsonl"
"""A line for each start of the run, also to go on: after which step, of how many, ranks,
samples of a step, host and time."""


def read_summary(folder: Path) -> dict[str, Any] | None:
    """How a run has ended, None where no file says so that is whole: it has status and steps."""
    try:
        found = json.loads((folder / SUMMARY).read_text("utf-8"))
        whole = isinstance(found["status"], str) and isinstance(found["steps"], int)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines with a step each, none of a file that is not there; the
    last, which may be cut off, is left out if it does not end.

    Raises UserError for a line that is none of a run's.
    """
    try:
        lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
            found[-1]["step"] + 0
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: line {number} is damaged: found '{line[:40]}'; delete that line to go on"
            ) from None
    return found
