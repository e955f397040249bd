"""How far a run is: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

PERIOD = 60.0
"""Seconds between two lines."""

log = logging.getLogger(__name__)


class ProgressLine:
    """Around a run's steps. done, steps: of all. shown: on rank 0.

    What is logged meanwhile stands above the bar.
    """

    def __init__(self, done: int, steps: int, shown: bool) -> None:
        self._shown, self._terminal = shown, shown and sys.stderr.isatty()
        self._bar: Any = tqdm(initial=done, total=steps, unit="step", disable=not self._terminal)
        self._done, self._first, self._steps = done, done, steps
        self._begin = self._told = time.monotonic()
        self._around = contextlib.ExitStack()

    def __enter__(self) -> ProgressLine:
        if self._terminal:
            self._around.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_: object) -> None:
        with self._around, contextlib.suppress(OSError):
            self._bar.close()

    def update(self, **values: str) -> None:
        """After a step, with what is worth telling of it."""
        self._done += 1
        with contextlib.suppress(OSError):  # the terminal was closed: the run stops, or goes on
            self._bar.update()
            self._bar.set_postfix(values)
        now = time.monotonic()
        if self._shown and not self._terminal and now - self._told >= PERIOD:
            self._told = now
            log.info(self._line(now, values))

    def _line(self, now: float, values: dict[str, str]) -> str:
        speed = (self._done - self._first) / (now - self._begin)
        left = tqdm.format_interval(int((self._steps - self._done) / speed))
        told = ", ".join(f"{name} {value}" for name, value in values.items())
        return f"step {self._done} of {self._steps}, {told}, {speed:.3g} steps/s, {left} left"
