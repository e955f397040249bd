"""TensorBoard's event files, in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dr2dist.config.text import flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TensorBoard:
    """See Logger."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """See Logger."""
        from torch.utils.tensorboard import SummaryWriter

        self._settings = settings
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        self._board.add_text("configuration", f"```yaml\n{text}```", step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Logger."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def show(self, step: int, picture: Figure) -> None:
        """See Logger."""
        self._board.add_figure("held_out", picture, step)

    def end(self, summary: Mapping[str, Any]) -> None:
        """See Logger."""
        settings = {key: str(value) for key, value in flat(self._settings).items()}
        last = summary.get("last") or {}
        reached = {f"reached/{key}": value for key, value in last.items()}
        try:
            self._board.add_hparams(settings, reached, run_name=".", global_step=last.get("step"))
        finally:
            self._board.close()
