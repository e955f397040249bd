"""What a backward pass proves about its own reversal, kept on the device until it is asked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dr2dist.reversible.arithmetic.setting import Setting
from dr2dist.reversible.arithmetic.state import State
from dr2dist.reversible.transfer import to_device

NEVER = 1 << 30
"""Stands for 'no function' in flags that hold the first function that failed."""

PROBE = 1024
"""Elements of a chain's first state that float arithmetic keeps, to measure its drift."""


class Flags:
    """What was found in one pass of a chain, as an int64 tensor on its device; no host reads.

    [0] first function after which a state left the range, [1] first function whose output is
    not finite (NEVER: none; -1: the tokens that enter are not), [2] last function whose recompute
    differed (-1: none), [3] 1 where the chain's start is not what the forward pass began with,
    [4] passes reversed. Behind them, for states of 16 bits, the largest |X| of each channel, as far
    as it was near its limit.
    """

    SIZE = 5

    def __init__(self, device: torch.device, channels: int = 0) -> None:
        # Filled there: a list of numbers would be copied there, and the host wait for it.
        self.tensor = torch.zeros(self.SIZE + channels, dtype=torch.int64, device=device)
        self.tensor[:2].fill_(NEVER)
        self.tensor[2].fill_(-1)

    def note_input(self, h: Tensor) -> None:
        """The tokens that enter a chain: they must be finite."""
        self._first(1, -1, ~torch.stack(torch.aminmax(h)).isfinite().all())

    def note_functions(self, begin: int, largest: Tensor, limit: int | None) -> None:
        """The first runs of functions from `begin` on: outputs must be finite, states in range.

        largest: fp64 [functions], as OutputChecksum has it. limit: of states, None without one.
        """
        if not len(largest):
            return
        numbers = torch.arange(begin, begin + len(largest), device=largest.device)
        self._first(1, numbers, ~largest.isfinite())
        if limit is not None:
            self._first(0, numbers, ~(largest < limit))

    def note_state(self, index: int, outside: Tensor, peaks: Tensor | None) -> None:
        """The fixed-point state that a pass begins with: which samples are out of range, and the
        largest |X| of its channels."""
        self._first(0, index, outside.any())
        if peaks is not None:
            torch.maximum(self.peaks, peaks, out=self.peaks)

    @property
    def peaks(self) -> Tensor:
        """int64 [channels], a view."""
        return self.tensor[self.SIZE :]

    def note_recompute(self, index: int, differs: Tensor) -> None:
        """A recompute's sum against the first run's. The last function is the one to name."""
        found = differs * (index + 1) - 1
        torch.maximum(self.tensor[2], found, out=self.tensor[2])

    def note_start(self, differs: Tensor) -> None:
        """Whether the reversed chain missed what it began with."""
        self.tensor[3] |= differs

    def note_done(self) -> None:
        """Counts a pass whose reversal reached the chain's start."""
        self.tensor[4] += 1

    def _first(self, place: int, index: int | Tensor, wrong: Tensor) -> None:
        found = torch.where(wrong, index, NEVER).amin()
        torch.minimum(self.tensor[place], found, out=self.tensor[place])


def merge_flags(flags: Tensor, more: Tensor) -> Tensor:
    """The flags of two passes of the same chain together: int64 [Flags.SIZE + channels]."""
    return torch.cat(
        [
            torch.minimum(flags[:2], more[:2]),
            torch.maximum(flags[2:4], more[2:4]),
            flags[4 : Flags.SIZE] + more[4 : Flags.SIZE],
            torch.maximum(flags[Flags.SIZE :], more[Flags.SIZE :]),
        ]
    )


class Probe:
    """Float arithmetic: a fixed random sample of a chain's first state, to measure its drift."""

    def __init__(self, state: State) -> None:
        generator = torch.Generator().manual_seed(state.current.numel())
        count = min(PROBE, state.current.numel())
        where = torch.randint(state.current.numel(), (count,), generator=generator, device="cpu")
        self._where = to_device(where, state.current.device)
        self._values = self._sample(state)

    def drift(self, state: State) -> Tensor:
        """|reconstructed - kept| / |kept| over the sample: a fp64 scalar."""
        kept = self._values.double().norm()
        return (self._sample(state).double() - self._values.double()).norm() / kept

    def _sample(self, state: State) -> Tensor:
        return torch.stack([part.view(-1)[self._where] for part in state])


@dataclass(frozen=True)
class ChainCertificate:
    """What a chain's last backward pass verified, read to the host.

    name: the chain. failures: how many kinds of failure were found (0 proves the reversal in
    exact arithmetic). messages: one line for each. verified: the pass was reversed to its start
    and compared. remainder_bytes: bytes of remainders held for it. drift: relative error of the
    reconstructed start, float arithmetic in memory mode reverse only.
    """

    name: str
    failures: int
    messages: tuple[str, ...]
    verified: bool
    remainder_bytes: int
    drift: float | None


def worst_drift(drifts: Iterable[float | None]) -> float | None:
    """The largest; one that is not a number is worse than any. None where nothing drifts."""
    known = (drift for drift in drifts if drift is not None)
    return max(known, key=lambda drift: math.inf if math.isnan(drift) else drift, default=None)


@dataclass
class Ledger:
    """The records of a chain's passes: the last one, and all since they were last taken."""

    last: Tensor | None = None
    last_drift: Tensor | None = None
    remainder_bytes: int = 0
    _pending: Tensor | None = field(default=None, repr=False)
    _pending_drift: Tensor | None = field(default=None, repr=False)

    def record(self, flags: Tensor, drift: Tensor | None, remainder_bytes: int) -> None:
        """Enters a finished backward pass."""
        self.last, self.last_drift, self.remainder_bytes = flags, drift, remainder_bytes
        self._pending = flags if self._pending is None else merge_flags(self._pending, flags)
        if drift is not None:
            known = self._pending_drift
            self._pending_drift = drift if known is None else torch.maximum(known, drift)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """(flags, worst drift) of all passes since the last call, still on the device."""
        taken = self._pending, self._pending_drift
        self._pending = self._pending_drift = None
        return taken


def failure_messages(name: str, setting: Setting, flags: list[int]) -> tuple[str, ...]:
    """One line for each failure in a chain's flags, the most telling first."""
    advice = "lower fraction_bits"
    if setting.by_channel:
        advice = "its channels need larger scales"
    out_of_range, not_finite, recompute, start, _ = flags[: Flags.SIZE]
    lines = []
    if not_finite == -1:
        lines.append(f"{name}: the tokens that enter are not finite")
    elif not_finite != NEVER:
        lines.append(f"{name}: the output of function {not_finite} is not finite")
    if out_of_range < not_finite:
        lines.append(
            f"{name}: the state after function {out_of_range} left the fixed-point range; {advice}"
        )
    if recompute >= 0:
        lines.append(f"{name}: the recompute of function {recompute} differs from its first run")
    elif start:
        lines.append(f"{name}: the reversal does not return to the chain's input")
    return tuple(lines)
