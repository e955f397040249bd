"""The command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def dr2dist(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """How `dr2dist ARGUMENTS` ends in a folder, and what it says."""
    return subprocess.run(
        [sys.executable, "-m", "dr2dist.cli", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
