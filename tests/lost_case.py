"""One rank of a group that exchanges numbers until one of them does not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.parallel import heartbeat
from dr2dist.parallel.heartbeat import Heartbeat
from dr2dist.status import lives
from tests.pool import wait_for


def exchange(fault: str, who: int) -> None:
    """fault: what befalls rank `who` after a second: the name of a signal, or what it raises. Of a
    `mistake while the other one is stopped` the other one hears after six seconds."""
    dist.init_process_group("gloo")
    store = _told_processes()
    with Heartbeat(silence=4.0):
        end = time.monotonic() + 1
        while True:
            dist.all_reduce(torch.ones(1))
            if time.monotonic() > end and dist.get_rank() == who:
                if fault == "error":
                    raise ValueError("the disk is full")
                if fault == "connection":
                    raise ConnectionResetError("the bucket is gone")
                if fault == "mistake while the other one is stopped":
                    other = int(store.get(f"process/{1 - who}"))
                    os.kill(other, signal.SIGSTOP)
                    subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {other}"])
                if fault.startswith("mistake"):
                    raise UserError("no such class")
                os.kill(os.getpid(), signal.Signals[fault])


def end_before_the_watch(fault: str, who: int) -> None:
    """The same where the others have not come to the watch yet."""
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == who:
        os.kill(os.getpid(), signal.Signals[fault])
    time.sleep(1)
    with Heartbeat(silence=4.0):
        dist.barrier()


def end_during_a_look(fault: str, who: int) -> None:
    """The same where rank `who` ends between two of the things that another one looks at."""

    def neighbours(self: Any) -> dict[int, int]:
        here = found(self)
        if dist.get_rank() != who and who in here:
            wait_for(lambda: not lives(here[who]), "the end of the rank")
        return here

    found = Heartbeat._neighbours
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heartbeat, "_neighbours", neighbours)
        patch.setattr(heartbeat, "PERIOD", 0.5)  # looks before there is anything to be seen
        exchange(fault, who)


def _told_processes() -> dist.Store:
    """A store in which each rank has told its process."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    store.set(f"process/{dist.get_rank()}", str(os.getpid()))
    return store


def messages_of_looks(looks: int) -> float:
    """What a rank asks the store each time it looks after the others, once all are there."""
    asked = [0]
    ask = heartbeat._Board._ask

    def counted(self: Any, question: Any) -> Any:
        asked[0] += 1
        return ask(self, question)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat._Board, "_ask", counted)
        patch.setattr(heartbeat, "PERIOD", 1000.0)  # none but those that are counted
        with Heartbeat() as watch:
            dist.barrier()  # all have told where they are
            watch._look(1)
            before = asked[0]
            for count in range(looks):
                assert watch._look(count + 2) is None
            found = (asked[0] - before) / looks
            dist.barrier()
    return found
