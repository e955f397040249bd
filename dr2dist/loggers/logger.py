"""What a logger is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
