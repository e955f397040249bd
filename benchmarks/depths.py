"""What a step holds by depth, in bf16: bytes for each element of the tokens, beside a formula.

    python benchmarks/depths.py [--depths 12 24 48 96] [--batches 64 128] [--smoke]

A ViT-S whose weights and tokens are bf16, at the default's alpha 0.9 and beta 0.1. Each figure is
the slope of a step's peak from one batch to the other, stem and head included, over the elements of
a sample's tokens. On a GPU, where memory is the allocator's own count, all are measured in one
process, in minutes. --smoke: one block and two, on the CPU too.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from dr2dist.bench.cases import Spec
from dr2dist.bench.names import CONVENTIONAL, FAR, OFFLOADED, PER_BLOCK, PER_FOUR, PER_TWO
from dr2dist.bench.worker import Worker
from dr2dist.reversible import Setting

MODEL, PIXELS, BETA, SLICE = "vit_small_patch16_224", 224, 0.1, 16
BITS = Setting(1 - BETA, BETA).remainder_bits
BLOCK = 32
"""Bytes an element that a ViT block saves in bf16: two for each of its norms' inputs and outputs
and for attention's output, 6 for queries, keys and values, 8 for either side of its GELU."""

FORMULAS: dict[str, Callable[[int], float]] = {
    CONVENTIONAL: lambda depth: BLOCK * depth,
    PER_BLOCK: lambda depth: 2 * depth + BLOCK,
    PER_TWO: lambda depth: 2 * depth / 2 + 2 * BLOCK,
    PER_FOUR: lambda depth: 2 * depth / 4 + 4 * BLOCK,
    OFFLOADED: lambda depth: BLOCK,
    "exact sliced": lambda depth: 12 + 2 * depth * BITS / 8,
    "exact 16 bits sliced": lambda depth: 8 + 2 * depth * BITS / 8,
    FAR: lambda depth: 8 + 2 * BITS / 8,
}
"""Of a way, by blocks: what is kept of all blocks or functions, and what the one at work needs. A
slice's working set and the tensors between are not in it."""


def worker(case: str, depth: int) -> Worker:
    """A case's network and images."""
    return Worker(
        Spec(case, MODEL, PIXELS, depth, 1 - BETA, BETA, {"chunk_size": SLICE}, bf16=True)
    )


def slope(case: str, depth: int, batches: tuple[int, int]) -> float:
    """Bytes a sample."""
    net = worker(case, depth)
    one, other = (net.growth(batch)["growth"] for batch in batches)
    del net
    gc.collect()
    return float((other - one) / (batches[1] - batches[0]))


def table(cases: Sequence[str], depths: Sequence[int], batches: tuple[int, int]) -> Iterator[str]:
    """A row for each way, a column for each depth: measured, and the formula in brackets."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    yield (
        f"{MODEL}, weights and tokens in bf16, alpha {1 - BETA}, beta {BETA}, slices of {SLICE}, "
        f"batches {batches[0]} and {batches[1]}, {device}, torch {torch.__version__}.\n"
    )
    yield "| bytes an element, measured (formula) | " + " | ".join(map(str, depths)) + " |"
    yield "|---" * (len(depths) + 1) + "|"
    elements = worker(CONVENTIONAL, 1).facts()["elements"]
    for case in cases:
        found = [
            f"{slope(case, n, batches) / elements:.1f} ({FORMULAS[case](n):.0f})" for n in depths
        ]
        yield f"| {case} | " + " | ".join(found) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", nargs="+", type=int, default=[12, 24, 48, 96])
    parser.add_argument("--batches", nargs=2, type=int, default=[64, 128])
    parser.add_argument("--cases", nargs="+", choices=list(FORMULAS), default=list(FORMULAS))
    parser.add_argument("--smoke", action="store_true", help="two small depths, without a GPU too")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.depths, given.batches = [1, 2], [2, 4]
    elif not torch.cuda.is_available():
        print("depths.py: found no GPU that torch can use; --smoke runs without", file=sys.stderr)
        sys.exit(2)
    for line in table(given.cases, given.depths, tuple(given.batches)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
