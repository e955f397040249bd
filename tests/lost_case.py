"""One rank of a group that exchanges numbers until one of them does not."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.parallel import heartbeat
from dr2dist.parallel.heartbeat import Heartbeat


def exchange(fault: str, who: int) -> None:
    """fault: what befalls rank `who` after a second: the name of a signal, `error` or `mistake`."""
    dist.init_process_group("gloo")
    with Heartbeat(silence=4.0):
        end = time.monotonic() + 1
        while True:
            dist.all_reduce(torch.ones(1))
            if time.monotonic() > end and dist.get_rank() == who:
                if fault == "error":
                    raise ValueError("the disk is full")
                if fault == "mistake":
                    raise UserError("no such class")
                os.kill(os.getpid(), signal.Signals[fault])


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
