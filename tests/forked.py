"""The command line and its ranks in processes that are forked, from one that has imported all.

Torch, timm and DeepSpeed take a command and each of its ranks some fifteen seconds of a processor
to import. What is forked is started, ended and waited for as any other process; what it shares with
the tests are modules alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.cases", "tests.stage_cases", "tests.lost_case", "tests.imported"]
)
FIRST, LAST = 3, 1024
"""Descriptors that a new program would not have."""


def start(
    command: Sequence[str], folder: Path, output: Path, variables: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A process that runs `dr2dist COMMAND`, the leader of a session; see `multiprocessing`.

    variables: beside this process's own, with one thread. output: a file that gets what it and its
    ranks say on stdout and, beside it, `.err` on stderr.
    """
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
    arguments = (list(command), folder, whole, output)
    process = CONTEXT.Process(target=_command, args=arguments)
    process.start()
    return process


def errors_of(output: Path) -> Path:
    """What a process with this output says on stderr."""
    return output.with_name(f"{output.name}.err")


def _command(command: list[str], folder: Path, variables: dict[str, str], output: Path) -> None:
    from dr2dist.launching import launcher

    launcher.subprocess = types.SimpleNamespace(  # type: ignore[attr-defined]
        Popen=Forked, DEVNULL=subprocess.DEVNULL
    )
    os.setsid()
    os.chdir(folder)
    for number, path in ((1, output), (2, errors_of(output))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _become(["-m", "dr2dist.cli", *command], variables)


class Forked:
    """As much of `subprocess.Popen` as the launcher needs: a copy of this process runs a module."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: int | None,
        start_new_session: bool,
    ) -> None:
        assert command[0] == sys.executable and stdin == subprocess.DEVNULL and start_new_session
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if stdout is not None:
                os.dup2(stdout, 1)
            _become(command[1:], env)

    def send_signal(self, number: int) -> None:
        """Unless it has ended and been waited for."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _become(line: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Makes of this process, as far as it can be, the program `python LINE`."""
    import torch

    assert line[0] == "-m", line
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.closerange(FIRST, LAST)
    vars(resource_tracker._resource_tracker).update(_fd=None, _pid=None)
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.set_forkserver_preload(["__main__"])
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    sys.argv = list(line[1:])
    sys.modules.pop(line[1], None)  # of which Python would warn
    runpy.run_module(line[1], run_name="__main__", alter_sys=True)
    os._exit(0)  # which modules that are programs do themselves
