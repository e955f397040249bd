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


class Commands:
    """A choice of commands that a parser is given."""

    def __init__(self, parser: argparse.ArgumentParser, what: str) -> None:
        self._choice = parser.add_subparsers(required=True, metavar=what)

    def add(self, name: str, text: str, example: str) -> argparse.ArgumentParser:
        """A command's own parser."""
        return self._choice.add_parser(
            name, help=text, description=text, epilog=f"example: {example}"
        )
