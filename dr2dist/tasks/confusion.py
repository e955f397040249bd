"""A confusion matrix as a picture of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dr2dist.pictures import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 40
"""Classes of the matrix at most; of more, those that are confused most."""
LISTED = 40
"""Pairs of classes in the table of what the matrix does not show."""
NUMBERED = 20
"""Classes up to which cells have numbers."""


def draw_confusion(report: Mapping[str, Any]) -> Figure:
    """Shares of each label's predictions, with a table of the pairs that are not in the matrix.

    report: confusion (counts, rows labels, columns predictions), classes, and the numbers of the
    title.
    """
    from matplotlib.figure import Figure

    counts = torch.tensor(report["confusion"], dtype=torch.float64)
    names = [plain(n if len(n) <= 24 else f"{n[:23]}…") for n in report["classes"]]
    chosen = _most_confused(counts)
    pairs = _pairs_outside(counts, chosen)
    side = max(4.0, 1 + len(chosen) / 3)
    figure = Figure(figsize=(side * (1.6 if pairs else 1.0), side), layout="constrained")
    left, right = (
        figure.subplots(1, 2, width_ratios=(1, 0.6)) if pairs else (figure.subplots(), None)
    )
    _matrix(left, counts, chosen, names)
    left.set_title(
        f"accuracy {report['accuracy']:.3f}, balanced {report['balanced_accuracy']:.3f}, "
        f"calibration error {report['calibration_error']:.3f}",
        fontsize=9,
    )
    if right is not None:
        _table(right, pairs, names)
    return figure


def _most_confused(counts: Tensor) -> list[int]:
    """Rows and columns of the matrix, in the order of labels."""
    wrong = counts - counts.diag().diag()
    each = wrong.sum(0) + wrong.sum(1)
    return sorted(each.argsort(descending=True, stable=True)[:SHOWN].tolist())


def _pairs_outside(counts: Tensor, chosen: Sequence[int]) -> list[tuple[int, int, int]]:
    """(label, prediction, samples) of the most frequent confusions that the matrix leaves out."""
    rest = counts - counts.diag().diag()
    inside = torch.tensor(list(chosen))
    rest[inside[:, None], inside] = 0
    values, places = rest.flatten().sort(descending=True, stable=True)
    found = zip(values[:LISTED].tolist(), places[:LISTED].tolist(), strict=True)
    return [(*divmod(place, len(rest)), int(value)) for value, place in found if value]


def _matrix(axes: Any, counts: Tensor, chosen: Sequence[int], names: Sequence[str]) -> None:
    index = torch.tensor(list(chosen))
    shares = counts[index] / counts[index].sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares[:, index], vmin=0, vmax=1, cmap="Blues")
    labels = [names[place] for place in chosen]
    axes.set_xticks(range(len(chosen)), labels, rotation=90)
    axes.set_yticks(range(len(chosen)), labels)
    if len(chosen) <= NUMBERED:
        for row, label in enumerate(chosen):
            for column, found in enumerate(chosen):
                text = f"{counts[label, found]:.0f}"
                axes.text(column, row, text, ha="center", va="center")
    kept = "" if len(chosen) == len(counts) else f" ({len(chosen)} most confused of {len(counts)})"
    axes.set_xlabel(f"prediction{kept}")
    axes.set_ylabel("label")


def _table(axes: Any, pairs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> None:
    axes.axis("off")
    rows = [[names[label], names[found], str(count)] for label, found, count in pairs]
    table = axes.table(rows, colLabels=("label", "prediction", "samples"), loc="upper center")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
