"""What is found in films, and what is there, over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from dr2dist.pictures import plain
from dr2dist.tasks.temporal.spans import Spans

SHOWN = 4
"""Films of a picture."""
BEST = 20
"""Spans of a film that are drawn, those of the highest scores."""


def draw_timelines(
    classes: Sequence[str],
    keys: Sequence[str],
    lengths: Sequence[float],
    found: Sequence[Spans],
    actions: Sequence[Tensor] | None,
) -> Figure:
    """A row of axes for each of some films: bars below for spans, as dark as their scores are high,
    above them for actions, one colour a class.

    lengths: seconds of each film. actions: [A, 3] each; None where they are not known.
    """
    count = min(SHOWN, len(lengths))
    figure = Figure(figsize=(8, 1.6 * count), layout="constrained")
    colours = matplotlib.colormaps["tab20"]
    for row in range(count):
        axes = figure.add_subplot(count, 1, row + 1)
        spans = found[row]
        best = spans.scores[0] if len(spans.scores) else 1.0
        each = list(zip(*spans, strict=True))[:BEST]
        bars = [(segment, label, 0, score / best) for segment, score, label in each]
        if actions is not None:
            bars += [((a, b), int(label), 1, 1.0) for a, b, label in actions[row].tolist()]
        for (start, stop), label, level, strength in bars:
            bar = axes.barh(level, stop - start, left=start, color=colours(label % 20))
            bar[0].set(alpha=float(strength), label=plain(classes[label]))
        axes.set_xlim(0, max(lengths[row], 1e-3))
        axes.set_yticks([0, 1] if actions is not None else [0])
        axes.set_yticklabels(["found", "there"] if actions is not None else ["found"])
        axes.set_title(plain(Path(keys[row]).name), fontsize=8)
        named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if named:
            axes.legend(named.values(), named.keys(), fontsize=6, loc="upper right")
    axes.set_xlabel("seconds")
    return figure
