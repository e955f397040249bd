"""Processes that form a gloo group and run one case after another."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from dr2dist.launching.launcher import free_port
from tests.forked import CONTEXT

STACKS = 0.9
"""The part of its time after which a rank that still runs a case prints its threads' stacks."""


def wait_for(what: Callable[[], bool], name: str, seconds: float = 300) -> None:
    """Until something is there, on a busy machine too; fails with its name if it never is."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"{name} is not there after {seconds} s"
        time.sleep(0.01)


def start_rank(
    rank: int, ranks: int, port: int, output: Path, function: Callable[..., None], *arguments: Any
) -> ForkServerProcess:
    """Calls a module's function in a process that is a rank; what it prints goes to a file."""
    process = CONTEXT.Process(target=_enter, args=(rank, ranks, port, output, function, arguments))
    process.start()
    return process


def _enter(
    rank: int, ranks: int, port: int, output: Path, function: Callable[..., None], arguments: Any
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    # A rank starts its loaders' workers as one under the launcher does.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)  # as the variable says to processes that a rank starts
    function(*arguments)


class Pool:
    """`ranks` processes, each a rank of one process group; started anew after a failure."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._start()

    def _start(self) -> None:
        ranks = self._ranks
        self._folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self._folder.name) / f"rank{rank}.txt" for rank in range(ranks)]
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank, output in enumerate(self.outputs):
            here, there = CONTEXT.Pipe()
            self._processes.append(start_rank(rank, ranks, port, output, _serve, there))
            there.close()  # so that a rank's end is noticed
            self._pipes.append(here)

    def run(self, case: str, timeout: float = 240, **arguments: Any) -> list[Any]:
        """Calls `module:function` in every rank; their results by rank.

        Fails with every rank's output if one raises or the time is over.
        """
        for pipe in self._pipes:
            pipe.send((case, arguments, timeout))
        end = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            answered = wait(pending, max(0.0, end - time.monotonic()))
            if not answered:
                ranks = ", ".join(str(self._pipes.index(pipe)) for pipe in pending)
                self._fail(f"ranks {ranks} gave no answer in {timeout} s")
            for pipe in answered:  # in any order: a rank that failed has others wait for it
                rank = self._pipes.index(pipe)
                results[rank] = self._answer(rank)
        return [results[rank] for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> Any:
        try:
            ok, value = self._pipes[rank].recv()
        except EOFError:
            self._fail(f"rank {rank} ended")
        if not ok:
            self._fail(f"rank {rank} raised\n{value}")
        return value

    def _fail(self, reason: str) -> NoReturn:
        texts = [f"--- rank {n}\n{path.read_text()}" for n, path in enumerate(self.outputs)]
        self.close()
        self._start()
        raise AssertionError("\n".join([reason, *texts]))

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    from dr2dist.parallel.processes import init_distributed

    init_distributed()
    gc.freeze()  # DeepSpeed's engines collect garbage, which takes half a second of all imports
    shared = set(dist.distributed_c10d._world.pg_map)
    while True:
        try:
            case, arguments, timeout = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)  # whatever ran before
        module, _, function = case.partition(":")
        faulthandler.dump_traceback_later(STACKS * timeout)
        try:
            result = getattr(importlib.import_module(module), function)(**arguments)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        _end_groups(shared)


def _end_groups(shared: Collection[Any]) -> None:
    """Ends the groups that a case has made, but for those that DeepSpeed goes on to use.

    Threads of gloo's wake up a hundred times a second for each group.
    """
    used = tree_leaves(list(vars(deepspeed.utils.groups).values()))
    for group in set(dist.distributed_c10d._world.pg_map) - shared:
        if not any(group is other for other in used):
            dist.destroy_process_group(group)
