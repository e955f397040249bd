"""Pipeline stages in real processes: the same training, however the network is cut."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

import dr2dist
from dr2dist.errors import UserError
from dr2dist.parallel.pipeline.grid import Grid
from dr2dist.parallel.pipeline.layers import layers_of
from dr2dist.parallel.pipeline.partition import partition
from dr2dist.parallel.pipeline.stage import Stage
from dr2dist.reversible.budget.costs import Watermark
from tests.models import build
from tests.pool import Pool

CURVE = "tests.stage_cases:curve"


@pytest.fixture(scope="module", params=["vit", "swin"])
def whole(request: pytest.FixtureRequest, one_rank: Pool) -> Any:
    """(kind, the curve of one stage on one rank)."""
    (found,) = one_rank.run(CURVE, kind=request.param, stages=1)
    return request.param, found


def check(found: Any, wanted: Any, kind: str) -> None:
    """Losses within 1e-4; weights within 1e-3 of how far training has moved them."""
    (losses, weights, norms, _), *_ = found
    assert losses == pytest.approx(wanted[0], rel=1e-4)
    assert norms == pytest.approx(wanted[2], rel=1e-3)
    torch.manual_seed(0)
    start = build(kind, depth=4).state_dict()
    names = [name for name in wanted[1] if start[name].is_floating_point()]
    moved = sum((wanted[1][n] - start[n]).square().sum() for n in names)
    apart = sum((wanted[1][n] - weights[n]).square().sum() for n in names)
    assert set(weights) == set(wanted[1])
    assert 0 <= apart.sqrt() < 1e-3 * moved.sqrt()


def test_two_stages_train_as_one_does(whole: Any, two_ranks: Pool) -> None:
    kind, wanted = whole
    found = two_ranks.run(CURVE, kind=kind, stages=2)
    check(found, wanted, kind)
    assert all(layers for *_, layers in found)


def test_four_stages_train_as_one_does(whole: Any, four_ranks: Pool) -> None:
    kind, wanted = whole
    check(four_ranks.run(CURVE, kind=kind, stages=4), wanted, kind)


def test_stages_and_replicas_under_zero_1_train_as_one_does(whole: Any, four_ranks: Pool) -> None:
    kind, wanted = whole
    check(four_ranks.run(CURVE, kind=kind, stages=2, zero=1), wanted, kind)


@pytest.mark.parametrize("cut", [1, 6])
def test_tokens_of_autocasts_dtype_cross_a_cut(cut: int, one_rank: Pool, two_ranks: Pool) -> None:
    # Behind the stem and behind a patch merging.
    options = {"kind": "swin", "bf16": True, "steps": 3, "alpha": 0.5, "beta": 0.5}
    ((losses, *_),) = one_rank.run(CURVE, stages=1, **options)
    found, *_ = two_ranks.run(CURVE, stages=2, cuts=(cut,), **options)
    assert found[0] == pytest.approx(losses, rel=1e-3)


def test_a_stage_lets_go_of_what_has_been_received(two_ranks: Pool) -> None:
    for few, many in two_ranks.run("tests.stage_cases:peaks", counts=(4, 12)):
        assert many == few


@pytest.mark.parametrize(
    "kind", ["eva-rope", "eva-mixed-rope", "beit-shared-bias", "relpos-shared"]
)
def test_what_functions_share_crosses_the_cuts(kind: str, one_rank: Pool, four_ranks: Pool) -> None:
    (wanted,) = one_rank.run(CURVE, kind=kind, stages=1, steps=5)
    check(four_ranks.run(CURVE, kind=kind, stages=4, steps=5, cuts=(3, 4, 9)), wanted, kind)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_cut_anywhere_gives_the_same_bits_reversed_returned_or_stored(
    cut: int, bf16: bool, arithmetic: str, two_ranks: Pool
) -> None:
    # After the stem, inside a block, before the head.
    options = {"cuts": (cut,), "bf16": bf16, "noisy": True, "arithmetic": arithmetic, "beta": 0.5}
    options |= {"kind": "vit", "stages": 2, "steps": 2, "alpha": 0.5}
    modes: list[dict[str, Any]] = [{}, {"returned": False}]
    if arithmetic == "exact":
        modes.append({"memory": "store"})
    results = [two_ranks.run(CURVE, **options, **mode)[0] for mode in modes]
    if arithmetic == "float":
        # What comes back has drifted; what was kept has not.
        assert results[0][0] == pytest.approx(results[1][0], rel=2e-2 if bf16 else 1e-3)
        return
    for losses, weights, *_ in results[1:]:
        assert losses == results[0][0]
        for name, value in results[0][1].items():
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("coefficients", "alpha 0.800003, most ranks have 0.899994; rank {}: beta 0.199997"),
        ("bits", "blocks: grid 17, most ranks have 18"),
        ("step", "applied steps 1, most ranks have 0"),
    ],
)
def test_a_rank_that_disagrees_is_named_and_nothing_is_applied(
    kind: str, named: str, who: int, four_ranks: Pool
) -> None:
    for message in four_ranks.run("tests.stage_cases:fault", kind=kind, who=who):
        assert message.startswith(f"rank {who}: {named.format(who)}")
        assert all(line.startswith(f"rank {who}: ") for line in message.split("; "))


def test_the_grid_is_deepspeeds_and_keeps_a_stages_replicas_together() -> None:
    for stages, replicas in itertools.product(range(1, 5), range(1, 5)):
        grid = Grid.of(stages * replicas, stages)
        topology = PipeDataParallelTopology(stages, replicas)
        for rank in range(stages * replicas):
            stage, replica = grid.place(rank)
            assert topology.get_coord(rank) == (stage, replica)
            assert grid.rank(stage, replica) == rank
    assert [Grid(2, 4).place(rank)[0] for rank in range(8)] == [0] * 4 + [1] * 4
    assert Grid(4, 1).bubble(12) == pytest.approx(3 / 15)
    with pytest.raises(UserError, match=r"parallel\.stages is 3, which does not divide the 4"):
        Grid.of(4, 3)


@pytest.mark.parametrize("seed", range(30))
def test_the_slowest_stage_is_as_fast_as_it_can_be(seed: int) -> None:
    draw = random.Random(seed)
    costs = [float(draw.randint(1, 30)) for _ in range(draw.randint(4, 9))]
    stages = draw.randint(1, 4)
    best = min(
        max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in itertools.combinations(range(1, len(costs)), stages - 1)
    )
    found = partition(costs, stages)
    assert [index for part in found for index in part] == list(range(len(costs)))
    assert all(found) and max(sum(costs[i] for i in part) for part in found) == best


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.stages is 5, the network has 4 layers"):
        partition([1.0] * 4, 5)


def test_a_first_stage_holds_the_images_of_micro_batches_in_flight_and_remainders() -> None:
    # The norm before the blocks would keep tokens.
    net = dr2dist.convert(build("vit-clip", depth=4), alpha=0.5, beta=0.5).train()
    stage = Stage(net, layers_of(net), range(5), returned=True)
    batch, flight, held = 8, [], []
    with Watermark() as mark:
        for _ in range(4):
            run = stage.forward(torch.randn(batch, 3, 32, 32))
            run.message()
            flight.append(run)
            held.append(mark.alive)
    images, remainders = 4 * batch * 3 * 32 * 32, 3 * batch * 17 * 48 // 8
    grown = {after - before for before, after in itertools.pairwise(held)}
    assert len(grown) == 1 and 0 <= max(grown) - images - remainders < 8000  # a random state


def test_running_statistics_of_a_stem_move_once_a_micro_batch() -> None:
    model = build("vit", depth=4)
    model.patch_embed.norm = torch.nn.BatchNorm1d(16)
    net = dr2dist.convert(model, alpha=0.5, beta=0.5).train()
    stage = Stage(net, layers_of(net), range(5), returned=True)
    run = stage.forward(torch.randn(8, 3, 32, 32))
    message = run.message()
    run.backward(torch.ones(2, 8, 17, 48), message.clone())
    assert model.patch_embed.norm.num_batches_tracked == 1
    assert model.patch_embed.norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("returned", [True, False])
def test_a_micro_batch_in_flight_holds_remainders_and_at_most_a_state(returned: bool) -> None:
    net = dr2dist.convert(build("vit", depth=4), alpha=0.5, beta=0.5).train()
    stage = Stage(net, layers_of(net), range(3, 7), returned)
    batch, tokens, width, functions = 8, 17, 48, 4
    held, flight = [], []
    with Watermark() as mark:
        for _ in range(4):
            run = stage.forward(torch.zeros(2, batch, tokens, width, dtype=torch.int32))
            run.message()
            flight.append(run)
            held.append(mark.alive)
    one_tensor = 4 * batch * tokens * width
    state = 0 if returned else 2 * one_tensor
    # 1 bit of each element and function; 8 bytes a function and some for flags and seeds.
    grown = {after - before for before, after in itertools.pairwise(held)}
    small = max(grown) - state - functions * one_tensor // 32
    assert len(grown) == 1 and 0 <= small < 1000
