"""The bench command: its arguments, the order of the measurements, and its files."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ByteSize, TypeAdapter, ValidationError

from dr2dist.arguments import path
from dr2dist.bench.names import BUDGET, CASES, CONVENTIONAL, LIBRARIES, USUAL, check_case
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write, check_can_be_made
from dr2dist.status import say

MEASURES = ("memory", "time", "batch", "resolution")


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    bench.add_argument("--model", default="vit_small_patch16_224", help="timm's name of a model")
    bench.add_argument("--output", type=path, required=True, help="folder to write to")
    bench.add_argument(
        "--measure", nargs="+", choices=MEASURES, default=["memory", "time"], help="what"
    )
    bench.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help=f"what to compare: {', '.join(CASES)}; default: what this machine can be asked for",
    )
    bench.add_argument("--size", type=int, default=224, help="pixels of a side")
    bench.add_argument(
        "--options", default="{}", help="of the model, as model.options: '{frames: 32}' of clips"
    )
    bench.add_argument("--depths", nargs="+", type=int, help="blocks; default: the model's own")
    bench.add_argument("--alpha", type=float, help="default: 1 - beta")
    bench.add_argument("--beta", type=float, help="default: that of runs, at their start")
    bench.add_argument("--bf16", action="store_true", help="weights, images and tokens in bf16")
    bench.add_argument("--batches", nargs=2, type=int, default=[8, 16], help="slope between")
    bench.add_argument("--chunk-size", type=int, default=4, help="samples per slice, where sliced")
    bench.add_argument("--time-batch", type=int, default=8, help="samples of a timed step")
    bench.add_argument("--rounds", type=int, default=3, help="timed steps of each case")
    bench.add_argument("--limit", default="3GiB", help="of the process, for the largest batch")
    bench.add_argument("--sizes", nargs=2, type=int, default=[448, 1344], help="slope between")
    bench.add_argument("--chunk-tokens", type=int, default=512, help="per slice of one image")
    bench.add_argument("--size-limit", default="4GiB", help="of the process, for the largest image")
    bench.set_defaults(command=run)


def run(given: argparse.Namespace) -> int:
    """Measures, writing the files anew after each case, and prints the table. Raises UserError for
    what all need and one case's process ended in."""
    from dr2dist.bench.process import CaseError

    try:
        return _run(given)
    except CaseError as error:
        raise UserError(f"bench: {error}") from None


def _run(given: argparse.Namespace) -> int:
    from dr2dist.bench import measure
    from dr2dist.bench.cases import Spec
    from dr2dist.config.coefficients import Conserve
    from dr2dist.reversible import Setting

    _check(given)
    check_can_be_made(given.output, "--output: ")
    if given.beta is None:
        given.beta = Conserve().beta[0]
    if given.alpha is None:
        given.alpha = 1 - given.beta
    try:
        Setting(alpha=given.alpha, beta=given.beta)
    except ValueError as error:
        raise UserError(f"bench: {error}") from None
    cases = _cases(given.cases)
    depths = given.depths or [None]
    first = Spec(
        CONVENTIONAL, given.model, given.size, depths[0], given.alpha, given.beta,
        {"chunk_size": given.chunk_size}, bf16=given.bf16, options=given.options,
    )  # fmt: skip
    specs = [replace(first, case=case) for case in cases if case != BUDGET]
    results = _begin(given, cases)
    results |= measure.facts(first)

    def keep(found: Iterable[tuple[str, Any]], *place: str) -> None:
        """Writes each case's result as it comes: a measurement may take long."""
        lines = results
        for name in place:
            lines = lines.setdefault(name, {})
        for case, line in found:
            lines[case] = line
            write(results, given.output)

    if "memory" in given.measure or "batch" in given.measure:
        for depth in depths:
            deep = [replace(spec, depth=depth) for spec in specs]
            keep(measure.memory(deep, tuple(given.batches)), "memory", str(depth or "own"))
    if "time" in given.measure:
        timed = list(specs)
        if BUDGET in cases:
            timed.append(measure.budget_spec(first, given.time_batch))
        results["time"] = measure.times(timed, given.time_batch, given.rounds)
        exact = [spec for spec in specs if spec.case.startswith("exact")]
        keep(measure.share_of_arithmetic(exact, given.time_batch, given.rounds), "arithmetic")
    if "batch" in given.measure:
        lines = results["memory"][str(depths[0] or "own")]
        keep(measure.confirm(specs, lines, results["limit"]), "batch")
    if "resolution" in given.measure:
        slices = {"chunk_size": 1, "chunk_tokens": given.chunk_tokens}
        large = [replace(spec, slices=slices) for spec in specs]
        keep(measure.resolution(large, tuple(given.sizes), results["patch"]), "resolution")
    write(results, given.output)
    print((given.output / "results.md").read_text("utf-8"), end="")
    return 0


def _check(given: argparse.Namespace) -> None:
    try:
        given.options = yaml.safe_load(given.options)
    except yaml.YAMLError as error:
        raise UserError(f"--options: {one_line(error)}") from None
    if not isinstance(given.options, dict):
        raise UserError(f"--options: found {given.options!r}, allowed is such as {{frames: 32}}")
    if given.depths and "depth" in given.options:
        raise UserError("--options: says a depth, and --depths others: allowed is one of them")
    for name in ("batches", "sizes"):
        low, high = getattr(given, name)
        if not 0 < low < high:
            raise UserError(f"--{name}: found {low} {high}, the second must be the larger")
    for name in ("rounds", "time_batch", "chunk_size", "chunk_tokens", "size"):
        if getattr(given, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')}: found {getattr(given, name)}, allowed is 1 or more"
            )


def _cases(asked: list[str] | None) -> list[str]:
    """Those asked for, checked, or the usual ones but for libraries that are not installed."""
    for case in asked or []:
        check_case(case)
    cases = [case for case in CASES if case in (USUAL if asked is None else asked)]
    missing = [c for c in cases if c in LIBRARIES and importlib.util.find_spec(c) is None]
    if asked is None:
        for case in missing:
            say(f"left out: {case}, which is not installed (pip install 'dr2dist[bench]')")
        return [case for case in cases if case not in missing]
    if missing:
        raise UserError(
            f"--cases: {', '.join(missing)} is not installed: pip install 'dr2dist[bench]', or "
            "name the cases to compare"
        )
    return cases


def _bytes(name: str, text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise UserError(f"--{name}: found '{text}', allowed is a size like 3GiB") from None


def _begin(given: argparse.Namespace, cases: list[str]) -> dict[str, Any]:
    """The results that the folder holds already, or none yet, with this command noted.

    Raises UserError if they were measured with other settings.
    """
    import torch

    settings = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "limit": _bytes("limit", given.limit),
        "size_limit": _bytes("size-limit", given.size_limit),
    }
    settings["options"] = given.options or None
    named = ("model", "size", "beta", "alpha", "bf16", "batches", "sizes", "chunk_size")
    settings |= {name: getattr(given, name) for name in (*named, "chunk_tokens")}
    path = given.output / "results.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name, value in settings.items():
        found = known.get(name)
        if known and found != value:
            raise UserError(
                f"--output: {given.output} holds results with {name} {found}, not {value}: choose "
                "another folder"
            )
    command = f"{datetime.date.today().isoformat()}: {shlex.join(['dr2dist', *sys.argv[1:]])}"
    present = known.get("cases", [])
    return {
        **known,
        **settings,
        "commands": [*known.get("commands", []), command],
        "cases": [*present, *(case for case in cases if case not in present)],
    }


def write(results: dict[str, Any], output: Path) -> None:
    """results.json, results.md and results.png of what is measured so far."""
    from dr2dist.bench.report import plot, table

    with atomic_write(output / "results.json") as aside:
        aside.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    with atomic_write(output / "results.md") as aside:
        aside.write_text(table(results), "utf-8")
    if any(measure in results for measure in ("memory", "time", "resolution")):
        plot(results, output / "results.png")
