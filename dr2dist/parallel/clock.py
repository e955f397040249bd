"""How long a rank computes by itself, and how long it waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up a rank's computing between two readings; on a GPU by events, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[Any, Any]] = []
        self._seconds = self._steps = 0.0
        self._micro_batches = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a part of a micro-batch's forward or backward pass."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.monotonic()
            yield
            self._seconds += time.monotonic() - start

    @contextmanager
    def step(self, micro_batches: int) -> Iterator[None]:
        """Around a whole step, to its verdict, which the host waits for."""
        start = time.monotonic()
        yield
        self._steps += time.monotonic() - start
        self._micro_batches += micro_batches

    def take(self) -> dict[str, float]:
        """micro_batch_seconds, and idle, the share of steps without computing; then starts anew."""
        found = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        steps, count = self._steps, self._micro_batches
        self._events.clear()
        self._seconds = self._steps = 0.0
        self._micro_batches = 0
        if not count:
            return {}
        return {"micro_batch_seconds": found / count, "idle": max(0.0, 1 - found / steps)}
