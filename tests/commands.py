"""The command line, in a forked process and in this one.

In new interpreters, as a person starts it, it is in the tests of signals, hosts and starters.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.forked import errors_of, start

ROOT = Path(__file__).parent.parent
SECONDS = 480
"""After which a command is ended, and its test fails."""


def dr2dist(
    *arguments: str,
    folder: Path = ROOT,
    variables: Mapping[str, str] | None = None,
    largest: int = resource.RLIM_INFINITY,
) -> subprocess.CompletedProcess[str]:
    """How `dr2dist ARGUMENTS` ends in a folder, and what it says (`tests.forked`). largest: bytes
    of a file; there is no room for more."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output"
        process = start(arguments, folder, output, variables)
        resource.prlimit(int(process.pid or 0), resource.RLIMIT_FSIZE, (largest, largest))
        process.join(SECONDS)
        status = process.exitcode
        process.kill()  # its ranks end with it
        out, err = output.read_text(), errors_of(output).read_text()
    assert status is not None, f"{arguments} has not ended in {SECONDS} s: {out}{err}"
    return subprocess.CompletedProcess(arguments, status, out, err)


def call(capfd: Any, *arguments: str) -> tuple[int, str, str]:
    """`dr2dist ARGUMENTS` in this process: its exit status and what it printed."""
    from dr2dist.cli import main

    with pytest.raises(SystemExit) as ended:
        main(arguments)
    found = capfd.readouterr()
    return int(ended.value.code or 0), found.out, found.err
