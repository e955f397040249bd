"""Two nodes of one machine: network and host-name namespaces with an sshd each, and a link."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ADDRESSES = ("10.213.7.1", "10.213.7.2")
NAMES = ("node-a", "node-b")
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


def lacking() -> str | None:
    """Why this machine cannot have two nodes; None where it can."""
    for name in ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter"):
        if _which(name) is None:
            return f"{name} is not installed"
    done = subprocess.run(["unshare", "-n", "-u", "ip", "link"], capture_output=True, check=False)
    return "namespaces are not allowed here" if done.returncode else None


class Nodes:
    """See two_nodes. folder: keys, and a hostfile of one rank for each (hosts1) and of two."""

    def __init__(self, folder: Path, pids: tuple[int, int]) -> None:
        self.folder, self._pids = folder, pids
        self._servers: dict[int, subprocess.Popen[bytes]] = {}

    def serve(self, node: int, clock: bool = False) -> None:
        """Starts a node's sshd, instead of the one that it has; clock: what it starts has the time
        of set_clock."""
        self.close(node)
        log = self.folder / f"sshd-{node}.txt"
        line = [str(_which("sshd")), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        line += ["-o", f"ListenAddress={ADDRESSES[node]}"]
        if clock:
            self.set_clock("+0")
            line += ["-o", f"SetEnv={self._faked()}"]
        with log.open("wb") as file:
            server = subprocess.Popen(self.inside(node, *line), stdout=file, stderr=file)
        self._servers[node] = server
        _wait(lambda: "listening" in log.read_text())

    def close(self, *nodes: int) -> None:
        """Ends the sshd of the nodes that have one."""
        for node in nodes:
            if (server := self._servers.pop(node, None)) is not None:
                server.kill()
                server.wait()

    def set_clock(self, offset: str) -> None:
        """Moves the clock of a node that is served so, by libfaketime: +1h, -10m."""
        aside = self.folder / "clock.tmp"
        aside.write_text(f"{offset}\n")
        aside.replace(self.folder / "clock")

    def _faked(self) -> str:
        values = {
            "LD_PRELOAD": FAKETIME,
            "FAKETIME_TIMESTAMP_FILE": self.folder / "clock",
            "FAKETIME_NO_CACHE": 1,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
        }
        return " ".join(f"{name}={value}" for name, value in values.items())

    def inside(self, node: int, *line: str) -> list[str]:
        """A command line, in a node."""
        return ["nsenter", "-t", str(self._pids[node]), "-n", "-u", *line]

    def begin(self, config: Path, *arguments: str) -> subprocess.Popen[str]:
        """`dr2dist train` in the first node, in the configuration's folder."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        line = [sys.executable, "-m", "dr2dist.cli", "train", str(config), *arguments]
        return subprocess.Popen(
            self.inside(0, *line),
            cwd=config.parent,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def holds(self, process: int) -> bool:
        """Whether a process runs in one of them."""
        networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in self._pids}
        return os.readlink(f"/proc/{process}/ns/net") in networks

    def link(self, *words: str) -> None:
        """Settings of the link, at the first node: up, or down."""
        subprocess.run(self.inside(0, "ip", "link", "set", "dr2", *words), check=True)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Until it is left. They share this machine's files."""
    holders = [subprocess.Popen(["unshare", "-n", "-u", "sleep", "infinity"]) for _ in range(2)]
    nodes = Nodes(folder, (holders[0].pid, holders[1].pid))
    try:
        _link(nodes, holders)
        _write(folder)
        for node in range(2):
            nodes.serve(node)
        yield nodes
    finally:
        nodes.close(0, 1)
        for process in holders:
            process.kill()
            process.wait()


def _link(nodes: Nodes, holders: list[subprocess.Popen[bytes]]) -> None:
    own = os.readlink("/proc/self/ns/net")
    for holder in holders:
        where = f"/proc/{holder.pid}/ns/net"
        _wait(lambda path=where: os.readlink(path) != own)  # type: ignore[misc]
    pair = ["dr2", "netns", str(holders[0].pid), "type", "veth", "peer", "name", "dr2", "netns"]
    subprocess.run(["ip", "link", "add", *pair, str(holders[1].pid)], check=True)
    for node, (address, name) in enumerate(zip(ADDRESSES, NAMES, strict=True)):
        for line in (
            ["ip", "address", "add", f"{address}/24", "dev", "dr2"],
            ["ip", "link", "set", "dr2", "up"],
            ["ip", "link", "set", "lo", "up"],
            ["hostname", name],
        ):
            subprocess.run(nodes.inside(node, *line), check=True)


def _write(folder: Path) -> None:
    """Keys, settings of sshd, an ssh that knows the key, hostfiles."""
    for name in ("host", "user"):
        line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(line, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
        "PasswordAuthentication no\nUsePAM no\nPermitRootLogin yes\nPrintMotd no\n"
    )
    (folder / "bin").mkdir()
    known = f"-o UserKnownHostsFile={folder}/known -o StrictHostKeyChecking=no -o LogLevel=ERROR"
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {_which("ssh")} -i {folder}/user {known} "$@"\n')
    ssh.chmod(0o755)
    for slots in (1, 2):
        text = "".join(f"{address} slots={slots}\n" for address in ADDRESSES)
        (folder / f"hosts{slots}").write_text(text)


def _wait(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("two nodes have not come to be")
        time.sleep(0.02)


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
