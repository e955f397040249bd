"""Inference on several ranks: each takes its part of the samples, and all know the whole."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.launching.launcher import LocalLauncher, own_launcher, ranks_here, watched
from dr2dist.launching.place import several, take_place
from dr2dist.launching.supervise import Signals, supervise
from dr2dist.parallel.agreement import AgreedError, agree, from_all
from dr2dist.status import Status

Value = TypeVar("Value")

GRACE = 5.0
"""Seconds that ranks have to end when they are told to: nothing is lost."""
CUT = "stopped before the end"
"""Said of ranks that were told to stop."""
PERIOD = 1.0
"""Seconds between two looks at the process that has started this one."""


def on_ranks(
    arguments: Sequence[str],
    ranks: int | None,
    find: Callable[[], Value],
    tell: Callable[[Value], None],
) -> int:
    """Finds something as one of several ranks, or alone, and tells it on the first; exit status.

    arguments: of the command, which is started as so many ranks of this machine if that is more
    than one. Raises UserError if something else has started it as one of several.
    """
    own = own_launcher()
    if ranks is not None and own is None:
        place = several()
        if place is not None:
            raise UserError(f"--ranks: this process is one of {place.ranks} ranks already")
        if ranks > 1:
            line = [sys.executable, "-m", "dr2dist.cli", *arguments]
            places = watched(ranks_here(ranks))
            with Signals() as signals:
                return supervise(LocalLauncher(), line, places, signals, GRACE, CUT)
    with _as_rank(own) as rank:
        found = find()
    if not rank:
        tell(found)
    return 0


@contextlib.contextmanager
def _as_rank(launcher: int | None) -> Iterator[int]:
    """Within it this process is in a group with the other ranks, if it was started as one of
    several; its number, 0 of a single one. What all ranks raise, rank 0 alone tells.

    launcher: the process with which this one ends, if there is one.
    """
    place = several()
    if place is None:
        yield 0
        return
    from dr2dist.parallel.heartbeat import Heartbeat  # with DeepSpeed, which one process needs not
    from dr2dist.parallel.processes import init_distributed, share_cores

    take_place(place)
    if launcher is not None:
        threading.Thread(target=_end_after, args=(launcher,), daemon=True).start()
    share_cores()
    init_distributed()
    try:
        with Heartbeat(agreed=(AgreedError,)):
            yield place.rank
    except AgreedError:
        if place.rank:
            raise SystemExit(Status.USER_ERROR) from None
        raise
    finally:
        dist.destroy_process_group()


def _end_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(PERIOD)
    os._exit(Status.STOPPED)


def together() -> contextlib.AbstractContextManager[None]:
    """`agree` where there are several ranks."""
    return agree() if dist.is_initialized() else contextlib.nullcontext()


def own_part() -> tuple[int, int]:
    """(rank, ranks) of this process; (0, 1) of a single one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value: Value) -> list[Value]:
    """`from_all` where there are several ranks."""
    return from_all(value) if dist.is_initialized() else [value]
