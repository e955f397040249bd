"""The time of an exact training step in two versions of the source, step by step side by side.

    python benchmarks/versions.py OLD_CHECKOUT [NEW_CHECKOUT]

Each version trains in a process of its own; the two take turns, so that what else the machine does
meets both. Printed is the median, over rounds, of the new version's time divided by the old one's.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

WARM_UP = 2


class Case(NamedTuple):
    """A model of timm's on square images, and how it is converted."""

    model: str
    pixels: int
    batch: int
    options: dict[str, Any]


_WIDTHS = (("vit_small_patch16_224", 224, 16), ("vit_base_patch16_224", 160, 16))
_PAIR = {"alpha": 0.9, "beta": 0.1}
CASES = {
    f"{model}, {pixels} px, batch {batch}, {'slices of 4' if sliced else 'whole'}": Case(
        model, pixels, batch, {**_PAIR, **({"chunk_size": 4} if sliced else {})}
    )
    for model, pixels, batch in _WIDTHS
    for sliced in (False, True)
}


def work(name: str) -> None:
    """In a version's own process: one step and its seconds for each line that arrives."""
    import time

    import timm
    import torch

    import dr2dist

    case = CASES[name]
    torch.manual_seed(0)
    model = timm.create_model(case.model, img_size=case.pixels, num_classes=10)
    net = dr2dist.convert(model, **case.options).train()
    images = torch.randn(case.batch, 3, case.pixels, case.pixels)
    labels = torch.arange(case.batch) % 10
    for _ in sys.stdin:
        start = time.perf_counter()
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        sys.stdout.flush()


@contextmanager
def process(checkout: Path, name: str) -> Iterator[Any]:
    """A version at work; the context gives what makes a step and returns its seconds."""
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--work", name],
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    to_child, from_child = child.stdin, child.stdout

    def step() -> float:
        to_child.write("\n")
        to_child.flush()
        line = from_child.readline()
        if not line:
            raise SystemExit(f"{checkout}: the process ended; its errors stand above")
        return float(line)

    try:
        yield step
    finally:
        to_child.close()
        child.wait()


def compare(old: Path, new: Path, name: str, rounds: int) -> tuple[float, float, float]:
    """(median of new / old, median seconds of old, of new)."""
    with ExitStack() as stack:
        steps = [stack.enter_context(process(checkout, name)) for checkout in (old, new)]
        for _ in range(WARM_UP):
            for step in steps:
                step()
        times = [
            [step() for step in (steps if turn % 2 else steps[::-1])] for turn in range(rounds)
        ]
    pairs = [pair if turn % 2 else pair[::-1] for turn, pair in enumerate(times)]
    ratios = [after / before for before, after in pairs]
    return median(ratios), median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def main() -> None:
    """Prints one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, nargs="?", help="a checkout of the version before")
    parser.add_argument("new", type=Path, nargs="?", default=Path(__file__).parent.parent)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work)
        return
    if given.old is None or not (given.old / "dr2dist").is_dir():
        parser.error(f"old is {given.old}, needed is a checkout that holds the folder dr2dist")
    sys.stdout.write(f"{platform.machine()}, {os.cpu_count()} cores, {given.rounds} rounds\n")
    sys.stdout.write("| case | new / old | old, s | new, s |\n|---|---|---|---|\n")
    for name in given.cases:
        ratio, before, after = compare(given.old, given.new, name, given.rounds)
        sys.stdout.write(f"| {name} | {ratio:.3f} | {before:.2f} | {after:.2f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
