"""A window of steps under torch's profiler, as a trace for each rank."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.profiler import profile

from dr2dist.files import atomic_write


class Profile:
    """Profiles the steps first + 1 to last of a run, if a window is given.

    Writes folder/rank-K.json in Chrome's trace format when the window or the run ends.
    """

    def __init__(self, folder: Path, window: tuple[int, int] | None) -> None:
        self._folder, self._window = folder, window
        self._running: Any = None

    def before(self, applied: int) -> None:
        """To be called before the optimiser step after `applied` ones."""
        if self._window is None:
            return
        first, last = self._window
        if self._running is None and first <= applied < last:
            self._running = profile(record_shapes=True, profile_memory=True)
            self._running.start()
        elif applied >= last:
            self._finish()

    def _finish(self) -> None:
        if self._running is None:
            return
        self._running.stop()
        with atomic_write(self._folder / f"rank-{dist.get_rank()}.json") as aside:
            self._running.export_chrome_trace(str(aside))
        self._running = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish()
