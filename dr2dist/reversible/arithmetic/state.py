"""What a chain carries between its functions, and that state's gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """Two tensors of the shape of a chain's tokens.

    Exact: current X_i and previous X_{i-1}, int32 or int16. Float: current x_i and previous y_i.
    """

    current: Tensor
    previous: Tensor

    def copy(self) -> State:
        """The same in memory of its own."""
        return State(self.current.clone(), self.previous.clone())


class Gradient(NamedTuple):
    """The gradient of a state: of x_i and of y_i (None stands for zeros)."""

    x: Tensor
    y: Tensor | None

    def of_tokens(self, beta: float) -> Tensor:
        """At a chain's start, dh = dx_0 + beta * dy_0: its tokens feed both residuals. Consumed."""
        return self.x if self.y is None else self.x.add_(self.y, alpha=beta)
