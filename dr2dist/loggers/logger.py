"""What a logger is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dr2dist.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def known_run(folder: Path, name: str, step: int) -> str | None:
    """By what a run that goes on is known elsewhere: what `remember_run` wrote to a file of its
    folder; None for a new run."""
    path = folder / name
    return path.read_text("utf-8").strip() if step and path.exists() else None


def remember_run(folder: Path, name: str, run_id: str) -> None:
    """See `known_run`."""
    with atomic_write(folder / name) as aside:
        aside.write_text(f"{run_id}\n", "utf-8")


def ended_well(summary: Mapping[str, Any]) -> bool:
    """Whether a run has done what it was asked to, or may go on."""
    return summary["status"] in ("finished", "interrupted")


class Logger(Protocol):
    """A place that a run's values are sent to, by rank 0 alone.

    One that raises is told nothing more, and the run goes on; but a new run whose logger cannot
    start is refused.
    """

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Before anything else. folder: the run's, which is there. settings: the resolved
        configuration, section by section. step: applied optimiser steps that the run goes on from;
        0 for a new one. What was logged of later steps is of no account."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step, by name: train/loss, val/..., coefficients/beta, and so on."""

    def show(self, step: int, picture: Figure) -> None:
        """What the task draws of held-out samples."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """How the run ended: what summary.json holds; of one that ended by a mistake its status
        alone, "failed"."""
