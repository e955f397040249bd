"""What `dr2dist status` says of runs, by their files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import call


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[None]:
    """Another process has the lock of the run in `tmp_path`."""
    code = "import sys; from dr2dist.locks import take; f = open(sys.argv[1], 'a');"
    path = tmp_path / "run" / "run.lock"
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "a", "process": 7, "start": "now"}))
    line = [sys.executable, "-c", f"{code} print(take(f), flush=True); input()", str(path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        yield
        holder.kill()


def make_run(folder: Path, *, summary: dict[str, Any] | None) -> Path:
    """A run of 40 steps, two seconds each, after ten of them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("output: x\n")
    start = {"step": 0, "steps": 40, "ranks": 4, "batch": 16, "host": "a", "time": 0.0}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(start) + "\n")
    lines = [
        {"step": n, "loss": 1 / n, "lr": 1e-3, "alpha": 0.9, "beta": 0.1, "data_wait": 0.25}
        | {"micro_batch_seconds_median": 0.5, "micro_batch_seconds_most": 0.75}
        | {"micro_batch_seconds_rank": 2, "certificate_failures": 0}
        | {"samples_per_second": 8.0, "peak_memory_bytes": 2**30}
        for n in range(1, 11)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 11, "lo')  # being written
    then = time.time() - 3
    os.utime(folder / "metrics.jsonl", (then, then))
    for name, done in (("step-00000005", True), ("step-00000010", False)):
        (folder / "checkpoints" / name).mkdir(parents=True)
        if done:
            (folder / "checkpoints" / name / "checkpoint.json").write_text("{}")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.usefixtures("locked")
def test_a_run_that_goes_on(tmp_path: Path, capfd: Any) -> None:
    folder = make_run(tmp_path / "run", summary=None)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, out, _ = call(capfd, "status", str(folder), "--json")
    found = json.loads(out)
    assert (
        status == 0 and found["state"] == "running" and (found["step"], found["steps"]) == (10, 40)
    )
    assert found["seconds_left"] == pytest.approx(60, abs=0.1)
    assert found["silent_seconds"] == pytest.approx(3, abs=60) and found["starts"] == 2
    assert found["checkpoint"] == str(folder / "checkpoints" / "step-00000005")
    assert found["loss"] == 0.1 and found["ranks"] == 4
    _, out, _ = call(capfd, "status", str(folder))
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert rows["state"].startswith("running on a (process 7), last heard of 0:0")
    assert rows["step"] == "10 of 40" and rows["left"] == "0:01:00"
    assert rows["slowest"] == "rank 2, 0.75 s for a micro-batch by itself, 1.50 x median"
    assert rows["waiting"] == "25% of the time for data" and rows["speed"] == "8 samples a second"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("summary", "state"),
    [
        (None, "cut"),
        ({"status": "finished", "steps": 10}, "finished"),
        ({}, "cut"),
        ({"status": "finished"}, "cut"),
        ({"status": None, "steps": 10}, "cut"),
    ],
)
def test_a_run_that_has_ended(
    summary: dict[str, Any] | None, state: str, tmp_path: Path, capfd: Any
) -> None:
    folder = make_run(tmp_path / "run", summary=summary)
    # Nobody has its lock: who had it was killed.
    (folder / "run.lock").write_text(json.dumps({"host": "a", "process": 7, "start": "now"}))
    _, out, _ = call(capfd, "status", str(folder), "--json", "--watch")
    found = json.loads(out)
    assert found["state"] == state and found["seconds_left"] is None and found["owner"] is None


def test_a_run_that_has_just_begun(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "config.yaml").write_text("output: x\n")
    _, out, _ = call(capfd, "status", str(tmp_path))
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert rows["step"] == "0" and rows["checkpoint"] == "none yet" and "loss" not in rows


def test_what_is_no_run_is_refused(tmp_path: Path, capfd: Any) -> None:
    status, _, err = call(capfd, "status", str(tmp_path / "none"))
    assert status == 2 and "is no run's folder" in err and len(err.splitlines()) == 1
    make_run(tmp_path / "run", summary=None)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as lines:
        lines.write("\n")
    status, _, err = call(capfd, "status", str(tmp_path / "run"))
    assert status == 2 and "line 11 is damaged" in err
    assert os.listdir(tmp_path) == ["run"]
