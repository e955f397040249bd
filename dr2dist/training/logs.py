"""What each rank says, in a file of its own."""

from __future__ import annotations

import faulthandler
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def logged_to(path: Path, rank: str) -> Iterator[None]:
    """While it is entered all that this process logs, from level INFO on, goes to a file too, with
    time, host and rank, and the stacks of its threads if it crashes. The file is appended to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        handler = logging.StreamHandler(file)
        line = f"%(asctime)s {socket.gethostname()} {rank} %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(line))
        logging.getLogger().addHandler(handler)
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            logging.getLogger().removeHandler(handler)
