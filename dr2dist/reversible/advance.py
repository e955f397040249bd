"""One function forward: what its output makes of the state, and what is noted for the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.exact import ExactArithmetic
from dr2dist.reversible.arithmetic.state import State
from dr2dist.reversible.calls.slices import Slice, joined
from dr2dist.reversible.certificate import Probe
from dr2dist.reversible.tape import Arithmetic, Tape


class Advance:
    """Writes the next state, part by part, and gathers the remainders."""

    def __init__(
        self,
        arithmetic: Arithmetic,
        state: State,
        out: State,
        keep: bool,
        seen: OutputChecksum | None,
        factor: float,
    ) -> None:
        self.arithmetic, self.state, self.out = arithmetic, state, out
        self.keep, self.seen, self.factor = keep, seen, factor
        self.remainders: list[Tensor | None] = []

    def __call__(self, part: Slice, f: Tensor) -> None:
        """f: F's output for the part. Raises ValueError if it has another shape."""
        now, out = part.states(self.state), part.states(self.out)
        pieces = part.split(f)
        found = [tuple(piece.shape) for piece in pieces]
        allowed = [tuple(state.current.shape) for state in now]
        if found != allowed:
            raise ValueError(
                f"a residual function maps {allowed[0]} to {found[0]}: "
                "shapes must be equal in a chain"
            )
        for state, target, piece in zip(now, out, pieces, strict=True):
            rest = self.arithmetic.advance(state, piece, target, self.keep, self.seen, self.factor)
            self.remainders.append(rest)


def tokens_of(arithmetic: Arithmetic, state: State, dtype: torch.dtype, part: Slice) -> Tensor:
    """What the function sees of a part of the state."""
    return joined([arithmetic.tokens(view, dtype) for view in part.views(state.current)])


def note_state(tape: Tape, index: int, state: State) -> None:
    """Notes of the state before a function what its reversal will need of it."""
    if tape.mode(index) == "checkpoint":
        tape.inputs[index] = state.current
    if tape.ends_stretch(index):
        tape.states[index] = state
    if tape.starts_stretch(index):
        if isinstance(tape.arithmetic, ExactArithmetic):
            tape.starts[index] = tape.arithmetic.sums(state)
        else:
            tape.starts[index] = Probe(state)
