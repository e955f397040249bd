"""The section `coefficients`: how alpha and beta move."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dr2dist.coefficients import Bounds, Knot, Limits, Schedule
from dr2dist.config.section import Section
from dr2dist.reversible.arithmetic.setting import COEFFICIENT_STEP

Share = Annotated[float, Field(gt=0, le=1)]
Alpha = Annotated[float, Field(ge=0, le=1)]
Above = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=COEFFICIENT_STEP, le=1)]


class Moving(Section):
    """What every moving path has."""

    until: Share = Field(1.0, description="share of the run over which the path moves")
    every: int = Field(10, ge=1, description="optimiser steps between two small moves")
    shape: Literal["linear", "cosine"] = Field("linear", description="shape of the way")


class Conserve(Moving):
    """alpha = 1 - beta: the recursion neither grows nor shrinks."""

    kind: Literal["conserve"] = "conserve"
    # Staying where the network is nearest to the pretrained one: docs/evidence.md.
    beta: tuple[Beta, Beta] = Field((0.1, 0.1), description="beta at the start and at the end")

    def schedule(self, steps: int) -> Schedule:
        """The path over a run of `steps` optimiser steps."""
        start, end = self.beta
        knots = (Knot(0, 1 - start, start), Knot(self.until, 1 - end, end))
        return Schedule(knots, steps, self.every, self.shape, conserve=True)


class Paper(Moving):
    """Both moved from (1, 0.1): at once, as in Dr2Net (arXiv 2401.04105), or one after the other.

    The other orders are those of an author's code for points (guochengqian/openpoints,
    models/backbone/pointvit_inv.py): there they are interleaved, beta first, and end at about
    (0.4, 0.7) after 60 % of the interval.
    """

    kind: Literal["paper"]
    alpha: tuple[Alpha, Alpha] = Field((1.0, 0.3), description="alpha at the start and the end")
    beta: tuple[Beta, Beta] = Field((0.1, 0.7), description="beta at the start and the end")
    order: Literal["together", "beta_first", "alpha_first", "interleaved"] = Field(
        "together",
        description="both at each move; one over the first half of the way and the other over the "
        "second; or in turns, beta at each move and alpha half of `every` later",
    )

    def schedule(self, steps: int) -> Schedule:
        """The path over a run of `steps` optimiser steps."""
        start, end = zip(self.alpha, self.beta, strict=True)
        halfway = {
            "beta_first": (Knot(self.until / 2, self.alpha[0], self.beta[1]),),
            "alpha_first": (Knot(self.until / 2, self.alpha[1], self.beta[0]),),
        }.get(self.order, ())
        knots = (Knot(0, *start), *halfway, Knot(self.until, *end))
        lag = self.every // 2 if self.order == "interleaved" else 0
        return Schedule(knots, steps, self.every, self.shape, alpha_lag=lag)

    @model_validator(mode="after")
    def _room_in_between(self) -> Self:
        if self.order == "interleaved" and self.every < 2:
            raise ValueError(f"every is {self.every}, allowed with order interleaved is 2 and more")
        return self


class Guarded(Conserve):
    """As conserve, but moving on only while the loss and, in float arithmetic, the drift allow it.

    Bounds are pairs: above the first the path stays, until the value is below half of it; above
    the second it goes back, a move at a time. Drift falls as beta rises, so it is judged only where
    beta falls.
    """

    kind: Literal["guarded"]  # type: ignore[assignment]
    loss: tuple[Above, Above] = Field(
        (0.1, 0.3), description="smoothed loss above its lowest: hold, go back"
    )
    drift: tuple[Above, Above] | None = Field(
        None,
        description="relative error of a reconstruction, arithmetic float, beta falling; null: "
        "0.001, 0.01",
    )

    def idle(self) -> dict[str, str]:
        """See Section."""
        return {} if self._falls else {"drift": "a beta that rises, as drift falls with it"}

    @property
    def _falls(self) -> bool:
        return self.beta[1] < self.beta[0]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name in ("loss", "drift"):
            pair = getattr(self, name)
            if pair is not None and pair[0] >= pair[1]:
                raise ValueError(f"{name} is {list(pair)}, allowed is a rising pair")
        return self

    def limits(self) -> Limits:
        """The bounds for a guard on the path."""
        drift = Bounds(*(self.drift or DRIFT)) if self._falls else None
        return Limits(Bounds(*self.loss), drift)


DRIFT = (1e-3, 1e-2)


class Constant(Section):
    """No movement. alpha 1 and beta 0 is conventional finetuning."""

    kind: Literal["constant"]
    alpha: Alpha = Field(description="alpha of every step")
    beta: float = Field(ge=0, le=1, description="beta of every step")

    def schedule(self, steps: int) -> Schedule:
        """The path over a run of `steps` optimiser steps."""
        return Schedule((Knot(0, self.alpha, self.beta),), steps)


class Piecewise(Section):
    """Any path: straight or eased between knots."""

    kind: Literal["piecewise"]
    knots: tuple[tuple[Annotated[float, Field(ge=0, le=1)], Alpha, Beta], ...] = Field(
        min_length=2, description="[share of the run, alpha, beta], in order of the shares"
    )
    every: int = Field(10, ge=1, description="optimiser steps between two small moves")
    shape: Literal["linear", "cosine"] = Field("linear", description="shape of each part")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        shares = [knot[0] for knot in self.knots]
        if any(low >= high for low, high in pairwise(shares)):
            raise ValueError(f"knots have shares {shares}, allowed is a rising order")
        return self

    def schedule(self, steps: int) -> Schedule:
        """The path over a run of `steps` optimiser steps."""
        knots = tuple(Knot(*knot) for knot in self.knots)
        return Schedule(knots, steps, self.every, self.shape)


CoefficientPath = Annotated[
    Conserve | Paper | Constant | Piecewise | Guarded, Field(discriminator="kind")
]


def with_kind(value: Any) -> Any:
    """`kind` may be left out: conserve is the default."""
    return {"kind": "conserve", **value} if isinstance(value, dict) else value
