"""A network's layers as nodes of autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dr2dist.backbones.walk import Flow, Place, Tap
from dr2dist.errors import UserError

_OWN = ("taps", "until", "batched", "rows")
"""What a chain is told beside sides."""


class AutogradDriver:
    """Runs the layers of a reversible network in an ordinary pass.

    options: of the stem. taps: functions after which tokens are wanted.
    """

    def __init__(self, net: Any, options: Mapping[str, Any], taps: Collection[Tap]) -> None:
        self.net, self.options, self.taps = net, options, taps

    def stem(self, inputs: Any) -> Flow:
        """See Driver."""
        name = self.net.family.input
        if isinstance(inputs, Mapping) and name is not None:
            if name not in inputs:
                raise UserError(
                    f"{self.net.family.name} models take the input {name}, the task gives "
                    f"{', '.join(inputs)}"
                )
            inputs = inputs[name]
        stem = self.net.family.stem(self.net, inputs, **self.options)
        for taken in _OWN:
            if taken in stem.sides:
                raise UserError(f"{self.net.family.name}: a side cannot be called {taken}")
        batched = tuple(stem.batched)
        return Flow(stem.tokens, stem.sides, batched, stem.rows, apart=stem.apart)

    def transition(self, place: Place, flow: Flow) -> Flow:
        """See Driver."""
        return self.net.run_transition(place, flow)

    def functions(self, run: Sequence[Place], flow: Flow) -> Flow:
        """See Driver."""
        number, last = run[0].item, run[-1]
        wanted = sorted(index for item, index in self.taps if item == number)
        wanted = [index for index in wanted if index <= last.function]
        until = None if last.last else last.function + 1
        value, flow.value = flow.value, None
        chain = self.net.items[number]
        # A transition may have made others of some: names are said for the whole network.
        batched = [name for name in flow.batched if name in flow.sides]
        found = chain(
            value, taps=wanted, until=until, batched=batched, rows=flow.together, **flow.sides
        )
        if wanted:
            found, tapped = found
            flow.taps |= {
                (number, index): tokens for index, tokens in zip(wanted, tapped, strict=True)
            }
        flow.value = found
        return flow

    def tail(self, flow: Flow) -> Any:
        """See Driver."""
        return self.net.run_tail(flow)
