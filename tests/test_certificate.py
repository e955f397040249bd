"""What a certificate notices, and what a chain does about it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dr2dist
from dr2dist.parallel.verdict import failure_kinds
from dr2dist.reversible import Chain, Layout, Setting, Sides
from dr2dist.reversible.certificate import worst_drift
from dr2dist.reversible.failure import ReversalError
from tests.functions import WIDTH, make_chain, tokens
from tests.models import build

NUM_CHANGES = 150
"""For each place in a normal run; ten times as many in a long one."""
MODES: dict[str, dict[str, Any]] = {
    "reverse": {"memory": "reverse"},
    "reverse-16-bits": {"memory": "reverse", "state_bits": 16},
    "checkpoint-16-bits": {"memory": "checkpoint", "state_bits": 16},
    "checkpoint": {"memory": "checkpoint"},
    "budget": {"memory": "budget", "memory_budget": 1500},
    "float-checkpoint": {"memory": "checkpoint", "arithmetic": "float"},
}
SIZE = 3, 5, 8


class Changed(nn.Module):
    """A branch whose second run differs in one element's bits, or in two that cancel in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE[-1], SIZE[-1])
        self.change: tuple[list[int], list[int]] | None = None
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        output = torch.tanh(self.layer(x))
        self.runs += 1
        if self.change is None or self.runs == 1:
            return output
        changed = output.detach().clone().contiguous()
        change_bits(changed, *self.change)
        return _With.apply(output, changed)  # type: ignore[no-any-return]


class _With(torch.autograd.Function):
    """Another value with the same gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, changed: Tensor) -> Tensor:
        return changed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def change_bits(value: Tensor, places: list[int], steps: list[int]) -> None:
    """Adds whole numbers to elements' bits, wrapping."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[value.element_size()]
    bits = value.view(-1).view(kind)
    for place, step in zip(places, steps, strict=True):
        bits[place] += step


def random_change(generator: torch.Generator, count: int, bits: int) -> Any:
    """One element, two that cancel in a plain sum, or two of any kind: (places, steps)."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    first, second = torch.randperm(count, generator=generator)[:2].tolist()
    step = (1 << draw(0, bits - 2)) * draw(1, 4) % (1 << bits - 1) or 1
    kind = draw(0, 3)
    if kind == 0:
        return [first], [step]
    return [first, second], [step, -step if kind == 1 else draw(1, 1 << bits - 2)]


def pass_of(chain: Chain) -> None:
    chain(torch.ones(SIZE).cumsum(1)).square().mean().backward()


def changed_chain(mode: str) -> tuple[Chain, list[Any]]:
    torch.manual_seed(0)
    functions = [Changed() for _ in range(4)]
    return Chain(functions, on_failure="record", **MODES[mode]), functions


def counts(request: pytest.FixtureRequest) -> int:
    long = "slow" not in (request.config.getoption("-m") or "")
    return NUM_CHANGES * (10 if long else 1)


@pytest.mark.parametrize("mode", MODES)
def test_every_change_of_an_output_is_caught(mode: str, request: pytest.FixtureRequest) -> None:
    chain, functions = changed_chain(mode)
    pass_of(chain)  # measures, if there is a budget
    for function in functions:
        function.runs = 0
    pass_of(chain)
    assert chain.certificate().failures == 0
    twice = [f for f in functions if f.runs == 2]  # a budget keeps some: those run once
    assert twice
    generator = torch.Generator().manual_seed(1)
    for number in range(counts(request)):
        for function in functions:
            function.runs, function.change = 0, None
        change = random_change(generator, math.prod(SIZE), 32)
        twice[number % len(twice)].change = change
        pass_of(chain)
        assert chain.certificate().failures, (number, change)


@pytest.mark.parametrize("mode", ["reverse", "reverse-16-bits", "budget"])
def test_every_change_of_a_remainder_is_caught(mode: str, request: pytest.FixtureRequest) -> None:
    chain, _ = changed_chain(mode)
    generator = torch.Generator().manual_seed(2)
    for number in range(counts(request)):
        output = chain(torch.ones(SIZE).cumsum(1))
        (tape,) = [tape for tape in chain._tapes if tape.open]
        held = [rest for rest in tape.remainders.held() if len(rest)]
        remainder = held[number % len(held)]
        change_bits(remainder, *random_change(generator, len(remainder), 8))
        output.square().mean().backward()
        assert chain.certificate().failures, number


@pytest.mark.parametrize("bits", [16, 32])
def test_every_change_of_a_returned_state_is_caught(
    bits: Any, request: pytest.FixtureRequest
) -> None:
    """A stage's start, which is only compared by its checksum."""
    torch.manual_seed(0)
    chain = make_chain(count=4, state_bits=bits)
    chain.record(tokens(2, 3))  # finds scales
    setting = Setting(0.9, 0.1, state_bits=bits)
    before, after = chain.part(0, 2), chain.part(2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        state, _, _ = before.forward(tokens(2, 3), Sides({}), setting, Layout())
        last, tape, _ = after.go_on(state.copy(), torch.float32, Sides({}), setting, Layout())
        found = after.reverse(tape, last)
        assert all(map(torch.equal, found, state)) and tape.flags.tensor[3] == 0
        for number in range(counts(request)):
            other = last.copy()
            part = other[number % 2]
            change_bits(part, *random_change(generator, part.numel(), bits))
            tape.flags.tensor[2:4] = torch.tensor([-1, 0])
            after.reverse(tape, other)
            assert tape.flags.tensor[2] >= 0 or tape.flags.tensor[3], number


@pytest.mark.parametrize("memory", ["reverse", "checkpoint"])
def test_a_failing_pass_raises_unless_it_is_to_be_recorded(memory: str) -> None:
    def failing(**options: Any) -> Chain:
        chain = make_chain(count=4, memory=memory, name="body", **options)
        output = chain(tokens())
        chain.functions[2].scale.data.mul_(2)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            output.sum().backward()
        told_here.append([str(each.message) for each in told])
        return chain

    told_here: list[list[str]] = []
    with pytest.raises(ReversalError, match="body: the recompute of function 2 differs"):
        failing()
    assert failing(on_failure="warn").certificate().failures
    assert failing(on_failure="record").certificate().failures
    assert [len(lines) for lines in told_here] == [1, 0] and "function 2" in told_here[0][0]
    with pytest.raises(ValueError, match="on_failure is 'ignore', allowed is raise, warn, record"):
        make_chain(on_failure="ignore")


@pytest.mark.parametrize("function", range(3))
@pytest.mark.parametrize("memory", ["reverse", "checkpoint"])
def test_a_failing_pass_gives_no_gradient_from_its_failure_on(function: int, memory: str) -> None:
    chain, proven = make_chain(count=3, memory=memory), make_chain(count=3, memory=memory)
    proven(tokens()).sum().backward()
    output = chain(tokens())
    chain.functions[function].scale.data.mul_(2)
    with pytest.raises(ReversalError):
        output.sum().backward()
    for place, (found, right) in enumerate(zip(chain.functions, proven.functions, strict=True)):
        for parameter, like in zip(found.parameters(), right.parameters(), strict=True):
            if place > function:
                assert torch.equal(parameter.grad, like.grad)
            else:
                assert parameter.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_input_that_is_not_finite_is_told_as_such(arithmetic: str, value: float) -> None:
    chain = make_chain(count=3, arithmetic=arithmetic, name="body", on_failure="record")
    x = tokens()
    x[1, 2, 3] = value
    chain(x).sum().backward()
    assert chain.certificate().messages[0] == "body: the tokens that enter are not finite"
    assert "fraction_bits" not in "".join(chain.certificate().messages)
    assert failure_kinds(chain.ledger.last.tolist()) == {"finite"}


def test_drift_that_is_no_number_is_the_worst() -> None:
    chain = make_chain(count=3, arithmetic="float", on_failure="record", alpha=0.3, beta=0.7)
    for x in (tokens() * math.nan, tokens()):
        chain(x).sum().backward()
    _, drift = chain.ledger.take()
    assert drift.isnan()
    assert math.isnan(worst_drift([1.0, math.nan, None, math.inf]) or 0)


def test_switches_of_the_process_are_those_of_the_forward_pass() -> None:
    """A recompute must not see what was set in between."""
    net = dr2dist.convert(build("vit", depth=2).train(), chunk_size=2)
    seen: list[tuple[Any, ...]] = []

    def look(*_: Any) -> None:
        seen.append(
            (
                torch.backends.cuda.math_sdp_enabled(),
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.mkldnn.matmul.fp32_precision,
                torch.get_num_threads(),
                torch.is_autocast_enabled("cpu"),
            )
        )

    net.blocks[0].attn.register_forward_hook(look)
    threads = torch.get_num_threads()
    output = net(torch.randn(2, 3, 32, 32))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.backends.cuda.enable_math_sdp(False)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(threads + 1)
        with torch.autocast("cpu", torch.bfloat16):
            output.square().mean().backward()
        assert not torch.backends.cuda.math_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.backends.cuda.enable_math_sdp(True)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert net.certificate().failures == 0


def test_sides_may_be_trees_of_tensors() -> None:
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, shifts: Any = None, mask: Any = None) -> Tensor:
            moved = x * shifts["scale"][0] + shifts["bias"]
            return self.inner(moved) * mask[0]

    def found(**setting: Any) -> list[Tensor]:
        inner = make_chain(count=3)
        chain = Chain([Shifted(function) for function in inner.functions], chunk_size=2, **setting)
        shifts = {
            "bias": torch.linspace(-1, 1, WIDTH).requires_grad_(),
            "scale": (torch.tensor(0.7, requires_grad=True), "unused"),
        }
        mask = [torch.rand(5, 7, 1, generator=torch.Generator().manual_seed(2)).requires_grad_()]
        x = tokens().requires_grad_()
        chain(x, batched=["mask"], shifts=shifts, mask=mask).square().mean().backward()
        leaves = [x, shifts["bias"], shifts["scale"][0], mask[0]]
        return [leaf.grad for leaf in leaves]

    wanted = found(memory="store")
    for setting in ({}, {"memory": "checkpoint"}):
        assert all(map(torch.equal, found(**setting), wanted))
    inner = make_chain(count=3)
    bias = torch.linspace(-1, 1, WIDTH).requires_grad_()
    scale = torch.tensor(0.7, requires_grad=True)
    mask = torch.rand(5, 7, 1, generator=torch.Generator().manual_seed(2)).requires_grad_()
    x = start = tokens().requires_grad_()
    y = 0.1 * x
    for function in inner.functions:
        x, y = function(x * scale + bias) * mask + 0.9 * x + y, 0.1 * x
    x.square().mean().backward()
    for leaf, grad in zip((start, bias, scale, mask), wanted, strict=True):
        assert torch.allclose(grad, leaf.grad, rtol=1e-3, atol=1e-5)
