"""The status command: how a run is, from the files of its folder alone."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from dr2dist.arguments import path
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.errors import UserError
from dr2dist.training.lock import holder
from dr2dist.training.run_files import CONFIG, METRICS, STARTS, read_lines, read_summary

PERIOD = 5.0
"""Seconds between two looks of --watch."""
_SHOWN = (
    *("loss", "lr", "alpha", "beta", "samples_per_second", "data_wait", "data_wait_most"),
    *("data_wait_rank", "micro_batch_seconds_median", "micro_batch_seconds_most"),
    *("micro_batch_seconds_rank", "checkpoint_pause", "peak_memory_bytes"),
)


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dr2dist status` takes."""
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument("--watch", action="store_true", help="look again until it has ended")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(command=run)


def run(given: argparse.Namespace) -> int:
    """`dr2dist status`: 0 whatever the run does."""
    while True:
        found = state_of(given.run)
        text = json.dumps(found) if given.json else describe(found)
        print(text, flush=True)
        if not given.watch or found["state"] != "running":
            return 0
        time.sleep(PERIOD)
        if sys.stdout.isatty() and not given.json:
            print(f"\x1b[{len(text.splitlines())}A\x1b[J", end="")


def state_of(folder: Path) -> dict[str, Any]:
    """Plain values: state (running, finished, interrupted, stopped, or cut for a run that has ended
    without a word), step, steps, seconds_left, starts, checkpoint, and of the last step loss, lr,
    alpha, beta, samples_per_second, data_wait (a share of rank 0's time, with data_wait_most and
    data_wait_rank of who waits longest), micro_batch_seconds_median, _most and _rank (of who takes
    longest by itself), checkpoint_pause (seconds), peak_memory_bytes, and certificate_failures of
    all. None where it is not known.

    Reads and never writes. Raises UserError for a folder that is none of a run's.
    """
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: is no run's folder: it has no {CONFIG}")
    lines = [line for line in read_lines(folder / METRICS) if "loss" in line]
    starts, summary = read_lines(folder / STARTS), read_summary(folder)
    lock = holder(folder)
    last: dict[str, Any] = lines[-1] if lines else {}
    ended = "cut" if summary is None else summary["status"]
    step = last.get("step", 0) if summary is None else summary["steps"]
    began: dict[str, Any] = starts[-1] if starts else {}
    steps = began.get("steps")
    return {
        "run": str(folder),
        "state": ended if lock is None else "running",
        "step": step,
        "steps": steps,
        "seconds_left": None if lock is None else _left(step, began, last),
        "silent_seconds": None if lock is None else _age(folder / METRICS),
        "owner": lock,
        "starts": len(starts),
        "ranks": began.get("ranks"),
        "checkpoint": _newest(folder),
        "certificate_failures": sum(line["certificate_failures"] for line in lines),
        **{name: last.get(name) for name in _SHOWN},
    }


def describe(found: dict[str, Any]) -> str:
    """What state_of says, a line each."""
    rows = {
        "run": found["run"],
        "state": found["state"] + _who(found),
        "step": f"{found['step']}" + (f" of {found['steps']}" if found["steps"] else ""),
        "left": _interval(found["seconds_left"]),
        "loss": _number(found["loss"]),
        "alpha, beta": _pair(found["alpha"], found["beta"]),
        "speed": _number(found["samples_per_second"], " samples a second"),
        "waiting": _waiting(found),
        "slowest": _slowest(found),
        "memory": _mebibytes(found["peak_memory_bytes"]),
        "starts": f"{found['starts']}, {found['ranks']} rank(s) now" if found["starts"] else None,
        "checkpoint": found["checkpoint"] or "none yet",
        "certificate": f"{found['certificate_failures']} failure(s)",
    }
    return "\n".join(f"{name:13} {text}" for name, text in rows.items() if text is not None)


def _left(step: int, began: dict[str, Any], last: dict[str, Any]) -> float | None:
    """By the speed of the last steps, validations and checkpoints left out."""
    speed = last.get("samples_per_second")
    return began["batch"] * (began["steps"] - step) / speed if speed and "batch" in began else None


def _age(where: Path) -> float | None:
    """Seconds since a file was written, by two clocks that may differ: at least 0."""
    return max(0.0, time.time() - where.stat().st_mtime) if where.exists() else None


def _newest(folder: Path) -> str | None:
    found = checkpoints(folder)
    return str(found[-1]) if found else None


def _who(found: dict[str, Any]) -> str:
    owner = found["owner"]
    if owner is None:
        return ""
    silent = found["silent_seconds"]
    said = "" if silent is None else f", last heard of {_interval(silent)} ago"
    return f" on {owner.get('host')} (process {owner.get('process')}){said}"


def _interval(seconds: float | None) -> str | None:
    return None if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def _number(value: float | None, unit: str = "") -> str | None:
    return None if value is None else f"{value:.4g}{unit}"


def _pair(alpha: float | None, beta: float | None) -> str | None:
    return None if alpha is None else f"{_number(alpha)}, {_number(beta)}"


def _slowest(found: dict[str, Any]) -> str | None:
    """Of several ranks, who computes longest."""
    most, median = found["micro_batch_seconds_most"], found["micro_batch_seconds_median"]
    if not median or found["ranks"] in (None, 1):
        return None
    rank = found["micro_batch_seconds_rank"]
    return (
        f"rank {rank:.0f}, {most:.3g} s for a micro-batch by itself, {most / median:.2f} x median"
    )


def _waiting(found: dict[str, Any]) -> str | None:
    if found["data_wait"] is None:
        return None
    text = f"{found['data_wait']:.0%} of the time for data"
    if found["data_wait_rank"]:
        text += f", rank {found['data_wait_rank']} {found['data_wait_most']:.0%}"
    if found["checkpoint_pause"]:
        text += f"; {found['checkpoint_pause']:.1f} s for a checkpoint"
    return text


def _mebibytes(value: int | None) -> str | None:
    return None if value is None else f"{value / 2**20:.0f} MiB at most, of rank 0"
