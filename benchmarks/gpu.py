"""Exact reversal beside checkpointing on one GPU: time and memory of a training step in bf16.

    benchmarks/gpu.sh [--models base large giant] [--cases ...] [--minutes 10] [--smoke]

Each model in each way is a process of its own. All end within the minutes given: what has no time
left is printed as not run. --smoke: a tiny model, on the CPU too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dr2dist.bench.cases import Spec
from dr2dist.bench.names import COMPILED, CONVENTIONAL, EXACT_COMPILED, FAR, OFFLOADED, PER_BLOCK
from dr2dist.bench.process import CaseError, Process
from dr2dist.errors import UserError

CASES = (
    PER_BLOCK,
    CONVENTIONAL,
    "exact 16 bits",
    "exact 16 bits sliced",
    FAR,
    "exact",
    EXACT_COMPILED,
    OFFLOADED,
    COMPILED,
)
"""Checkpointing first, for all others are told as multiples of it."""
ROUNDS = 7
WARM = 2
"""Steps before them, in which kernels are chosen and compiled."""
SPARE = 25.0
"""Seconds kept for what stands before the first case (imports) and for printing."""
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Size:
    """A model and its step. slices: samples of each, where a way is sliced."""

    model: str
    batch: int
    slices: int
    pixels: int = 224
    depth: int | None = None


SIZES = {
    "base": Size("vit_base_patch16_224", 256, 64),
    "large": Size("vit_large_patch16_224", 128, 32),
    "giant": Size("vit_giant_patch14_224", 64, 16),
}
SMOKE = {"tiny": Size("vit_tiny_patch16_224", 4, 2, 32, 2)}


@dataclass
class Row:
    """What was found of a model in one way; why not, otherwise. Bytes, seconds of steps."""

    size: Size
    case: str
    seconds: float = 0.0
    growth: int = 0
    peak: int = 0
    failed: str = ""


def measure(size: Size, case: str, end: float) -> Row:
    """In a process of its own that is over by the time `end`."""
    spec = Spec(
        case, size.model, size.pixels, size.depth, 0.9, 0.1, {"chunk_size": size.slices}, bf16=True
    )
    row = Row(size, case)
    if time.monotonic() >= end:
        row.failed = "not run: no time was left"
        return row
    try:
        with Process(spec, exact_memory=False) as process:
            found = process.ask("growth", end - time.monotonic(), batch=size.batch)
            row.growth, row.peak = found["growth"], found["peak"]
            times = [
                process.ask("seconds", end - time.monotonic(), batch=size.batch)["seconds"]
                for _ in range(WARM + ROUNDS)
            ]
            row.seconds = statistics.median(times[WARM:])
    except CaseError as error:
        over = time.monotonic() >= end
        row.failed = "not run to its end: no time was left" if over else f"failed: {error}"
    return row


def rows(sizes: Sequence[Size], cases: Sequence[str], minutes: float) -> Iterator[Row]:
    """One after the other, each with the time that those before it have left."""
    end = time.monotonic() + 60 * minutes - SPARE
    for size in sizes:
        for case in cases:
            yield measure(size, case, end)


def table(found: Iterable[Row], device: str) -> Iterator[str]:
    """Each row as it is found, with times as multiples of the same model's checkpointing."""
    yield (
        f"weights and tokens in bf16, alpha 0.9, beta 0.1; medians of {ROUNDS} steps (forward, "
        f"backward) after {WARM}; growth of the step's peak without weights and gradients. "
        f"{device}, torch {torch.__version__}.\n"
    )
    yield (
        "| model | way | batch | ms a step | images/s | checkpoint per block = 1 | growth, MiB | "
        "peak, GiB |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    base: dict[Size, float] = {}
    for row in found:
        start = f"| {row.size.model} | {row.case} | {row.size.batch} |"
        if row.failed:
            yield f"{start} {row.failed} | | | | |"
            continue
        if row.case == PER_BLOCK:
            base[row.size] = row.seconds
        ratio = f"{row.seconds / base[row.size]:.2f}" if row.size in base else ""
        yield (
            f"{start} {1e3 * row.seconds:.1f} | {row.size.batch / row.seconds:.0f} | {ratio} | "
            f"{row.growth / MIB:.0f} | {row.peak / GIB:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--minutes", type=float, default=10.0, help="after which all has ended")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, also without a GPU")
    given = parser.parse_args(arguments)
    if not (given.smoke or torch.cuda.is_available()):
        print("gpu.sh: found no GPU that torch can use; --smoke runs without one", file=sys.stderr)
        sys.exit(2)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    sizes = list(SMOKE.values()) if given.smoke else [SIZES[model] for model in given.models]
    try:
        for line in table(rows(sizes, given.cases, given.minutes), name):
            print(line, flush=True)
    except UserError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
