"""A rank that is lost is named by the others, which end; the run goes on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dr2dist.checkpoints.folders import checkpoints
from dr2dist.launching.launcher import free_port
from dr2dist.status import Status
from tests.images import make_small_shards
from tests.lost_case import end_before_the_watch, end_during_a_look, exchange
from tests.pool import Pool, start_rank, wait_for

LIMIT = 60
"""Seconds until all other ranks have ended."""

STOPPED = "mistake while the other one is stopped"

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 6}}
task: {name: classification, num_classes: 2}
data: {train: SHARDS/train, num_workers: 0}
optim: {name: sgd, lr: 1.0e-2}
train: {steps: 40, micro_batch: 2, accumulate: 4, log_every: 1}
checkpoint: {steps: 5}
parallel: {zero: 0, stages: 3}
output: OUTPUT
"""


@pytest.mark.parametrize(
    ("fault", "who", "message", "status"),
    [
        ("SIGKILL", 0, "rank 0 was lost", Status.LOST),
        ("SIGKILL", 1, "rank 1 was lost", Status.LOST),
        ("SIGSTOP", 0, "rank 0 was lost", Status.LOST),
        ("SIGSTOP", 1, "rank 1 was lost (no sign of life for 4 s)", Status.LOST),
        ("error", 1, "rank 1 ended: the disk is full", Status.LOST),
        ("mistake", 1, "rank 1 ended: no such class", Status.USER_ERROR),
        (STOPPED, 0, "rank 0 ended: no such class", Status.USER_ERROR),
        pytest.param(
            # Of its own, to something else than another rank.
            *("connection", 1, "rank 1 ended: the bucket is gone", Status.LOST),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_end_and_name_the_one_that_is_lost(
    fault: str, who: int, message: str, status: Status, tmp_path: Path
) -> None:
    check_end(exchange, fault, who, message, status, tmp_path)


def test_a_rank_that_ends_before_others_watch_is_named(tmp_path: Path) -> None:
    check_end(end_before_the_watch, "SIGKILL", 0, "rank 0 was lost", Status.LOST, tmp_path)


def test_what_a_rank_has_said_counts_and_not_that_it_has_ended(tmp_path: Path) -> None:
    said = "rank 1 ended: no such class"
    check_end(end_during_a_look, "mistake", 1, said, Status.USER_ERROR, tmp_path)


def check_end(
    case: Callable[[str, int], None],
    fault: str,
    who: int,
    message: str,
    status: Status,
    tmp_path: Path,
) -> None:
    """The other one of two ranks says so, and ends with this status."""
    port = free_port()
    outputs = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
    ranks = [
        start_rank(rank, 2, port, output, case, fault, who) for rank, output in enumerate(outputs)
    ]
    other = 1 - who
    try:
        ranks[other].join(timeout=LIMIT)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    said = outputs[other].read_text()
    assert ranks[other].exitcode == status, said
    assert f"dr2dist: rank {other}: {message}" in said


def test_three_messages_keep_a_rank_in_sight_however_many_there_are(
    two_ranks: Pool, four_ranks: Pool
) -> None:
    for pool, ranks in ((two_ranks, 2), (four_ranks, 4)):
        assert pool.run("tests.lost_case:messages_of_looks", looks=5) == [3.0] * ranks


@pytest.mark.slow
def test_a_run_whose_stage_is_killed_names_it_and_goes_on(
    tmp_path: Path, three_ranks: Pool
) -> None:
    shards = make_small_shards(tmp_path / "shards")
    path, output = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(CONFIG.replace("SHARDS", str(shards)).replace("OUTPUT", str(output)))
    command = [sys.executable, "-m", "dr2dist.cli", "train", str(path), "--ranks", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            wait_for(lambda: bool(checkpoints(output)), str(output))
            ranks = psutil.Process(run.pid).children()
            stage = next(each for each in ranks if each.environ()["RANK"] == "1")
            others = psutil.Process(run.pid).children(recursive=True)
            stage.send_signal(signal.SIGKILL)
            status = run.wait(timeout=LIMIT)
            _, alive = psutil.wait_procs(others, timeout=10)
        finally:
            run.kill()
    said = log.read_text()
    assert status != 0 and not alive, said
    assert "rank 1 (stage 1, replica 0) was lost" in said
    first, *_ = (output / "metrics.jsonl").read_text().splitlines()
    summary, *_ = three_ranks.run("tests.cases:run_config", path=str(path), overrides=[])
    # With its speed, which another start would not have had again.
    assert (output / "metrics.jsonl").read_text().startswith(first)
    assert (summary["steps"], summary["certificate_failures"]) == (40, 0)
