"""Where a pass's remainders wait for its reversal: on the device, or in the host's memory.

To the host they leave on a stream of their own while the next function runs, and they come back
while the function after theirs is reversed. No memory is handed from one stream to another by the
allocator's guess: what a copy has read or written is let go of only once the stream that computes
has been told to wait for it, so that as many bytes are held however far the host is ahead.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Parts = list[Tensor | None]
"""A function's remainders, one entry for each range of its slices: uint8, packed."""

IN_FLIGHT = 1
"""Functions whose remainders may be on their way out when the next one's are made."""


class Remainders:
    """The packed remainders of one pass, by function.

    host: they wait in pinned memory of the host; on a CPU they stay where they are, and are only
    counted so. most_on_device: bytes that were on the device at any time.
    """

    def __init__(self, device: torch.device, host: bool) -> None:
        self.device, self.host = device, host
        self._near: dict[int, Parts] = {}
        self._far: dict[int, Parts] = {}
        self._leaving: deque[tuple[int, Any]] = deque()
        self._coming: dict[int, Any] = {}
        self.most_on_device = 0

    def put(self, index: int, parts: Sequence[Tensor | None]) -> None:
        """Takes a function's remainders."""
        self._near[index] = list(parts)
        self._count()
        if self.host:
            self._far[index], event = self._copied(self._near[index], to_host=True)
            self._leaving.append((index, event))
            self._let_go(IN_FLIGHT)

    def settle(self) -> None:
        """Ends the forward pass: all that leaves the device has left."""
        self._let_go(0)

    def ahead(self, index: int) -> None:
        """Begins to bring a function's remainders back, if they are away."""
        if index in self._far and index not in self._near:
            self._near[index], self._coming[index] = self._copied(self._far[index], to_host=False)
            self._count()

    def part(self, index: int, number: int) -> Tensor:
        """Remainders of a function's range on the device."""
        self.ahead(index)
        event = self._coming.pop(index, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        found = self._near[index][number]
        assert found is not None
        return found

    def drop(self, index: int, number: int) -> None:
        """Lets go of remainders that are used up."""
        for held in (self._near, self._far):
            if index in held:
                held[index][number] = None

    def return_(self, index: int) -> None:
        """Lets go of what has come back, where it is kept for another reversal."""
        if index in self._far:
            self._near.pop(index, None)
            self._coming.pop(index, None)

    def free(self, index: int) -> None:
        """Lets go of all that a function has."""
        for held in (self._near, self._far, self._coming):
            held.pop(index, None)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, each once."""
        return sum(_bytes(parts) for parts in {**self._near, **self._far}.values())

    @property
    def on_device(self) -> int:
        """Bytes that are on the device now."""
        return sum(_bytes(parts) for parts in self._near.values())

    def held(self) -> list[Tensor]:
        """All that is held, each once."""
        found = {**self._near, **self._far}.values()
        return [part for parts in found for part in parts if part is not None]

    def _count(self) -> None:
        self.most_on_device = max(self.most_on_device, self.on_device)

    def _let_go(self, count: int) -> None:
        """Frees what has left the device, but for the last `count` functions."""
        while len(self._leaving) > count:
            index, event = self._leaving.popleft()
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
            self._near.pop(index, None)

    def _copied(self, parts: Parts, to_host: bool) -> tuple[Parts, Any]:
        """The same on the other side, once an event has passed; on a CPU themselves."""
        if self.device.type != "cuda":
            return list(parts), None
        stream = _side_stream(self.device)
        # What was computed must be there, and memory that is written to must be free.
        found = [None if part is None else _room(part, to_host, self.device) for part in parts]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for source, target in zip(parts, found, strict=True):
                if source is not None and target is not None:
                    target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
        return found, event


def _room(like: Tensor, to_host: bool, device: torch.device) -> Tensor:
    if to_host:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
    return torch.empty(like.shape, dtype=like.dtype, device=device)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """The stream of a device that remainders are copied on."""
    return torch.cuda.Stream(device)


def _bytes(parts: Parts) -> int:
    return sum(part.nbytes for part in parts if part is not None)
