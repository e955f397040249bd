"""What is found in films, and what is there, over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dr2dist.pictures import plain
from dr2dist.tasks.task import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4
"""Films of a picture."""
BEST = 20
"""Spans of a film that are drawn, those of the highest scores."""

Action = tuple[float, float, str]
"""Start and stop in seconds, and the class."""


def draw_timelines(
    classes: Sequence[str], rows: Sequence[Row], there: Sequence[Sequence[Action]] | None = None
) -> Figure | None:
    """Axes for each of the first films: bars for what is found, as dark as their scores are high,
    and above them for what is there, one colour a class; None without films.

    rows: path, seconds and annotations of each film.
    """
    from matplotlib.figure import Figure

    if not rows:
        return None
    count = min(SHOWN, len(rows))
    figure = Figure(figsize=(8, 1.6 * count), layout="constrained")
    for number, row in enumerate(rows[:count]):
        axes = figure.add_subplot(count, 1, number + 1)
        best = row["annotations"][:BEST]
        for each in best:
            strength = each["score"] / best[0]["score"]
            _bar(axes, classes, (*each["segment"], each["label"]), 0, strength)
        for action in there[number] if there is not None else ():
            _bar(axes, classes, action, 1, 1.0)
        names = ["found"] if there is None else ["found", "there"]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(0, max(row["seconds"], 1e-3))
        axes.set_title(plain(Path(row["path"]).name), fontsize=8)
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        if named:
            axes.legend(named.values(), named.keys(), fontsize=6, loc="upper right")
    axes.set_xlabel("seconds")
    return figure


def _bar(axes: Any, classes: Sequence[str], action: Action, level: int, strength: float) -> None:
    start, stop, name = action
    from matplotlib import colormaps

    colour = colormaps["tab20"](classes.index(name) % 20)
    bars = axes.barh(level, stop - start, left=start, color=colour, alpha=strength)
    bars[0].set_label(plain(name))
