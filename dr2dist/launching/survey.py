"""What a host has, told in a few words and without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dr2dist.launching.hosts import Host
from dr2dist.version import __version__

PACKAGES = ("torch", "deepspeed", "timm")
SKEW = 2.0
"""Seconds that clocks may differ without being told; being asked later adds to it."""
_DEVICES = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]


def survey(paths: Iterable[str] = ()) -> dict[str, Any]:
    """Plain values of this host. ends: the addresses of the two ends of its ssh connection, the
    other one first. missing: which of the paths are not there, from the present folder."""
    return {
        "host": socket.gethostname(),
        "dr2dist": __version__,
        "python": platform.python_version(),
        "interpreter": sys.executable,
        **{name: installed(name) for name in PACKAGES},
        "devices": devices(),
        "cores": len(os.sched_getaffinity(0)),
        "free": shutil.disk_usage(Path.cwd()).free,
        "clock": time.time(),
        "ends": os.environ.get("SSH_CONNECTION", "").split()[::2],
        "missing": [path for path in paths if not os.path.exists(path)],
    }


def installed(name: str) -> str:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def devices() -> list[str]:
    """Names of the GPUs that the driver tells of."""
    try:
        done = subprocess.run(_DEVICES, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def describe_hosts(hosts: Sequence[Host], found: Sequence[dict[str, Any]], now: float) -> str:
    """A line for each host of what it said. now: this machine's clock when it was asked."""
    lines = []
    for host, said in zip(hosts, found, strict=True):
        gpus = said["devices"]
        versions = (f"{name} {said[name]}" for name in ("dr2dist", "python", *PACKAGES))
        skew = said["clock"] - now
        parts = [
            f"{host.slots} rank(s)",
            f"{len(gpus)} x {gpus[0]}" if gpus else f"{said['cores']} cores",
            *versions,
            f"{said['free'] / 2**30:.0f} GiB free here",
            *([f"its clock is {skew:+.0f} s off"] if abs(skew) > SKEW else []),
        ]
        name = host.name if said["host"] == host.name else f"{host.name} ({said['host']})"
        lines.append(f"host          {name}: {', '.join(parts)}")
    return "\n".join(lines)
