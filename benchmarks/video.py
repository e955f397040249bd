"""Do reversible video backbones learn what conventional finetuning learns? On constructed films.

    python -m benchmarks.moves_data --output demo/moves        # clips, one move each
    python -m benchmarks.actions_data --output demo/actions    # films, in which moves are found
    python -m benchmarks.video --workers 2 --write docs/video.md

Runs are those of configs/moves_swin3d.yaml and configs/actions_swin3d.yaml, with one rank of a
thread each. Detection starts from a conventionally trained classifier of moves, which is made
first (demo/moves_swin3d.safetensors). Each finished run is a line of
benchmarks/results/video.jsonl and is not run again.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import kept
from benchmarks.evidence import interval

ROOT = Path(__file__).parent.parent
RECORDS = kept.RESULTS / "video.jsonl"
PRETRAINED = ROOT / "demo" / "moves_swin3d.safetensors"
"""The weights that configs/actions_swin3d.yaml names."""
CONVENTIONAL, EXACT = "conventional", "exact, the configuration's (0.9, 0.1)"
WAYS: dict[str, tuple[str, ...]] = {
    CONVENTIONAL: (
        "reversible={arithmetic: float, memory: store}",
        "coefficients={kind: constant, alpha: 1, beta: 0}",
    ),
    EXACT: (),
    "exact, the paper's path, alpha first": (
        "coefficients={kind: paper, order: alpha_first, until: 0.5}",
    ),
}
SHOWN = (CONVENTIONAL, EXACT)


class Study(NamedTuple):
    """config: of its runs. more: overrides of one rank with the batch of two. metric: of the last
    validation. title, text: of its part of the page."""

    config: str
    more: tuple[str, ...]
    metric: str
    title: str
    text: str


STUDIES = {
    "classification": Study(
        "moves_swin3d",
        ("train.micro_batch=16",),
        "val_accuracy",
        "Video classification",
        "A small Video Swin (1 M parameters, 12 residual functions) from random weights tells "
        "eight moves of a camera from clips of 8 frames at 56 pixels: pans in four directions, "
        "zooms in and out, a turn, and a still camera. The number is the accuracy on held-out "
        "clips; chance is 0.125.",
    ),
    "detection": Study(
        "actions_swin3d",
        ("train.micro_batch=8",),
        "val_map",
        "Temporal action detection",
        "The same backbone, with the weights of a conventionally trained classifier of moves, on "
        "48 frames of films of 8 seconds finds when the camera moves, and which of seven moves it "
        "is. The number is the mean average precision over tIoUs of 0.3 to "
        "0.7 on held-out films; the same network before training reaches CHANCE.",
    ),
}

Key = tuple[str, int, str]
"""Study, seed and way."""


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(SHOWN))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    given = parser.parse_args()
    results = read_results()
    seeds = range(given.seeds)
    jobs = [(study, k, way) for study in given.studies for k in seeds for way in given.ways]
    if "detection" in given.studies:
        jobs.insert(0, ("detection", 0, "untrained"))
    missing = [job for job in jobs if job not in results]
    if any(study == "detection" for study, *_ in missing) and not PRETRAINED.exists():
        pretrain()
    with ThreadPoolExecutor(given.workers) as pool:
        futures = {pool.submit(one_run, *job): job for job in missing}
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            results[futures[future]] = keep(*futures[future], future.result())
    if given.write is not None:
        given.write.write_text(page(results, given.studies))


def read_results() -> dict[Key, dict[str, Any]]:
    """What is finished."""
    entries = kept.read(RECORDS)
    return {(entry["study"], entry["seed"], entry["way"]): entry for entry in entries}


def keep(study: str, seed: int, way: str, result: dict[str, Any]) -> dict[str, Any]:
    """Adds a line to RECORDS, with the machine and the date."""
    when = {"machine": platform.machine(), "cores": os.cpu_count()}
    entry = {"study": study, "seed": seed, "way": way, **when}
    entry |= {"date": str(datetime.date.today()), **result}
    kept.add(RECORDS, entry)
    return entry


def dr2dist(*arguments: str) -> None:
    """A command, by one thread, from the project's folder."""
    line = [sys.executable, "-m", "dr2dist.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def train(study: str, seed: int, folder: Path, more: Sequence[str]) -> None:
    """A run of a study's configuration."""
    config = ROOT / "configs" / f"{STUDIES[study].config}.yaml"
    own = ("--ranks", "1", f"train.seed={seed}", f"output={folder}")
    dr2dist("train", str(config), *own, *more)


def pretrain() -> None:
    """Makes PRETRAINED."""
    with tempfile.TemporaryDirectory() as place:
        folder, study = Path(place) / "run", "classification"
        train(study, 0, folder, (*STUDIES[study].more, *WAYS[CONVENTIONAL]))
        dr2dist("export", str(folder), "--which", "last", "--output", str(PRETRAINED))


def one_run(study: str, seed: int, way: str) -> dict[str, Any]:
    """What the last validation of a run says, its seconds, and failures of its certificate."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        own = ("optim.lr=1.0e-12", "train.epochs=null", "train.steps=1", "train.micro_batch=1")
        train(
            study, seed, folder, own if way == "untrained" else (*STUDIES[study].more, *WAYS[way])
        )
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
    last = next(record for record in reversed(lines) if "val_loss" in record)
    kept = {name: value for name, value in last.items() if name.startswith("val_")}
    more_kept = ("steps", "seconds", "certificate_failures")
    return {**kept, **{name: summary[name] for name in more_kept}}


def page(results: dict[Key, dict[str, Any]], studies: Sequence[str]) -> str:
    """The tables, by way."""
    one = next(iter(results.values()))
    text = [
        "# Evidence on films",
        "",
        f"Written by `python -m benchmarks.video --write docs/video.md` on {one['machine']}, "
        f"{one['cores']} cores, {max(entry['date'] for entry in results.values())}.",
        "",
        "Labels are constructed: a window moves over real footage, four films in training and four "
        "others held out (benchmarks/moves_data.py, benchmarks/actions_data.py). This is no public "
        "data set of actions. Runs are those of the named configuration, fp32, one thread, at "
        "their last step; differences are to conventional finetuning with the same seed, with the "
        "95 % interval by Student's t.",
        "",
    ]
    for name in studies:
        text += _part(name, results)
    return "\n".join(text)


def _part(name: str, results: dict[Key, dict[str, Any]]) -> list[str]:
    study = STUDIES[name]
    untrained = results.get((name, 0, "untrained"), {}).get(study.metric)
    told = study.text.replace("CHANCE", "?" if untrained is None else f"{untrained:.3f}")
    base = _runs(name, CONVENTIONAL, results)
    rows = [_row(way, _runs(name, way, results), base, study.metric) for way in WAYS]
    return [
        f"## {study.title}",
        "",
        f"{told} `configs/{study.config}.yaml`.",
        "",
        "| | seeds | mean | of each seed | difference | failures |",
        "|---|---|---|---|---|---|",
        *(row for row in rows if row),
        "",
    ]


def _runs(name: str, way: str, results: dict[Key, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By seed."""
    found = {k: r for (study, k, w), r in results.items() if study == name and w == way}
    return dict(sorted(found.items()))


def _row(way: str, runs: dict[int, Any], base: dict[int, Any], metric: str) -> str | None:
    if not runs:
        return None
    each = [run[metric] for run in runs.values()]
    listed = ", ".join(f"{value:.3f}" for value in each)
    failures = sum(run["certificate_failures"] for run in runs.values())
    pairs = [runs[seed][metric] - base[seed][metric] for seed in runs if seed in base]
    differs = interval(pairs) if way != CONVENTIONAL and len(pairs) > 1 else ""
    mean = f"{statistics.mean(each):.3f}"
    return f"| {way} | {len(each)} | {mean} | {listed} | {differs} | {failures} |"


if __name__ == "__main__":
    main()
