"""Prints a table of finished runs and draws their curves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS: dict[str, Any] = {
    "alpha, beta at the end": lambda s: f"{s['alpha']:.3f}, {s['beta']:.3f}",
    "arithmetic, memory": lambda s: f"{s['arithmetic']}, {s['memory']}",
    "steps": lambda s: str(s["steps"]),
    "held-out images": lambda s: f"{s['last']['samples']:.0f}",
    "accuracy": lambda s: f"{s['last']['accuracy']:.3f}",
    "balanced accuracy": lambda s: f"{s['last']['balanced_accuracy']:.3f}",
    "certificate failures": lambda s: str(s["certificate_failures"]),
    "peak memory of a rank": lambda s: f"{s['peak_memory_bytes'] / 2**20:.0f} MiB",
    "seconds": lambda s: f"{s['seconds']:.0f}",
}


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The summaries side by side, as Markdown."""
    lines = ["| | " + " | ".join(summaries) + " |", "|---" * (len(summaries) + 1) + "|"]
    for name, cell in ROWS.items():
        cells = " | ".join(cell(summary) for summary in summaries.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def draw(runs: list[Path], picture: Path) -> None:
    """Loss, beta and held-out accuracy over the steps."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for axis, key in zip(axes, ("loss", "beta", "val_accuracy"), strict=True):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), marker=".", label=run.name)
            axis.set(xlabel="optimiser step", ylabel=key.replace("val_", "held-out "))
            axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    given = parser.parse_args()
    print(table({run.name: json.loads((run / "summary.json").read_text()) for run in given.runs}))
    draw(given.runs, given.picture)
    print(f"curves: {given.picture}")


if __name__ == "__main__":
    main()
