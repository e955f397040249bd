"""How long steps wait for a checkpoint, written at once and behind the steps: 304 M parameters.

    python -m benchmarks.checkpoint_pause [--output runs/checkpoint_pause]

One rank, fp32, AdamW: 3.4 GiB a checkpoint. Pixels are few, so that steps are short: a ViT-L's own
would hide more of the writing. Needs 12 GiB of memory and 8 GiB of disk; takes some ten minutes.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.evidence import one_run
from benchmarks.signals import make_small_shards

EVERY, TIMES = 8, 3
SETTINGS = [
    "model={name: vit_large_patch16_224, weights: random, image_size: 32}",
    "task.num_classes=2",
    "train.micro_batch=2",
    "train.log_every=1",
    f"train.steps={EVERY * TIMES + EVERY // 2}",
    "train.epochs=null",
    f"checkpoint={{steps: {EVERY}, minutes: null, keep: 1}}",
    "parallel={zero: 0}",
    "data.val=null",
    "train.validate_every=null",
]


def main() -> None:
    """Measures both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/checkpoint_pause"))
    given = parser.parse_args()
    if not (given.output / "shards").exists():
        make_small_shards(given.output)
    rows = {}
    for name, behind in (("at once", False), ("behind the steps", True)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[name] = pool.apply(measure, (given.output, behind))
    where = f"{platform.machine()}, {datetime.date.today().isoformat()}"
    lines = [
        f"| {where} | pause, s | step between, s | whole run, s |",
        "|---|---|---|---|",
        *(f"| {name} | {' | '.join(map('{:.2f}'.format, row))} |" for name, row in rows.items()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def measure(output: Path, behind: bool) -> tuple[float, float, float]:
    """(mean pause of a checkpoint, median step without one, the whole run) in seconds."""
    from dr2dist.training.checkpoint_manager import CheckpointManager
    from dr2dist.training.run_files import METRICS, read_lines

    save, folder = CheckpointManager.save, output / ("behind" if behind else "at_once")

    def chosen(self: CheckpointManager, engine: Any, progress: Any, wanted: bool = False) -> None:
        save(self, engine, progress, wanted and behind)

    CheckpointManager.save = chosen  # type: ignore[method-assign]
    begin = time.monotonic()
    one_run([*SETTINGS, f"data.train={output / 'shards' / 'train'}"], folder)
    lines = read_lines(folder / METRICS)
    pauses = sum(line["checkpoint_pause"] for line in lines) / TIMES
    steps = [2 / line["samples_per_second"] for line in lines]
    return pauses, statistics.median(steps), time.monotonic() - begin


if __name__ == "__main__":
    main()
