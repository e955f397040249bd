"""The verdict of an optimiser step: one exchange by which all ranks decide whether to apply it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from functools import reduce
from operator import or_
from typing import Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from dr2dist.reversible import Chain
from dr2dist.reversible.arithmetic.scales import NEAR
from dr2dist.reversible.certificate import NEVER, Flags, failure_messages, worst_drift
from dr2dist.reversible.transfer import to_device

Kind = Literal["disagreement", "mismatch", "range", "finite"]


class Wish(IntFlag):
    """What a rank asks all of them to do after the step, whatever becomes of it."""

    NONE = 0
    SAVE = 1
    STOP = 2
    WAIT = 4
    """With what all ranks have to do once none of them is busy beside its steps."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks found in one step; the same on every rank.

    kinds: what went wrong (empty: the step may be applied). messages: one line each, with the
    rank. loss: mean over ranks. drift: worst over ranks and chains, float arithmetic only.
    counted_next: sum over ranks of what the reports say of the next step. near: by chain, the most
    channels of a rank whose 16-bit states have come near their limit. wishes: of any rank.
    """

    kinds: frozenset[Kind]
    messages: tuple[str, ...]
    loss: float
    drift: float | None
    counted_next: float
    near: dict[str, int] = field(default_factory=dict)
    wishes: Wish = Wish.NONE

    @property
    def ok(self) -> bool:
        """Whether the step may be applied."""
        return not self.kinds


@dataclass
class Report:
    """One rank's part: int64 or fp64 scalars on the device, not read before the exchange.

    loss: this rank's mean loss of the step. gradient: finite if every gradient is. counted_next,
    wishes: see Verdict. peaks: by chain, of its channels, once it is packed; None where nothing was
    run.
    """

    loss: Tensor
    gradient: Tensor
    chains: Sequence[Chain] = field(default_factory=tuple)
    counted_next: float = 0.0
    wishes: Wish = Wish.NONE
    peaks: dict[str, Tensor | None] = field(default_factory=dict)

    def pack(self, coefficients: tuple[float, float], step: int) -> Tensor:
        """fp64 [2 + len(SAME) + 2 + chains * (1 + FOR_A_CHAIN)]; every integer is below 2^53."""
        device = self.loss.device
        head = torch.stack([self.loss.double(), self.gradient.double()])
        same = [*coefficients, step, *map(_grid, self.chains)]
        told = torch.tensor([*same, self.counted_next, self.wishes], dtype=torch.float64)
        parts = [head, to_device(told, device)]
        for chain in self.chains:
            flags, drift = chain.ledger.take()
            self.peaks[chain.name] = None if flags is None else flags[Flags.SIZE :]
            flags = Flags(device).tensor if flags is None else flags
            near = (flags[Flags.SIZE :] >= NEAR).sum().reshape(1)
            drift = torch.full((), -1.0, device=device) if drift is None else drift
            parts += [flags[: Flags.SIZE].double(), near.double(), drift.double().reshape(1)]
        return torch.cat(parts)


def _grid(chain: Chain) -> float:
    """A number that chains on the same grid have in common."""
    scales = chain.scales
    if scales is None:
        return float(chain.setting.fraction_bits)
    return float(crc32(str(scales.exponents).encode()))


SAME = ("alpha", "beta", "applied steps")
"""What all ranks must have in common, beside each chain's grid: its fraction bits, or a number of
its scales."""
FOR_A_CHAIN = Flags.SIZE + 2


def decide(report: Report, coefficients: tuple[float, float], step: int) -> Verdict:
    """Exchanges the reports of all ranks and reads them once.

    coefficients, step: what this rank has used; a rank that used others than most is named.
    """
    own = report.pack(coefficients, step)
    world = dist.get_world_size() if dist.is_initialized() else 1
    gathered = [torch.empty_like(own) for _ in range(world)]
    if world > 1:
        dist.all_gather(gathered, own)
    else:
        gathered = [own]
    return _read(torch.stack(gathered).tolist(), report.chains)


def _read(rows: list[list[float]], chains: Sequence[Chain]) -> Verdict:
    titles = [*SAME, *(f"{chain.name}: grid" for chain in chains)]
    start = 2 + len(titles) + 2
    messages = _disagreements([row[2 : start - 2] for row in rows], titles)
    kinds: set[Kind] = {"disagreement"} if messages else set()
    drifts: list[float | None] = []
    near: dict[str, int] = {}
    for rank, row in enumerate(rows):
        for place, chain in enumerate(chains):
            *flags, close, own = row[start + place * FOR_A_CHAIN :][:FOR_A_CHAIN]
            whole = [int(value) for value in flags]
            kinds.update(failure_kinds(whole))
            lines = failure_messages(chain.name, chain.setting, whole)
            messages += [f"rank {rank}: {line}" for line in lines]
            near[chain.name] = max(int(close), near.get(chain.name, 0))
            drifts.append(None if own == -1.0 else own)
        loss, gradient = row[:2]
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            kinds.add("finite")
            what = "loss" if not math.isfinite(loss) else "gradient"
            messages.append(f"rank {rank}: the {what} is not finite")
    loss = sum(row[0] for row in rows) / len(rows)
    counted = sum(row[start - 2] for row in rows)
    wishes = reduce(or_, (Wish(int(row[start - 1])) for row in rows))
    drift = worst_drift(drifts)
    return Verdict(frozenset(kinds), tuple(messages), loss, drift, counted, near, wishes)


def _disagreements(values: list[list[float]], titles: list[str]) -> list[str]:
    """One line for each value of a rank that is not what most ranks have (rank 0, if as many)."""
    common = [Counter(column).most_common(1)[0][0] for column in zip(*values, strict=True)]
    return [
        f"rank {rank}: {title} {value:g}, most ranks have {usual:g}"
        for rank, own in enumerate(values)
        for title, value, usual in zip(titles, own, common, strict=True)
        if value != usual
    ]


def failure_kinds(flags: list[int]) -> set[Kind]:
    """The kinds of failure in a chain's flags."""
    kinds: set[Kind] = set()
    out_of_range, not_finite, recompute, start, _ = flags
    if not_finite != NEVER:
        kinds.add("finite")
    elif out_of_range != NEVER:
        kinds.add("range")
    elif recompute >= 0 or start:
        kinds.add("mismatch")
    return kinds


class GradientWatch:
    """The sum of all gradients that parameters receive: finite if every one of them is.

    Hooks see every gradient before an engine shards or frees it, on all ZeRO stages.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._see)

    def _see(self, grad: Tensor) -> None:
        self._sum = self._sum + grad.detach().sum(dtype=torch.float32)

    def take(self) -> Tensor:
        """The sum since the last call: a scalar on the device."""
        total, self._sum = self._sum, torch.zeros_like(self._sum)
        return total
