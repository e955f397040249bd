"""The one walk over a network: its layers in order, for whoever runs, cuts or measures them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Kind = Literal["stem", "transition", "function", "tail"]


Tap = tuple[int, int]
"""(item, number of a function) after which tokens are wanted."""


class Place(NamedTuple):
    """A layer's place in a network.

    item: the number of its chain or transition in `net.items`. function: its number in its chain.
    last: whether it ends its chain.
    """

    kind: Kind
    item: int = 0
    function: int = 0
    last: bool = False

    @property
    def tap(self) -> Tap:
        """How tokens behind a function are asked for."""
        return self.item, self.function


@dataclass
class Flow:
    """What goes from layer to layer.

    value: tokens [B, ...], or what a driver has in their place. sides: what functions share, by
    name. batched: names of those that have tokens' rows in dim 0. rows: of tokens, that are one
    sample; apart: whether functions treat them one by one. taps: tokens after functions.
    """

    value: Any
    sides: dict[str, Any] = field(default_factory=dict)
    batched: tuple[str, ...] = ()
    rows: int = 1
    taps: dict[Tap, Tensor] = field(default_factory=dict)
    apart: bool = False

    @property
    def together(self) -> int:
        """Rows that slices of functions keep together."""
        return 1 if self.apart else self.rows


class Driver(Protocol):
    """Runs layers in its own way."""

    def stem(self, inputs: Any) -> Flow:
        """The network's inputs to tokens and sides."""

    def transition(self, place: Place, flow: Flow) -> Flow:
        """What stands between chains."""

    def functions(self, run: Sequence[Place], flow: Flow) -> Flow:
        """Consecutive functions of one chain."""

    def tail(self, flow: Flow) -> Any:
        """Norm and head."""


def walk(places: Sequence[Place], given: Any, driver: Driver) -> Any:
    """Layers in order, from the network's inputs or a Flow to a Flow or the network's output."""
    for run in runs(places):
        kind = run[0].kind
        if kind == "stem":
            given = driver.stem(given)
        elif kind == "transition":
            given = driver.transition(run[0], given)
        elif kind == "function":
            given = driver.functions(run, given)
        else:
            given = driver.tail(given)
    return given


def runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Functions of one chain together, all else by itself."""
    run: list[Place] = []
    for place in places:
        if run and not (place.kind == run[-1].kind == "function" and place.item == run[-1].item):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def places_of(items: Sequence[Any]) -> list[Place]:
    """The places of chains, which have functions, and of what stands between them."""
    found = []
    for number, item in enumerate(items):
        if not hasattr(item, "functions"):
            found.append(Place("transition", number))
            continue
        count = len(item.functions)
        found += [Place("function", number, index, index == count - 1) for index in range(count)]
    return found
