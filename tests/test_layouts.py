"""Functions that keep their activations, and slices that are chosen by measuring."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dr2dist
from dr2dist.reversible import Chain
from tests.chain_helpers import Storages
from tests.functions import make_chain, tokens
from tests.models import build, images

COUNT = 6
KEPT: list[tuple[int, ...]] = [
    (),
    (0,),
    (5,),
    (4, 5),
    (0, 1),
    (2,),
    (2, 3),
    (1, 2, 4),
    (0, 2, 4),
    (1, 3, 5),
    (0, 1, 2, 3, 4, 5),
]


def kept_chain(kept: tuple[int, ...], **setting: Any) -> Chain:
    """A chain with a budget whose plan is given."""
    chain = make_chain(
        count=COUNT, dropout=0.1, drop_path=0.2, memory="budget", memory_budget=0, **setting
    )
    chain.planner.load(
        {"chain": {"chunk_size": setting.get("chunk_size"), "chunk_tokens": None, "kept": kept}}
    )
    return chain


def passes(chain: Chain, times: int = 1) -> list[Tensor]:
    """Output, gradients of the input and of all parameters after backward passes."""
    torch.manual_seed(5)
    x = tokens().requires_grad_()
    output, taps = chain(x, taps=[2, -1])
    total = output.sin().sum() + sum(tap.cos().sum() for tap in taps)
    for number in range(times):
        total.backward(retain_graph=number < times - 1)
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad for p in chain.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_any_functions_may_keep_their_activations(
    kept: tuple[int, ...], chunk_size: int | None
) -> None:
    for times in (1, 2):
        store = make_chain(
            count=COUNT, dropout=0.1, drop_path=0.2, memory="store", chunk_size=chunk_size
        )
        chain = kept_chain(kept, chunk_size=chunk_size)
        found, wanted = passes(chain, times), passes(store, times)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        certificate = chain.certificate()
        assert certificate is not None and certificate.failures == 0 and certificate.verified
        # A chain's first function has no remainders, whoever keeps what.
        reversed_functions = COUNT - len(set(kept) | {0})
        assert (certificate.remainder_bytes > 0) == (reversed_functions > 0)


def test_kept_states_restart_the_drift() -> None:
    drifts = []
    for kept in ((), (2,), (2, 4)):
        chain = kept_chain(kept, arithmetic="float", alpha=0.9, beta=0.1)
        found = passes(chain)
        store = make_chain(
            count=COUNT, dropout=0.1, drop_path=0.2, memory="store", arithmetic="float"
        )
        assert torch.equal(found[0], passes(store)[0])
        certificate = chain.certificate()
        assert certificate is not None and certificate.drift is not None
        drifts.append(certificate.drift)
    assert drifts[0] > 10 * drifts[1] > 10 * drifts[2]


def test_a_flipped_remainder_beside_kept_functions_is_noticed() -> None:
    chain = kept_chain((3,))
    chain.on_failure = "record"
    output = chain(tokens().requires_grad_())
    (tape,) = chain._tapes
    tape.remainders.part(1, 0)[7] ^= 1
    output.sum().backward()
    certificate = chain.certificate()
    assert certificate is not None and certificate.failures > 0


@pytest.fixture
def equal_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function takes one second by the planner's clock, so that choices can be compared."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr("dr2dist.reversible.budget.costs.time", clock)


def _held(chain: Chain) -> int:
    x = tokens(4, 50).requires_grad_()
    with Storages() as storages:
        output = chain(x).sum()
        held = storages.alive
        output.backward()
    return held


@pytest.mark.usefixtures("equal_times")
def test_a_budget_buys_graphs_within_its_bytes() -> None:
    reverse = _held(make_chain(count=COUNT))
    store = _held(make_chain(count=COUNT, memory="store"))
    plans = []
    for share in (0, 0.4, 0.7, 2):
        budget = int(share * (store - reverse))
        chain = make_chain(count=COUNT, memory="budget", memory_budget=budget)
        held = _held(chain)
        assert held <= reverse + budget
        plans.append(chain.planner.state()["chain"]["kept"])
    assert plans[0] == [] and plans[-1] == list(range(COUNT))
    assert len(plans[0]) < len(plans[1]) < len(plans[2]) < len(plans[3])


def test_a_budget_is_shared_by_the_chains_of_a_network() -> None:
    wanted = _gradients(dr2dist.convert(build("swin"), memory="store"), 1)
    sizes = []
    for budget in (0, 2**20, 2**40):
        net = dr2dist.convert(build("swin"), memory="budget", memory_budget=budget)
        assert _gradients(net, 2) == wanted
        kept = [values["kept"] for values in net.planner.state().values()]
        assert len(kept) == 3 and net.certificate().failures == 0
        sizes.append(sum(map(len, kept)))
    assert sizes[0] == 0 < sizes[1] < sizes[2] == 12


def _gradients(net: Any, times: int) -> dict[str, list[float]]:
    for _ in range(times):  # chains are measured in the first pass
        net.zero_grad()
        net(images()).square().sum().backward()
    return {name: p.grad.flatten().tolist() for name, p in net.named_parameters()}


def test_slices_are_chosen_by_a_budget() -> None:
    chosen = []
    for budget in (2**24, 300_000, 200_000, 120_000):
        net = dr2dist.convert(build("vit"), chunk_size="auto", chunk_budget=budget)
        net(images(8)).square().sum().backward()
        assert net.certificate().failures == 0
        (values,) = net.planner.state().values()
        chosen.append((values["chunk_size"], values["chunk_tokens"]))
    whole, few, *_, least = chosen
    assert whole == (8, None)
    assert few[0] in (1, 2, 4) and few[1] is None
    assert least[0] == 1 and len(set(chosen)) > 2
    net = dr2dist.convert(build("vit"), chunk_size="auto", chunk_budget=10)
    with pytest.raises(ValueError, match="smallest slice of this network's functions takes"):
        net(images(8))


def test_what_is_measured_is_settled_once() -> None:
    net = dr2dist.convert(build("vit"), chunk_size="auto", chunk_budget=2**19)
    before = torch.get_rng_state()
    net(images(8)).square().sum().backward()
    state = net.planner.state()
    assert torch.equal(torch.get_rng_state(), before)
    net(images(3))
    assert net.planner.state() == state
    other = dr2dist.convert(build("vit"), chunk_size="auto", chunk_budget=1)
    other.planner.load(state)
    other(images(8))
    assert other.planner.state() == state


BUDGETS: list[dict[str, Any]] = [
    {"chunk_size": "auto", "chunk_budget": 400_000},
    {"memory": "budget", "memory_budget": 2_000_000},
]


@pytest.mark.usefixtures("equal_times")
@pytest.mark.parametrize("setting", BUDGETS)
def test_a_pass_that_does_not_train_settles_nothing(setting: dict[str, Any]) -> None:
    layouts, outputs = [], []
    for first in (False, True):
        net = dr2dist.convert(build("vit", depth=3), **setting)
        if first:
            with torch.no_grad():
                outputs.append(net(images(2)))
            assert net.planner.state() == {}
        net(images(16)).square().sum().backward()
        layouts.append(net.planner.state())
    with torch.no_grad():
        outputs.append(dr2dist.convert(build("vit", depth=3))(images(2)))
    torch.testing.assert_close(*outputs)
    assert layouts[0] == layouts[1]


@pytest.mark.usefixtures("equal_times")
@pytest.mark.parametrize("setting", BUDGETS)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_larger_batch_is_measured_anew(setting: dict[str, Any], kind: str) -> None:
    layouts = []
    for batches in ((2, 2, 16, 16), (16, 16)):
        net = dr2dist.convert(build(kind, depth=3), **setting)
        for batch in batches:
            net(images(batch)).square().sum().backward()
            assert net.certificate().failures == 0
        layouts.append(net.planner.state())
    assert layouts[0] == layouts[1]
