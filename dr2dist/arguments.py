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
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """A whole number that is 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        allowed = f"a whole number from {least} on"
        raise argparse.ArgumentTypeError(f"found '{text}', allowed is {allowed}")
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
