"""What one forward pass is run with, frozen into its tape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Arithmetic = Literal["exact", "float"]
Memory = Literal["reverse", "store", "checkpoint", "budget"]
StateBits = Literal[16, 32]
Place = Literal["device", "host"]
HandOn = Literal["last", "mean"]
Gain = Literal["none", "consistent"]

COEFFICIENT_STEP = 2.0**-16
"""alpha and beta are multiples of this, so that their products with int32 are exact in fp64."""

LIMITS = {32: 1 << 30, 16: (1 << 15) - 1}
"""Grid steps that every exact state of so many bits must stay below: an addition cannot wrap
unseen, and what is held to the largest number of 16 bits is outside."""

MOST_GROWTH = 64.0
"""Of states of 16 bits over a chain: a channel's maximum takes 14 bits, and eight must be left."""

COMPUTED = ("arithmetic", "fraction_bits", "state_bits", "hand_on", "gain")
"""Fields of Setting that beside alpha and beta say what a network computes: files carry them."""

FRACTION_BITS = 18
"""Of exact states of 32 bits, unless something else is said."""

USUAL_MAGNITUDE = 16.0
"""Size of a backbone's states without growth, assumed when a path is checked in advance."""


def round_coefficient(value: float) -> float:
    """The multiple of 2^-16 nearest to `value`, as an exact Python float."""
    return round(value / COEFFICIENT_STEP) * COEFFICIENT_STEP


def growth(alpha: float, beta: float, num_functions: int) -> float:
    """How much the linear part of the recursion grows over `num_functions` functions.

    Per function it is the larger root of `mu^2 = alpha mu + beta`: 1 where alpha + beta = 1.
    """
    return ((alpha + math.sqrt(alpha * alpha + 4 * beta)) / 2) ** num_functions


@dataclass(frozen=True)
class Setting:
    """Coefficients, arithmetic and memory mode of a chain.

    alpha, beta: coefficients of the two residuals (arXiv 2401.04105), rounded here to multiples
        of 2^-16. alpha in [0, 1], beta in (0, 1]; beta = 0 only for conventional finetuning
        (alpha 1, float arithmetic, memory store or checkpoint).
    arithmetic: "exact" keeps states in fixed point, "float" in floating point.
    memory: how the backward pass comes by its activations.
    chunk_size: samples per slice of the batch, None for the whole batch at once; "auto" for the
        largest slices, of samples or tokens, that chunk_budget allows.
    fraction_bits: exact states of 32 bits are multiples of 2^-fraction_bits.
    chunk_tokens: tokens per slice inside a sample, for functions that can run so; None for all.
        Only with a chunk_size of 1.
    memory_budget: with memory "budget", bytes that functions which keep their activations may
        hold beyond full reversal, for one micro-batch and all chains.
    chunk_budget: with chunk_size "auto", bytes of one function's working set.
    state_bits: of exact states: 32 with one step for all, 16 with one for each channel.
    remainders: where they wait for the reversal: "host" is pinned memory, to which they are copied
        while functions run.
    gain: what a function's output is multiplied by: nothing, or behind a chain's first function by
        1 + beta, which where alpha = 1 - beta makes of the recursion a two-step method that is
        consistent with the pretrained network's (docs/method.md).
    hand_on: the tokens that the chain gives: the last x_L, or the mean of x_L and x_{L-1}, as some
        networks trained with two residuals end (docs/method.md).

    Raises ValueError for a value outside these sets.
    """

    alpha: float = 0.9
    beta: float = 0.1
    arithmetic: Arithmetic = "exact"
    memory: Memory = "reverse"
    chunk_size: int | Literal["auto"] | None = None
    fraction_bits: int = FRACTION_BITS
    chunk_tokens: int | None = None
    memory_budget: int | None = None
    chunk_budget: int | None = None
    state_bits: StateBits = 32
    remainders: Place = "device"
    hand_on: HandOn = "last"
    gain: Gain = "none"

    def __post_init__(self) -> None:
        self._check_choices()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, allowed is 0 to 1")
        if self.beta == 0:
            self._check_conventional()
        elif not COEFFICIENT_STEP / 2 < self.beta <= 1:
            raise ValueError(f"beta is {self.beta}, allowed is above 0 (2^-16) and up to 1")
        object.__setattr__(self, "alpha", round_coefficient(self.alpha))
        object.__setattr__(self, "beta", round_coefficient(self.beta))

    def _check_choices(self) -> None:
        choices = (
            ("arithmetic", Arithmetic),
            ("memory", Memory),
            ("state_bits", StateBits),
            ("remainders", Place),
            ("hand_on", HandOn),
            ("gain", Gain),
        )
        for name, kind in choices:
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(map(str, get_args(kind)))
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed is {allowed}")
        if isinstance(self.chunk_size, str) and self.chunk_size != "auto":
            raise ValueError(f"chunk_size is {self.chunk_size!r}, allowed is a number or 'auto'")
        if isinstance(self.chunk_size, float) or (
            isinstance(self.chunk_size, int) and self.chunk_size < 1
        ):
            raise ValueError(f"chunk_size is {self.chunk_size}, allowed is None or 1 and more")
        if self.remainders == "host" and not self.keeps_remainders:
            raise ValueError(
                "remainders is 'host', which has an effect only with arithmetic 'exact' and memory "
                "'reverse' or 'budget'"
            )
        if self.state_bits == 16 and self.arithmetic == "float":
            raise ValueError("state_bits is 16, which has an effect only with arithmetic 'exact'")
        if self.by_channel and self.fraction_bits != FRACTION_BITS:
            raise ValueError("fraction_bits has an effect only with state_bits 32")
        self._check_budget("memory_budget", self.memory == "budget", "memory 'budget'")
        self._check_budget("chunk_budget", self.chunk_size == "auto", "chunk_size 'auto'")
        if self.chunk_tokens is not None:
            if self.chunk_tokens < 1:
                raise ValueError(
                    f"chunk_tokens is {self.chunk_tokens}, allowed is None or 1 and more"
                )
            if self.chunk_size != 1:
                raise ValueError(
                    f"chunk_tokens cuts single samples: chunk_size is {self.chunk_size}, "
                    "allowed is 1"
                )
        if not 0 <= self.fraction_bits <= 28:
            raise ValueError(f"fraction_bits is {self.fraction_bits}, allowed is 0 to 28")

    def _check_budget(self, name: str, needed: bool, by: str) -> None:
        value = getattr(self, name)
        if needed and (value is None or value < 0):
            raise ValueError(f"{by} needs {name}, a number of bytes: found {value}")
        if not needed and value is not None:
            raise ValueError(f"{name} is {value}, which has an effect only with {by}")

    @property
    def proves(self) -> bool:
        """Whether a backward pass must be proven: whether anything is run twice or rounded."""
        return self.arithmetic == "exact" or self.memory != "store"

    @property
    def keeps_remainders(self) -> bool:
        """Whether a forward pass leaves remainders, at any beta below 1."""
        return self.arithmetic == "exact" and self.memory in ("reverse", "budget")

    @property
    def measured(self) -> bool:
        """Whether something of it is settled by measuring."""
        return self.memory == "budget" or self.chunk_size == "auto"

    def _check_conventional(self) -> None:
        reverses = self.memory in ("reverse", "budget")
        if self.alpha != 1 or self.arithmetic != "float" or reverses:
            raise ValueError(
                "beta is 0, which nothing can reverse: it is allowed only for conventional "
                "finetuning (alpha 1, arithmetic float, memory store or checkpoint)"
            )
        if self.hand_on == "mean":
            raise ValueError("beta is 0, which keeps no second state: hand_on mean has no effect")
        if self.gain == "consistent":
            raise ValueError("beta is 0: gain consistent, which is 1 + beta, has no effect")

    @property
    def remainder_bits(self) -> int:
        """Bits kept for each element and function: ceil(log2(1 / beta)), 0 where nothing is."""
        if self.arithmetic == "float":
            return 0
        return (math.ceil(1 / self.beta) - 1).bit_length()

    @property
    def factor(self) -> float:
        """By which outputs of functions behind a chain's first one are multiplied: it has 17 bits,
        so that fp64 holds its product with an fp32 output."""
        return 1 + self.beta if self.gain == "consistent" else 1.0

    @property
    def by_channel(self) -> bool:
        """Whether states have a step of their own for each channel."""
        return self.arithmetic == "exact" and self.state_bits == 16

    def check_range(self, num_functions: int) -> None:
        """Raises ValueError if states of usual size would outgrow the fixed-point range."""
        if self.arithmetic == "float":
            return
        factor = growth(self.alpha, self.beta, num_functions)
        text = (
            f"alpha {self.alpha:.5g} and beta {self.beta:.5g} make states grow {factor:.3g} "
            f"times over {num_functions} functions, too much for "
        )
        limit = LIMITS[32] / 2.0**self.fraction_bits
        if self.state_bits == 16 and factor > MOST_GROWTH:
            raise ValueError(
                f"{text}states of 16 bits, of which eight must be left where a chain begins: "
                "choose alpha = 1 - beta or state_bits 32"
            )
        if self.state_bits == 32 and factor * USUAL_MAGNITUDE > limit:
            raise ValueError(
                f"{text}the range of {limit:g} at fraction_bits {self.fraction_bits}: choose "
                "alpha = 1 - beta or fewer bits"
            )
