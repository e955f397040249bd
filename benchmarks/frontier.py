"""Which beta keeps conventional finetuning's accuracy? Paired over seeds, on evidence.py's data.

    ./launch/quickstart.sh                                  # fetches the weights and ELPV
    python -m benchmarks.frontier --workers 2               # hours; can be broken off and repeated
    python -m benchmarks.frontier --workers 2 --steps 1000 --data digits
    python -m benchmarks.frontier --only-write --write build/frontier.md

alpha is 1 - beta and constant. Every way has the same recipe, steps, seeds and samples; its
learning rate is the one of three with the lowest loss on a part of the training data. Only then are
all training data used, and the held-out images looked at once. A way has as many seeds as bring the
95 % half-width of its difference to conventional finetuning to 0.02, at least 5 and at most 20; one
whose whole interval is below -0.02 needs no more. Longer runs take their rates from those of 200
steps, and have the least seeds.
Each finished run is a line of benchmarks/results/frontier.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import kept
from benchmarks.evidence import (
    DATA,
    EXACT,
    FLOAT,
    MEASURES,
    PAPER,
    RATES,
    ROOT,
    half_width,
    interval,
    make_digits,
    one_run,
    settings_of,
)
from dr2dist.reversible.certificate import worst_drift

STEPS, LONGER_STEPS = 200, 1000
RECORDS = kept.RESULTS / "frontier.jsonl"
LEAST_SEEDS, MOST_SEEDS, HALF_WIDTH = 5, 20, 0.02
CHOOSING_SEED = 100
"""The seed of the runs that choose a rate; none of those that are reported."""

CONVENTIONAL, DEFAULT, BITS16 = "conventional", "beta 0.1", "beta 0.1, 16 bits"


class Way(NamedTuple):
    """The sections `reversible` and `coefficients` of a run; rate_of: whose rate it takes."""

    reversible: str
    coefficients: str
    rate_of: str | None = None


def _constant(beta: float, more: str = "") -> Way:
    return Way(EXACT + more, f"kind: conserve, beta: [{beta}, {beta}]")


BETAS = {1 / 16: "beta 1/16", 0.1: DEFAULT, 1 / 8: "beta 1/8", 1 / 4: "beta 1/4", 1 / 2: "beta 1/2"}
GAINS = {beta: f"{BETAS[beta]}, gain 1 + beta" for beta in (0.1, 1 / 8, 1 / 4)}
WAYS: dict[str, Way] = {
    CONVENTIONAL: Way("arithmetic: float, memory: store", "kind: constant, alpha: 1, beta: 0"),
    DEFAULT: _constant(0.1),
    BITS16: _constant(0.1, ", state_bits: 16")._replace(rate_of=DEFAULT),
    **{BETAS[beta]: _constant(beta) for beta in (1 / 8, 1 / 4, 1 / 2, 1 / 16)},
    **{way: _constant(beta, ", gain: consistent") for beta, way in GAINS.items()},
    "paper, exact": Way(EXACT, PAPER),
    "paper, float reversal": Way(FLOAT, PAPER),
}
LONGER = (CONVENTIONAL, DEFAULT, BITS16, "paper, exact", "paper, float reversal")
"""The ways of longer runs."""


class Job(NamedTuple):
    """What names a run. part: choose or final."""

    data: str
    way: str
    part: str
    rate: float
    seed: int
    steps: int


Results = dict[Job, dict[str, Any]]


def main() -> None:
    """Runs what is missing, a line each, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    parser.add_argument("--only-write", action="store_true", help="run nothing")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all of such runs")
    parser.add_argument("--steps", type=int, choices=(STEPS, LONGER_STEPS), default=STEPS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    arguments = parser.parse_args()
    arguments.ways = arguments.ways or list(WAYS if arguments.steps == STEPS else LONGER)
    os.chdir(ROOT)
    results = read_results()
    if not arguments.only_write:
        if "digits" in arguments.data and not Path("demo/digits").exists():
            make_digits(Path("demo/digits"))
        while jobs := missing(results, arguments):
            results.update(run_all(jobs, arguments.workers))
    if arguments.write is not None:
        page = write_page(results, arguments)
        arguments.write.write_text(page)
        sys.stdout.write(page)


def read_results() -> Results:
    """What is finished, from RECORDS."""
    return {Job(**entry["job"]): entry["result"] for entry in kept.read(RECORDS)}


def missing(results: Results, arguments: argparse.Namespace) -> list[Job]:
    """The runs to do next, of the first way that lacks any; none when all is done."""
    for way in arguments.ways:
        jobs: list[Job] = []
        for data in arguments.data:
            jobs += wanted(results, data, way, arguments.steps)
        if jobs := [job for job in jobs if job not in results]:
            return jobs
    if arguments.steps != STEPS:
        return []
    for way in arguments.ways:  # only when every way has its least seeds
        for data in arguments.data:
            runs, base = (seeds_of(results, data, w, arguments.steps) for w in (way, CONVENTIONAL))
            if way == CONVENTIONAL or len(runs) >= MOST_SEEDS:
                continue
            values = differences(runs, base, "accuracy")
            lost = statistics.mean(values) + half_width(values) < -HALF_WIDTH
            if half_width(values) > HALF_WIDTH and not lost:
                return [
                    job
                    for w in (CONVENTIONAL, way)
                    for job in _finals(results, data, w, arguments.steps, len(runs) + 2)
                    if job not in results
                ]
    return []


def wanted(results: Results, data: str, way: str, steps: int) -> Iterator[Job]:
    """The runs that choose a rate, then those of the least seeds at it."""
    choosing = choosers(data, way)
    if all(job in results for job in choosing):
        yield from _finals(results, data, way, steps, LEAST_SEEDS)
    else:
        yield from choosing


def _finals(results: Results, data: str, way: str, steps: int, seeds: int) -> list[Job]:
    rate = rate_of(results, data, way)
    return [Job(data, way, "final", rate, seed, steps) for seed in range(seeds)]


def choosers(data: str, way: str) -> list[Job]:
    """The runs that choose a way's rate."""
    chooser = WAYS[way].rate_of or way
    return [Job(data, chooser, "choose", rate, CHOOSING_SEED, STEPS) for rate in RATES]


def rate_of(results: Results, data: str, way: str) -> float:
    """The rate with the lowest loss on the part for choosing."""
    jobs = choosers(data, way)
    return min(jobs, key=lambda job: results.get(job, {"loss": math.inf})["loss"]).rate


def seeds_of(results: Results, data: str, way: str, steps: int) -> list[dict[str, Any]]:
    """The reported runs of a way, by seed from 0 on."""
    jobs = _finals(results, data, way, steps, MOST_SEEDS)
    return [results[job] for job in jobs if job in results]


def differences(runs: list[Any], base: list[Any], measure: str) -> list[float]:
    """To the run of `base` with the same seed, where neither was stopped."""
    pairs = zip(runs, base, strict=False)
    return [r[measure] - b[measure] for r, b in pairs if None not in (r[measure], b[measure])]


def overrides_of(job: Job) -> list[str]:
    """The settings of a run beside configs/elpv_vit_small.yaml."""
    way = WAYS[job.way]
    rest = (job.rate, job.seed, job.steps, job.part)
    said = settings_of(job.data, way.reversible, way.coefficients, *rest)
    return [*said, "train.micro_batch=16"]


def run_all(jobs: list[Job], workers: int) -> Results:
    """The last validation of each job, with its failures and drift; each kept when it is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dr2dist.training.run"])
    results = {}
    where = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(in_passing, job): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(futures), desc=jobs[0].way):
            job, result = futures[future], future.result()
            results[job] = result
            entry = {"job": job._asdict(), "date": datetime.date.today().isoformat(), **where}
            kept.add(RECORDS, {**entry, "result": result})
    return results


def in_passing(job: Job) -> dict[str, Any]:
    """`one_run` in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return one_run(overrides_of(job), Path(folder) / "run")


def write_page(results: Results, arguments: argparse.Namespace) -> str:
    """The page."""
    text = [
        "# The frontier of beta",
        "",
        "Written by `python -m benchmarks.frontier --workers 2` on "
        f"{platform.machine()}, {os.cpu_count()} cores, {datetime.date.today().isoformat()}; every "
        "run is a line of `benchmarks/results/frontier.jsonl`.",
        "",
        f"A pretrained ViT-S/14 (22 M parameters) at 56 pixels, {STEPS} steps of 16 "
        "images, AdamW, fp32, one rank; alpha is 1 - beta and constant where only beta is said. "
        "The learning rate is the one of "
        f"{', '.join(f'{rate:g}' for rate in RATES)} with the lowest loss on a part of the "
        "training data. Held-out images are looked at once, after the last step. Differences are "
        "to conventional finetuning with the same seed; ± is the 95 % interval of their mean by "
        "Student's t. Short runs on a small model: this shows what breaks and what does not, not "
        "the last point of accuracy.",
        "",
    ]
    for data in arguments.data:
        text += _table(results, data, arguments.ways, STEPS)
    for data in arguments.data:
        if seeds_of(results, data, CONVENTIONAL, LONGER_STEPS):
            text += _table(results, data, LONGER, LONGER_STEPS)
    return "\n".join([*text, *_choice(results, arguments)])


def _choice(results: Results, arguments: argparse.Namespace) -> list[str]:
    """Which constant beta the rule takes, by the equations of arXiv 2401.04105 and with a gain."""
    plain, *of_plain = _judge(results, arguments, BETAS)
    gained, *of_gained = _judge(results, arguments, GAINS)
    rule = (
        "The rule takes the setting with the fewest discarded bits whose interval's lower end is "
        f"above {-HALF_WIDTH:g} on all data. By the equations of arXiv 2401.04105 this is {plain}; "
        f"the default is {DEFAULT}, at which the figures of README.md were measured. With a gain, "
        f"which those equations do not have (docs/method.md), it is {gained}."
    )
    return ["## What to take", "", rule, "", *of_plain, *of_gained, ""]


def _judge(
    results: Results, arguments: argparse.Namespace, ways: dict[float, str]
) -> tuple[str, ...]:
    """The way that the rule takes, of those that were run on all data, or on some and do not keep
    to it there; then a line for each."""
    lines, chosen = [], None
    for beta, way in sorted(ways.items(), reverse=True):  # the fewest bits first
        lower: list[float] = []
        for data in arguments.data:
            runs, base = (seeds_of(results, data, w, STEPS) for w in (way, CONVENTIONAL))
            values = differences(runs, base, "accuracy")
            if len(values) >= LEAST_SEEDS:
                lower.append(statistics.mean(values) - half_width(values))
        ends = ", ".join(f"{value:+.3f}" for value in lower)
        bits = math.ceil(-math.log2(beta))
        if lower and min(lower) <= -HALF_WIDTH:
            lines.append(f"- {way}, {bits} bit(s): lower ends {ends}: no")
        elif len(lower) < len(arguments.data):
            lines.append(f"- {way}, {bits} bit(s): not run on all data")
        else:
            chosen = chosen or way
            lines.append(f"- {way}, {bits} bit(s): lower ends {ends}: yes")
    return (chosen or "none of those run", *lines)


def _table(results: Results, data: str, ways: Sequence[str], steps: int) -> list[str]:
    base = seeds_of(results, data, CONVENTIONAL, steps)
    title, said = DATA[data].title, ""
    if steps != STEPS:
        title += f", {steps} steps"
        said = f" Runs of `--steps {steps} --data {data}`, at the learning rates of {STEPS} steps."
    lines = [
        f"## {title}",
        "",
        f"{int(base[0]['samples'])} held-out images.{said}",
        "",
        "| | lr | seeds | accuracy | balanced | difference in accuracy | in balanced accuracy |"
        " worst drift | failures |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        runs = seeds_of(results, data, way, steps)
        if not runs:  # not run yet
            continue
        rate = rate_of(results, data, way)
        drifts = [run["worst_drift"] for run in runs]
        cells = [
            f"{way}{_stopped(runs)}",
            f"{rate:g}",
            str(len(runs)),
            *(_mean([run[measure] for run in runs]) for measure in MEASURES),
            *("" if way == CONVENTIONAL else _interval(runs, base, m) for m in MEASURES),
            "" if None in drifts else f"{worst_drift(drifts):.1e}",
            str(sum(run["certificate_failures"] for run in runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_of_16_bits(results, data, steps)]


def _of_16_bits(results: Results, data: str, steps: int) -> list[str]:
    """States of 16 bits against those of 32, seed by seed."""
    runs, base = (seeds_of(results, data, way, steps) for way in (BITS16, DEFAULT))
    if not runs:
        return []
    found = ", ".join(f"{_interval(runs, base, m)} in {m.replace('_', ' ')}" for m in MEASURES)
    return [f"16 bits against 32, of the same seeds: {found}.", ""]


def _stopped(runs: list[Any]) -> str:
    count = sum(run["accuracy"] is None for run in runs)
    return f" ({count} stopped)" if count else ""


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if known else ""


def _interval(runs: list[Any], base: list[Any], measure: str) -> str:
    values = differences(runs, base, measure)
    return interval(values) if values else ""


if __name__ == "__main__":
    main()
