"""Types of the command line's arguments."""

from __future__ import annotations

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """A path; `~` at its beginning is the home folder, which shells leave in `--key=~/file`."""
    return Path(text).expanduser()


def shards(text: str) -> str:
    """A folder of shards or a brace pattern, as `path`."""
    return str(Path(text).expanduser())


def positive(text: str) -> int:
    """A whole number that is 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', allowed is a whole number from 1 on")
    return value
