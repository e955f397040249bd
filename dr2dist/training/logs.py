"""What each rank says, in a file of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dr2dist.files import writing


@contextmanager
def logged_to(path: Path, rank: str) -> Iterator[None]:
    """While it is entered all that this process logs, from level INFO on, goes to a file too, with
    time, host and rank, and the stacks of its threads if it crashes. The file is appended to.

    Raises UserError if it cannot be. What it has no room for later is lost: a run ends by what it
    cannot go on without.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
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
        with contextlib.suppress(OSError):
            file.close()
