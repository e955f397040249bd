"""Weights & Biases: project, entity and mode are said by its own variables, such as WANDB_MODE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dr2dist.loggers.logger import ended_well, known_run, remember_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "wandb-id"
"""The file of a run's folder by which a run that goes on is the same one there."""


class Wandb:
    """See Logger."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """See Logger."""
        import wandb

        run_id = known_run(folder, ID, step)
        self._run: Any = wandb.init(
            dir=str(folder), name=folder.name, id=run_id, resume="allow", config=dict(settings)
        )
        remember_run(folder, ID, self._run.id)
        # Its own count of steps cannot go back to a checkpoint's.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Logger."""
        self._run.log({"step": step, **values})

    def show(self, step: int, picture: Figure) -> None:
        """See Logger."""
        import wandb

        self._run.log({"step": step, "held_out": wandb.Image(picture)})

    def end(self, summary: Mapping[str, Any]) -> None:
        """See Logger."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if ended_well(summary) else 1)
