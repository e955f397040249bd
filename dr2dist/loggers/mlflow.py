"""MLflow: server and experiment are said by its own variables, such as MLFLOW_TRACKING_URI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dr2dist.config.text import flat
from dr2dist.loggers.logger import ended_well, known_run, remember_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "mlflow-id"
"""The file of a run's folder by which a run that goes on is the same one there."""
LONGEST = 500
"""Letters of a setting's value that are kept."""


class Mlflow:
    """See Logger."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """See Logger."""
        import mlflow

        self._mlflow: Any = mlflow
        run_id = known_run(folder, ID, step)
        run: Any = mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name)
        if run_id is None:
            mlflow.log_params({key: str(v)[:LONGEST] for key, v in flat(settings).items()})
        remember_run(folder, ID, run.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Logger."""
        self._mlflow.log_metrics(dict(values), step=step)

    def show(self, step: int, picture: Figure) -> None:
        """See Logger."""
        self._mlflow.log_figure(picture, f"held_out/{step:08d}.png")

    def end(self, summary: Mapping[str, Any]) -> None:
        """See Logger."""
        self._mlflow.log_dict(dict(summary), "summary.json")
        self._mlflow.end_run("FINISHED" if ended_well(summary) else "FAILED")
