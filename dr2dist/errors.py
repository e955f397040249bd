"""The one exception for what a user did: a setting, a file or a call that cannot work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What a user did that cannot work: a setting, a file or a call.

    The message is one line: where, what was found, and what is allowed. The command line prints it
    and exits with status 2.
    """


class PlaceError(UserError):
    """A folder, a limit or a setting that data need: no other sample helps."""


def one_line(error: object) -> str:
    """The text of an error of others, which may have several lines."""
    return " ".join(str(error).split())


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt `name`: `; did you mean 'x'?`, or nothing when no name is close."""
    known = list(allowed)
    # The beginning of a longer name, or one that is nearly the same.
    close = sorted((each for each in known if name and each.startswith(name)), key=len)[:1]
    close = close or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
