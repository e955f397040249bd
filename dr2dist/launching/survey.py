"""What a host has, told in a few words and without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dr2dist.version import __version__

PACKAGES = ("torch", "deepspeed", "timm")
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
