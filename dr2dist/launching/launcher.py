"""What starts the ranks of a run, tells of their ends and ends them: here on this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol

from dr2dist.launching.place import FIRST_PORT, PORTS, Place
from dr2dist.status import held_back

LAUNCHER = "DR2DIST_LAUNCHER"
"""The variable that tells a rank the process that watches over it."""


class Launcher(Protocol):
    """The ranks of one run, by place: all of them, or what stands for them on this machine."""

    def start(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Starts the command once for each environment, which is put over this process's own."""

    def statuses(self) -> list[int | None]:
        """Of each, its exit status, or minus the signal that ended it; None while it runs."""

    def send(self, number: int) -> None:
        """Sends a signal to those that run."""

    def kill(self) -> None:
        """Ends those that run, with all that they have started, and nothing else."""


class LocalLauncher:
    """Processes of this machine, each the leader of a session of its own.

    So a terminal's signals reach the command alone, which sends them on, and a rank can be ended
    with all its data workers by its process group. Signals to stop are held back until the process
    takes them: see `dr2dist.status.take_signals`.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        stdout: int | None = None,
    ) -> None:
        """See Launcher. stdout: a descriptor, this process's own by default."""
        with held_back():
            for environment in environments:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **environment},
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        start_new_session=True,
                    )
                )

    def statuses(self) -> list[int | None]:
        """See Launcher. What an ended process has left running is ended."""
        return [self._status(process) for process in self._processes]

    def send(self, number: int) -> None:
        """See Launcher."""
        for process in self._processes:
            process.send_signal(number)

    def kill(self) -> None:
        """See Launcher."""
        for process in self._processes:
            if process.returncode is None:
                _kill_group(process.pid)

    def _status(self, process: subprocess.Popen[bytes]) -> int | None:
        if process.returncode is None:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, process.pid, options) is None:
                return None
            _kill_group(process.pid)  # before it is waited for: its number is nobody else's yet
            process.wait()
        return process.returncode


def free_port() -> int:
    """A port of this machine that nothing has, and that the system gives to nobody: it is seconds
    until rank 0 listens there. If all that were tried are taken, one that the system gives."""
    ports = secrets.SystemRandom().sample(range(FIRST_PORT, FIRST_PORT + PORTS), 100)
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def watched(environments: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The variables of ranks that this process starts itself: they end if it does."""
    return [{**each, LAUNCHER: str(os.getpid())} for each in environments]


def own_launcher() -> int | None:
    """The process that watches over this one; None where none does."""
    found = os.environ.get(LAUNCHER)
    return None if found is None else int(found)


def ranks_here(ranks: int) -> list[dict[str, str]]:
    """The variables of each rank of a run that is on this machine alone."""
    port, job = free_port(), new_job()
    places = [Place(rank, ranks, rank, ranks, "127.0.0.1", port, job) for rank in range(ranks)]
    return [place.variables() for place in places]


def new_job() -> str:
    """A word that no other start has."""
    return secrets.token_hex(8)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
