"""The report command: runs side by side, as a table and a picture of their curves."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dr2dist.arguments import path
from dr2dist.errors import UserError
from dr2dist.files import check_file_output
from dr2dist.pictures import ENDINGS, plain, save_picture
from dr2dist.training.run_files import METRICS, SUMMARY, read_lines, read_summary

Cell = Callable[[Mapping[str, Any]], str]

COURSE: dict[str, Cell] = {
    "status": lambda run: run["status"] + (", ended early" if run["stopped_early"] else ""),
    "model": lambda run: run["model"],
    "alpha, beta at the end": lambda run: f"{run['alpha']:.3f}, {run['beta']:.3f}",
    "arithmetic, memory": lambda run: f"{run['arithmetic']}, {run['memory']}",
    "ranks": lambda run: f"{run['ranks']}, {run['stages']} stage(s)",
    "steps": lambda run: str(run["steps"]),
    "training loss": lambda run: f"{run['loss']:.4g}",
    "held-out samples": lambda run: f"{run['last']['samples']:.0f}",
    "best validation": lambda run: f"step {run['best']['step']}",
}
COSTS: dict[str, Cell] = {
    "certificate failures": lambda run: str(run["certificate_failures"]),
    "peak memory of a rank": lambda run: f"{run['peak_memory_bytes'] / 2**20:.0f} MiB",
    "samples a second": lambda run: f"{run['samples'] / run['seconds']:.3g}",
    "seconds": lambda run: f"{run['seconds']:.0f}",
}
"""Lines of the table, before and after the metrics. One that is empty for all runs is left out."""
MANY = 50
"""Steps from which on a picture may leave some of them outside."""
LEFT_OUT = ("step", "samples", "skipped")
"""What a validation says beside its metrics."""


class Run(NamedTuple):
    """A run's folder. summary: of one that goes on it says little. lines: of its metrics.jsonl."""

    name: str
    summary: dict[str, Any]
    lines: list[dict[str, Any]]

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of what is logged."""
        found = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dr2dist report` takes."""
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--picture", type=path, help="the curves; default: curves.png in the folder of the runs"
    )
    parser.set_defaults(command=report)


def report(given: argparse.Namespace) -> int:
    """`dr2dist report`."""
    common = Path(os.path.commonpath([os.path.relpath(folder) for folder in given.runs]))
    picture = given.picture or common / "curves.png"
    check_file_output(picture)
    if picture.suffix.lower() not in ENDINGS:
        raise UserError(f"--picture: {picture}: allowed endings are {', '.join(ENDINGS)}")
    names = _names(given.runs)
    runs = [read_run(folder, name) for folder, name in zip(given.runs, names, strict=True)]
    print(table(runs))
    draw(runs, picture)
    print(f"\ncurves: {picture}")
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell runs apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: is named twice")


def read_run(folder: Path, name: str) -> Run:
    """What a folder says. Raises UserError if it is none of a run, or its run has not begun."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder of a run")
    lines = read_lines(folder / METRICS)
    if not lines:
        raise UserError(f"{folder}: holds no {METRICS} with a step in it: no run has logged there")
    summary = read_summary(folder)
    if summary is None and (folder / SUMMARY).exists():
        raise UserError(f"{folder / SUMMARY}: is damaged")
    if summary is None:
        summary = {"status": "not ended", "stopped_early": False, "steps": lines[-1]["step"]}
    return Run(name, summary, lines)


def table(runs: Sequence[Run]) -> str:
    """The runs side by side, as Markdown."""
    metrics = {
        f"held-out {key.replace('_', ' ')}": _last(key) for run in runs for key in _metrics(run)
    }
    names = [run.name.replace("|", "\\|") for run in runs]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(runs) + 1) + "|"]
    for name, cell in {**COURSE, **metrics, **COSTS}.items():
        cells = [_text(cell, run) for run in runs]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _metrics(run: Run) -> list[str]:
    """Names of what its last validation measured."""
    last = run.summary.get("last") or {}
    return [key for key in last if key not in LEFT_OUT]


def _last(key: str) -> Cell:
    return lambda run: f"{run['last'][key]:.4g}"


def _text(cell: Cell, run: Run) -> str:
    try:
        return cell(run.summary)
    except (KeyError, TypeError, ZeroDivisionError):  # not there, or null
        return ""


def draw(runs: Sequence[Run], picture: Path) -> None:
    """Losses, the first metric that all runs were validated by, and coefficients, over steps."""
    from matplotlib.figure import Figure

    metric = _common_metric(runs)
    figure = Figure(figsize=(13 if metric else 9, 4), layout="constrained")
    loss, *middle, path = figure.subplots(1, 3 if metric else 2)
    for number, run in enumerate(runs):
        color = f"C{number}"
        loss.plot(*run.curve("loss"), color=color, linewidth=1)
        loss.plot(*run.curve("val_loss"), color=color, linestyle="--", marker="o", markersize=4)
        for axis in middle:
            axis.plot(*run.curve(f"val_{metric}"), color=color, marker="o", markersize=4)
        path.plot(*run.curve("alpha"), color=color)
        path.plot(*run.curve("beta"), color=color, linestyle=":")
    show_change(loss, *([v for run in runs for v in run.curve(k)[1]] for k in ("loss", "val_loss")))
    loss.set_title("loss: of training, and held out (dashed)")
    for axis in middle:
        axis.set_title(f"held-out {metric.replace('_', ' ')}")
    path.set(title="alpha, and beta (dotted)", ylim=(-0.05, 1.05))
    for axis in (loss, *middle, path):
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
    names = [plain(run.name) for run in runs]
    figure.legend(loss.get_lines()[::2], names, loc="outside lower center", ncols=4)
    save_picture(figure, picture)


def _common_metric(runs: Sequence[Run]) -> str:
    """Empty if there is none."""
    logged = [{key for line in run.lines for key in line} for run in runs]
    first = [key for line in runs[0].lines for key in line if key.startswith("val_")]
    for key in first:
        name = key.removeprefix("val_")
        if name not in ("loss", *LEFT_OUT) and all(key in keys for keys in logged):
            return name
    return ""


def show_change(axis: Any, training: list[float], held_out: list[float]) -> None:
    """Leaves the few training losses of a long run that are far beyond all others, as first steps'
    often are, outside of the picture."""
    if len(training) < MANY:
        return
    high = max(sorted(training)[int(0.98 * (len(training) - 1))], *held_out, 0.0)
    bottom, top = axis.get_ylim()
    if top > 2 * high - bottom:
        axis.set_ylim(top=high + 0.1 * (high - bottom))
