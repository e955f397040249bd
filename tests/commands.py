"""The command line, in a process of its own and in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def dr2dist(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """How `dr2dist ARGUMENTS` ends in a folder, and what it says."""
    return subprocess.run(
        [sys.executable, "-m", "dr2dist.cli", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )


def call(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    """`dr2dist ARGUMENTS` in this process: its exit status and what it printed."""
    from dr2dist.cli import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    found = capfd.readouterr()
    return int(ended.value.code or 0), found.out, found.err
