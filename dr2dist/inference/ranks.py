"""Inference on several ranks: each takes its part of the samples, and all know the whole."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.launching.launcher import LAUNCHER, LocalLauncher, ranks_here, watched
from dr2dist.launching.place import several, take_place
from dr2dist.launching.supervise import Signals, supervise
from dr2dist.parallel.agreement import AgreedError, agree
from dr2dist.status import Status

GRACE = 5.0
"""Seconds that ranks have to end when they are told to: nothing is lost."""
PERIOD = 1.0
"""Seconds between two looks at the process that has started this one."""


def to_start(ranks: int | None) -> bool:
    """Whether this process is to start that many, and is none of them.

    Raises UserError if something else has started it as one of several.
    """
    place = None if LAUNCHER in os.environ else several()
    if ranks is not None and place is not None:
        raise UserError(f"--ranks: this process is one of {place.ranks} ranks already")
    return ranks is not None and ranks > 1 and LAUNCHER not in os.environ


def start_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Runs `dr2dist ARGUMENTS` as so many ranks of this machine; its exit status."""
    line = [sys.executable, "-m", "dr2dist.cli", *arguments]
    with Signals() as signals:
        return supervise(LocalLauncher(), line, watched(ranks_here(ranks)), signals, GRACE)


@contextlib.contextmanager
def as_rank() -> Iterator[int]:
    """Within it this process is in a group with the other ranks, if it was started as one of
    several; its number, 0 of a single one. What all ranks raise, rank 0 alone tells."""
    place = several()
    if place is None:
        yield 0
        return
    from dr2dist.parallel.heartbeat import Heartbeat  # with DeepSpeed, which one process needs not
    from dr2dist.parallel.processes import init_distributed, share_cores

    take_place(place)
    if LAUNCHER in os.environ:
        launcher = int(os.environ[LAUNCHER])
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
