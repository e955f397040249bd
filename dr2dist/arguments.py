"""Types of the command line's arguments."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def path(text: str) -> Path:
    """A path; `~` at its beginning is the home folder, which shells leave in `--key=~/file`."""
    return Path(os.path.expanduser(text))


def positive(text: str) -> int:
    """A whole number that is 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', allowed is a whole number from 1 on")
    return value
