"""One rank of a group that exchanges numbers until one of them does not."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from dr2dist.parallel.heartbeat import Heartbeat


def exchange(fault: str, who: int) -> None:
    """fault: what befalls rank `who` after a second: the name of a signal, or `error`."""
    dist.init_process_group("gloo")
    with Heartbeat(silence=4.0):
        end = time.monotonic() + 1
        while True:
            dist.all_reduce(torch.ones(1))
            if time.monotonic() > end and dist.get_rank() == who:
                if fault == "error":
                    raise ValueError("the disk is full")
                os.kill(os.getpid(), signal.Signals[fault])
