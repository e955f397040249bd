"""What happens to a backward pass whose certificate failed: raised, warned of, or only recorded."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

OnFailure = Literal["raise", "warn", "record"]


class ReversalError(RuntimeError):
    """A backward pass whose reversal could not be proven: its gradients are not to be trusted.

    The message says for each failure which chain and function it is of, and what was found.
    """


def check_on_failure(value: str) -> OnFailure:
    """The value itself. Raises ValueError if it is not one of OnFailure."""
    if value not in get_args(OnFailure):
        allowed = ", ".join(get_args(OnFailure))
        raise ValueError(f"on_failure is {value!r}, allowed is {allowed}")
    return value  # type: ignore[return-value]


class FailureWatch:
    """Looks at the flags of finished backward passes without making the host wait for a device.

    describe: one line for each failure in flags. On the CPU a pass is looked at as it ends; on a
    GPU its flags are copied to pinned memory, and looked at by `poll` once the copy has arrived.
    """

    def __init__(self, describe: Callable[[list[int]], tuple[str, ...]]) -> None:
        self._describe = describe
        self._copies: deque[tuple[Tensor, Any]] = deque()

    def note(self, flags: Tensor, on_failure: OnFailure) -> None:
        """A pass has ended. Raises ReversalError if that is asked for and known already."""
        if on_failure == "record":
            return
        if flags.device.type != "cuda":
            self._tell(flags, on_failure)
            return
        copy = torch.empty_like(flags, device="cpu", pin_memory=True)
        copy.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(flags.device))
        self._copies.append((copy, event))

    def poll(self, on_failure: OnFailure) -> None:
        """Looks at what has arrived. Raises ReversalError if that is asked for."""
        while self._copies and self._copies[0][1].query():
            self._tell(self._copies.popleft()[0], on_failure)

    def _tell(self, flags: Tensor, on_failure: OnFailure) -> None:
        messages = self._describe(flags.tolist())
        if not messages or on_failure == "record":
            return
        text = "; ".join(messages)
        if on_failure == "raise":
            raise ReversalError(f"{text} (on_failure 'warn' or 'record' goes on)")
        warnings.warn(text, stacklevel=2)
