"""What each rank says, in a file of its own."""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """While it is entered all that this process logs, from level INFO on, goes to a file too, and
    the stacks of its threads if it crashes. The file is appended to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter(FORMAT))
        logging.getLogger().addHandler(handler)
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            logging.getLogger().removeHandler(handler)
