"""What launch/slurm.sbatch does when a run has ended, with a srun and a scontrol that say so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "slurm.sbatch"


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        (0, 0, False),
        (2, 0, False),  # a mistake, which all ranks end with
        (3, 0, False),
        (4, 0, True),
        (4, 10, False),
        (75, 50, True),
        (137, 1, True),  # a rank killed, as where memory is full
        (137, 10, False),
    ],
)
def test_the_job_is_queued_again_where_it_can_go_on(
    status: int, restarts: int, again: bool, tmp_path: Path
) -> None:
    for name, text in (("srun", f"exit {status}"), ("scontrol", 'echo "$*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    found = subprocess.run(
        [str(SCRIPT), "run.yaml"], env=environment, capture_output=True, text=True
    )
    assert found.returncode == status
    assert found.stdout == ("requeue 7\n" if again else "")
