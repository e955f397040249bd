"""A SLURM of one controller and two nodes on this machine, from Debian's packages."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from dr2dist.launching.launcher import free_port
from tests.pool import wait_for

NODES = ("na", "nb")
_FOLDERS = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def lacking() -> str | None:
    """Why this machine cannot have it; None where it can."""
    for name in ("slurmctld", "slurmd", "srun", "sbatch", "munged"):
        if shutil.which(name, path=_FOLDERS) is None:
            return f"{name} is not installed (Debian: slurm-wlm, munge)"
    return "its daemons need root" if os.getuid() else None


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Until it is left; the variables by which its commands find it."""
    host = socket.gethostname()
    settings = {
        "ClusterName": "t",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/linear",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool.%n",
        "SlurmctldPidFile": f"{folder}/ctld.pid",
        "SlurmdPidFile": f"{folder}/%n.pid",
        "MpiDefault": "none",
        "ReturnToService": 2,
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    for name in NODES:
        port = free_port()
        lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2")
    lines.append(f"PartitionName=p Nodes={','.join(NODES)} Default=YES State=UP MaxTime=INFINITE")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    own = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
    munge = ["munged", "-F", "--force", f"--key-file={key}", f"--socket={folder}/munge", *own]
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _FOLDERS}
    daemons = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "daemons.txt").open("wb") as log:
            for line in daemons:
                running.append(subprocess.Popen(line, env=environment, stdout=log, stderr=log))
                if line is munge:
                    wait_for((folder / "munge").exists, "munge's socket", 20)
        wait_for(lambda: _idle(environment), f"SLURM; see {folder}/daemons.txt", 60)
        yield environment
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()


def _idle(environment: dict[str, str]) -> bool:
    line = ["sinfo", "--noheader", "--format=%T %D"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() == f"idle {len(NODES)}"
