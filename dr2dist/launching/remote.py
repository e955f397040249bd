"""Ranks on several hosts, each reached by ssh; this machine's are started without."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dr2dist.errors import UserError
from dr2dist.launching.hosts import Host, is_here
from dr2dist.launching.launcher import new_job
from dr2dist.launching.node import ALIVE, SILENCE
from dr2dist.launching.place import Place
from dr2dist.status import Status, say

FORWARDED = (
    *("AWS_", "CUBLAS_", "CUDA_", "DEEPSPEED_", "FI_", "GLOO_", "HF_", "KMP_", "MKL_", "MLFLOW_"),
    *("NCCL_", "NVIDIA_", "OMP_", "PYTHON", "PYTORCH_", "TORCH_", "TRITON_", "UCX_", "WANDB_"),
)
"""How variables begin that other hosts get from here; and those of proxies."""
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
_SETTINGS = ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=5", "ServerAliveCountMax=3")
SSH = ["ssh", *(word for setting in _SETTINGS for word in ("-o", setting))]
"""It asks nothing, and ends when nothing has come for 15 seconds."""
BEGIN = (
    "import sys, json; sys.path[:0] = json.loads(sys.stdin.buffer.readline()); "
    "from dr2dist.launching.node import main; main()"
)
"""All that stands on a remote command line, beside the interpreter's path."""


def forwarded(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables that other hosts get from here. more: names of others. Raises UserError for one
    of them that is not set here."""
    for name in more:
        if name not in environment:
            raise UserError(f"launch.env: {name} is not set here")
    return {
        name: value
        for name, value in environment.items()
        if name in more or name.lower() in PROXIES or name.startswith(FORWARDED)
    }


class Link:
    """A conversation with a host's node. hello: what it said of itself, or None."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.hello: dict[str, Any] | None = None
        self.statuses: list[int | None] = [None] * host.slots
        self._errors: collections.deque[str] = collections.deque(maxlen=1)
        self.local = is_here(host)
        line = [sys.executable, "-c", BEGIN]
        if not self.local:
            line = [*SSH, "--", host.name, shlex.join(line)]
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self._process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's signals reach the command alone
        )
        self._reader = threading.Thread(target=self._read_words, daemon=True)
        self._reader.start()
        threading.Thread(target=self._read_errors, daemon=True).start()

    def say(self, message: Any) -> None:
        """A line to the node, if it still listens."""
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be heard: of a host that is frozen too."""
        silent = self.hello is not None and time.monotonic() - self._heard > SILENCE
        return silent or not self._reader.is_alive()

    def why(self) -> str:
        """The last line that came by stderr."""
        status = self._process.wait()
        return self._errors[-1] if self._errors else f"ssh ended with status {status}"

    def hang_up(self) -> None:
        """Lets the node end what it has."""
        with contextlib.suppress(OSError, ValueError), self._lock:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def close(self, end: float) -> None:
        """Ends the link when the node has, or at `end`, by time.monotonic."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, end - time.monotonic()))
        self._process.kill()
        self._process.wait()

    def _read_words(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard = time.monotonic()
            try:
                message = json.loads(line)
            except ValueError:
                continue  # what a login shell prints
            match message:
                case {"hello": found}:
                    self.hello = found
                case {"statuses": found}:
                    self.statuses = found
                case {"out": text}:
                    say(text.removesuffix("\n"), sys.stdout)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            if self.hello is None:
                if text:
                    self._errors.append(text)  # banners, and at last the reason of a refusal
            else:
                say(text)


class RemoteLauncher:
    """A run's ranks on hosts, in their order; a `Launcher` once `greet` has been called.

    module: what a rank runs. grace: see `supervise`. config: the whole configuration, to be said
    before ranks are started.
    """

    def __init__(self, hosts: Sequence[Host], module: str, grace: float) -> None:
        self._module, self._grace, self.config = module, grace, ""
        self._links = [Link(host) for host in hosts]
        self._over = threading.Event()
        threading.Thread(target=self._live, daemon=True).start()

    def greet(
        self,
        limit: float,
        environment: Mapping[str, str],
        paths: Sequence[str] = (),
        least: int | None = None,
        stopping: Callable[[], object] = lambda: False,
    ) -> list[dict[str, Any]]:
        """What each host says of itself, see `survey`; missing are those of paths that it lacks.

        Raises UserError, in one line, for hosts that do not answer within `limit` seconds or lack
        the present folder; where the others have `least` ranks they are left out instead. So it
        does once it is stopping.
        """
        root = str(Path(__file__).resolve().parents[2])
        for link in self._links:
            link.say([root])
            greeting = {"folder": os.getcwd(), "environment": environment, "paths": list(paths)}
            link.say({"greet": greeting})
        end = time.monotonic() + limit
        while time.monotonic() < end and any(
            link.hello is None and not link.ended for link in self._links
        ):
            if stopping():
                raise UserError("stopped while hosts were asked")
            time.sleep(0.05)
        faults = {link: fault for link in self._links if (fault := self._fault(link, limit))}
        there = [link for link in self._links if link not in faults]
        if faults:
            told = "; ".join(faults.values())
            if least is None or sum(link.host.slots for link in there) < least:
                raise UserError(told)
            say(f"dr2dist: left out: {told}")
            _close(list(faults))
            self._links = there
        return [link.hello for link in there if link.hello is not None]

    @property
    def hosts(self) -> list[Host]:
        """Those that take part."""
        return [link.host for link in self._links]

    def places(self, address: str | None = None, port: int | None = None) -> list[Place]:
        """One for each rank. address, port: where rank 0 is to listen, if not as it says itself."""
        hosts = self.hosts
        first, ranks, job = self._links[0], sum(host.slots for host in hosts), new_job()
        assert first.hello is not None
        address = address or self._address()
        port = port or int(first.hello["port"])
        own = [(local, host.slots) for host in hosts for local in range(host.slots)]
        return [Place(rank, ranks, *each, address, port, job) for rank, each in enumerate(own)]

    def _address(self) -> str:
        """The first host's: as ssh has reached it, or as the others see this machine."""
        first, *others = self._links
        for link in [first] if not first.local else others:
            if not link.local and link.hello is not None and link.hello["ends"]:
                return str(link.hello["ends"][1 if link is first else 0])
        return "127.0.0.1"

    def start(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """See Launcher; nodes know the command."""
        left = list(environments)
        for link in self._links:
            own, left = left[: link.host.slots], left[link.host.slots :]
            ranks = {"module": self._module, "config": self.config, "grace": self._grace}
            link.say({"start": {**ranks, "environments": own}})

    def statuses(self) -> list[int | None]:
        """See Launcher. Ranks of a host that is gone count as lost."""
        for link in self._links:
            if link.ended:
                link.statuses = [Status.LOST if each is None else each for each in link.statuses]
        return [status for link in self._links for status in link.statuses]

    def send(self, number: int) -> None:
        """See Launcher."""
        self._tell({"send": number})

    def kill(self) -> None:
        """See Launcher."""
        self._tell({"kill": True})

    def close(self) -> None:
        """Ends the links, and with them what is left on the hosts."""
        self._over.set()
        _close(self._links)

    def _tell(self, message: Any) -> None:
        for link in self._links:
            link.say(message)

    def _live(self) -> None:
        while not self._over.wait(ALIVE):
            self._tell({"alive": True})

    def _fault(self, link: Link, limit: float) -> str | None:
        if link.hello is None:
            how = link.why() if link.ended else f"no answer within {limit:g} s (launch.join_limit)"
            return f"host {link.host.name}: {how}"
        if "error" in link.hello:
            return f"host {link.host.name}: {link.hello['error']}"
        return None


def _close(links: Sequence[Link]) -> None:
    """All at the same time."""
    for link in links:
        link.hang_up()
    end = time.monotonic() + ALIVE
    for link in links:
        link.close(end)
