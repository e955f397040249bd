"""Weights & Biases: project, entity and mode are said by its own variables, such as WANDB_MODE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dr2dist.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "wandb-id"
"""The file of a run's folder by which a run that goes on is the same one there."""


class Wandb:
    """See Logger."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """See Logger."""
        import wandb

        known = folder / ID
        run_id = known.read_text("utf-8").strip() if step and known.exists() else None
        self._run: Any = wandb.init(
            dir=str(folder), name=folder.name, id=run_id, resume="allow", config=dict(settings)
        )
        with atomic_write(known) as aside:
            aside.write_text(f"{self._run.id}\n", "utf-8")
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
        done = summary["status"] in ("finished", "interrupted")
        self._run.finish(exit_code=0 if done else 1)
