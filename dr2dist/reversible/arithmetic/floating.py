"""Floating-point arithmetic: the equations of the paper as they stand, reversed with round-off.

x_{i+1} = F(x_i) + alpha * x_i + y_i        y_{i+1} = beta * x_i     (arXiv 2401.04105)
x_i = y_{i+1} / beta                        y_i = x_{i+1} - F(x_i) - alpha * x_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.setting import Setting
from dr2dist.reversible.arithmetic.state import State


class FloatArithmetic:
    """The same interface as ExactArithmetic, with no remainders; states have the given dtype."""

    limit: int | None = None
    """Of states: there is none."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.alpha, self.beta, self.factor = setting.alpha, setting.beta, setting.factor
        self.dtype = dtype

    def start(self, h: Tensor) -> State:
        """(x_0, y_0 = beta * x_0)."""
        x = h.to(self.dtype, copy=True).contiguous()
        return State(x, x * self.beta)

    def tokens(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """x itself where it has the dtype: the state is made of tokens."""
        return state.to(dtype)

    def hand_out(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens as a tensor that nothing here writes to again."""
        return state.to(dtype, copy=True)

    def outside(self, state: Tensor) -> Tensor:
        """False, a bool scalar: there is no range to leave."""
        return torch.zeros((), dtype=torch.bool, device=state.device)

    def target(self, state: State, in_place: bool) -> State:
        """Where `advance` shall write the next state."""
        if in_place:
            return state
        return State(torch.empty_like(state.current), torch.empty_like(state.previous))

    def source(self, state: State, dtype: torch.dtype) -> Tensor:
        """The tokens x_i that function i saw, from the state after it."""
        return (state.previous / self.beta).to(dtype)

    def reached(self, state: State, dtype: torch.dtype) -> Tensor:
        """The same tokens once `retreat` has been there."""
        return state.previous.to(dtype)

    def advance(
        self,
        state: State,
        f: Tensor,
        out: State,
        keep: bool,
        seen: OutputChecksum | None,
        factor: float = 1.0,
    ) -> None:
        """Writes (x_{i+1}, y_{i+1}) to out, which may be the state itself; nothing to keep."""
        x, y = state
        branch = f.to(self.dtype) if factor == 1 else f.to(self.dtype) * factor
        after = torch.add(branch, x, alpha=self.alpha).add_(y)
        torch.mul(x, self.beta, out=out.previous)
        out.current.copy_(after)
        if seen:
            seen.output(f)

    def retreat(self, state: State, f: Tensor, factor: float = 1.0) -> State:
        """(x_i, y_i) from (x_{i+1}, y_{i+1}), written over them."""
        x = self.source(state, self.dtype)
        before = state.current.sub_(f, alpha=factor).sub_(x, alpha=self.alpha)
        return State(state.previous.copy_(x), before)
