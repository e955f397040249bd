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

    def link(self, *words: str) -> None:
        """Settings of the link, at the first node: up, or down."""
        subprocess.run(self.inside(0, "ip", "link", "set", "dr2", *words), check=True)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Until it is left. They share this machine's files."""
    holders = [subprocess.Popen(["unshare", "-n", "-u", "sleep", "infinity"]) for _ in range(2)]
    servers: list[subprocess.Popen[bytes]] = []
    try:
        nodes = Nodes(folder, (holders[0].pid, holders[1].pid))
        _link(nodes, holders)
        _write(folder)
        for node, address in enumerate(ADDRESSES):
            sshd = [str(_which("sshd")), "-D", "-e", "-f", str(folder / "sshd_config")]
            line = nodes.inside(node, *sshd, "-o", f"ListenAddress={address}")
            log = (folder / f"sshd-{node}.txt").open("wb")
            servers.append(subprocess.Popen(line, stdout=log, stderr=log))
        for node in range(2):
            log_of = folder / f"sshd-{node}.txt"
            _wait(lambda path=log_of: "listening" in path.read_text())  # type: ignore[misc]
        yield nodes
    finally:
        for process in (*servers, *holders):
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
