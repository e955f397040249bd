"""Is what moves in a clip learnt by a reversible Video Swin? Against conventional finetuning.

    python -m benchmarks.moves_data --output demo/moves     # films, labelled by construction
    python -m benchmarks.moves --workers 2 --write docs/video.md

The runs are those of configs/moves_swin3d.yaml, with one rank of a thread each. Each finished run
is a line of benchmarks/results/moves.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "moves_swin3d.yaml"
RECORDS = ROOT / "benchmarks" / "results" / "moves.jsonl"
CONVENTIONAL = "conventional"
WAYS = {
    CONVENTIONAL: (
        "reversible={arithmetic: float, memory: store}",
        "coefficients={kind: constant, alpha: 1, beta: 0}",
    ),
    "exact, the configuration's (0.9, 0.1)": (),
    "exact, the paper's path, alpha first": (
        "coefficients={kind: paper, order: alpha_first, until: 0.5}",
    ),
}
CHANCE = 1 / 8
KEPT = ("val_accuracy", "val_balanced_accuracy", "val_loss")


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    given = parser.parse_args()
    results = read_results()
    jobs = [(seed, way) for seed in range(given.seeds) for way in given.ways]
    missing = [job for job in jobs if job not in results]
    with ThreadPoolExecutor(given.workers) as pool:
        futures = {pool.submit(one_run, *job): job for job in missing}
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            results[futures[future]] = keep(*futures[future], future.result())
    if given.write is not None:
        given.write.write_text(page(results))


def read_results() -> dict[tuple[int, str], dict[str, Any]]:
    """What is finished, by seed and way."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    entries = [json.loads(line) for line in lines]
    return {(entry["seed"], entry["way"]): entry for entry in entries}


def keep(seed: int, way: str, result: dict[str, Any]) -> dict[str, Any]:
    """Adds a line to RECORDS, with the machine and the date."""
    when = {"machine": platform.machine(), "cores": os.cpu_count()}
    entry = {"seed": seed, "way": way, **when, "date": str(datetime.date.today()), **result}
    with RECORDS.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return entry


def one_run(seed: int, way: str) -> dict[str, Any]:
    """What the last validation of a run says, its seconds, and failures of its certificate."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        said = (f"train.seed={seed}", "train.micro_batch=16", f"output={folder}", *WAYS[way])
        line = [sys.executable, "-m", "dr2dist.cli", "train", str(CONFIG), "--ranks", "1", *said]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
    last = next(record for record in reversed(lines) if "val_loss" in record)
    more = {name: summary[name] for name in ("steps", "seconds", "certificate_failures")}
    return {**{name: last[name] for name in KEPT}, "samples": last["val_samples"], **more}


def page(results: dict[tuple[int, str], dict[str, Any]]) -> str:
    """The table, by way."""
    one = next(iter(results.values()))
    text = [
        "# Evidence on clips",
        "",
        f"Written by `python -m benchmarks.moves --write docs/video.md` on {one['machine']}, "
        f"{one['cores']} cores, {one['date']}.",
        "",
        "A small Video Swin (1 M parameters, 12 residual functions) from random weights tells "
        "eight moves of a camera from clips of 8 frames at 56 pixels: pans in four directions, "
        "zooms in and out, a turn, and a still camera. The labels are constructed: a window moves "
        "over real footage, four films in training and four others held out "
        "(benchmarks/moves_data.py). It is no public data set of actions. Runs are those of "
        f"configs/moves_swin3d.yaml, {one['steps']} steps of 16 clips, fp32, one thread; accuracy "
        f"is that of the last step on {int(one['samples'])} held-out clips, by seed. Chance is "
        f"{CHANCE}.",
        "",
        "| | seeds | accuracy, mean | of each seed | minutes a run | failures |",
        "|---|---|---|---|---|---|",
        *(_row(way, [r for (_, w), r in sorted(results.items()) if w == way]) for way in WAYS),
        "",
    ]
    return "\n".join(text)


def _row(way: str, runs: list[dict[str, Any]]) -> str:
    each = [run["val_accuracy"] for run in runs]
    mean = f"{statistics.mean(each):.3f}" if each else ""
    minutes = f"{statistics.median(run['seconds'] for run in runs) / 60:.0f}" if runs else ""
    failures = sum(run["certificate_failures"] for run in runs)
    listed = ", ".join(f"{value:.3f}" for value in each)
    return f"| {way} | {len(runs)} | {mean} | {listed} | {minutes} | {failures} |"


if __name__ == "__main__":
    main()
