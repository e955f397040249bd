"""The measurements: each takes cases to plain values; those of memory case by case."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from dr2dist.bench.cases import Spec
from dr2dist.bench.names import BUDGET, CONVENTIONAL, PER_BLOCK
from dr2dist.bench.process import CaseError, Process, ask_once

Found = dict[str, Any]
ByCase = Iterator[tuple[str, Found]]

SPARE = 0.97
"""A limit is aimed at with this part of what the slope promises."""
GRAIN = 2 * 65536
"""Bytes in which two peaks may differ by what the allocator gives back late."""


def facts(spec: Spec) -> Found:
    """Of a model: elements of a sample's tokens, pixels of a patch, functions, device."""
    return ask_once(spec, "facts")


def memory(specs: Sequence[Spec], batches: tuple[int, int]) -> ByCase:
    """Growth of peak memory at two batches, and its slope in bytes per sample."""
    return _each(specs, "memory", lambda spec: _line(spec, [(batch, spec) for batch in batches]))


def resolution(specs: Sequence[Spec], sizes: tuple[int, int], patch: int) -> ByCase:
    """Growth of one image at two sizes, and its slope in bytes per token of patch x patch."""

    def one(spec: Spec) -> Found:
        points = [((size // patch) ** 2, replace(spec, size=size)) for size in sizes]
        return _line(spec, points, batch=1)

    return _each(specs, "resolution", one)


def _line(spec: Spec, points: list[tuple[int, Spec]], batch: int | None = None) -> Found:
    """Growth and the process's peak at two points, the slopes between them and the peak at 0, and
    the slopes' error, from how two steps at the first point differ."""
    (low, first), (high, second) = points
    one = ask_once(first, "growth", batch=batch or low, steps=2)
    other = ask_once(second, "growth", batch=batch or high)
    noise = max(2 * one["spread"], GRAIN)  # of both
    slopes = {key: (other[key] - one[key]) / (high - low) for key in ("growth", "peak")}
    return {
        "at": [low, high],
        "growth": [one["growth"], other["growth"]],
        "slope": slopes["growth"],
        "error": noise / (high - low),
        "peak_slope": slopes["peak"],
        "peak_at_0": one["peak"] - low * slopes["peak"],
    }


def error_of(line: Found) -> float:
    """Of a line's slope; versions before did not measure it."""
    return float(line.get("error", 0.0))


def largest(line: Found, limit: int) -> int:
    """What a line's peak reaches within a limit of bytes for the process."""
    slope = max(line["peak_slope"], error_of(line))
    return max(0, int((limit - line["peak_at_0"]) / slope))


def confirm(specs: Sequence[Spec], lines: dict[str, Found], limit: int) -> ByCase:
    """The largest batch under a limit: predicted from the slopes, then run and found within it."""

    def one(spec: Spec) -> Found:
        predicted = largest(lines[spec.case], limit)
        batch, peak = int(predicted * SPARE), limit + 1
        while batch:
            peak = ask_once(spec, "growth", batch=batch)["peak"]
            if peak <= limit:
                break
            batch = min(batch - 1, int(batch * SPARE * limit / peak))
        return {"predicted": predicted, "batch": batch, "peak": peak if batch else None}

    known = [spec for spec in specs if "failed" not in lines[spec.case]]
    return _each(known, "largest batch", one)


def budget_spec(spec: Spec, batch: int) -> Spec:
    """The case budget, with half of what conventional training keeps at a batch."""
    kept = ask_once(replace(spec, case=CONVENTIONAL), "growth", batch=batch)["growth"]
    return replace(spec, case=BUDGET, memory_budget=kept // 2)


def times(specs: Sequence[Spec], batch: int, rounds: int) -> dict[str, Found]:
    """Seconds of a step, all cases by turns in changing order, each in its process.

    Ratios are medians over rounds of a case's step to that of the same round.
    """
    found: dict[str, list[float]] = {spec.case: [] for spec in specs}
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(spec, exact_memory=False)) for spec in specs]
        for process in processes:
            process.ask("seconds", batch=batch)
        for number in tqdm(range(rounds), desc="step time"):
            for process in random.Random(number).sample(processes, len(processes)):
                found[process.spec.case].append(process.ask("seconds", batch=batch)["seconds"])
    return {case: _ratios(case, found) for case in found}


def _ratios(case: str, found: dict[str, list[float]]) -> Found:
    mine = found[case]
    result: Found = {"seconds": statistics.median(mine), "rounds": mine}
    for base in (CONVENTIONAL, PER_BLOCK):
        if base in found:
            pairs = zip(mine, found[base], strict=True)
            result[f"to {base}"] = statistics.median(one / other for one, other in pairs)
    return result


def share_of_arithmetic(specs: Sequence[Spec], batch: int, rounds: int) -> ByCase:
    """The part of a step that exact arithmetic takes: both measured by turns in one process."""

    def one(spec: Spec) -> Found:
        with Process(spec, exact_memory=False) as process:
            process.ask("seconds", batch=batch)
            parts = []
            for _ in range(rounds):
                own = process.ask("elementwise", batch=batch)["seconds"]
                parts.append(own / process.ask("seconds", batch=batch)["seconds"])
        return {"share": statistics.median(parts)}

    return _each(specs, "arithmetic", one)


def _each(specs: Sequence[Spec], title: str, one: Callable[[Spec], Found]) -> ByCase:
    """The result of each case; one whose process ended has its last words instead."""
    for spec in tqdm(specs, desc=title):
        try:
            yield spec.case, one(spec)
        except CaseError as error:
            yield spec.case, {"failed": str(error)}
