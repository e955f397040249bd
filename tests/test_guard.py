"""Guarded coefficients: when they move, and a run that they visibly change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dr2dist.coefficients import Bounds, Guard, Limits, Memory
from dr2dist.coefficients.guard import HORIZON
from tests.pool import Pool
from tests.runs import masters, metrics
from tests.test_stage_runs import shards, train  # noqa: F401 - a fixture

LIMITS = Limits(Bounds(0.1, 0.3), Bounds(1e-3, 1e-2))


def walk(losses: list[float], drifts: list[float | None] | None = None, every: int = 2) -> Any:
    """(actions, places) of the decisions."""
    guard = Guard(LIMITS, every, last=3 * every, memory=Memory())
    found = []
    for step, loss in enumerate(losses, 1):
        decision = guard.note(step, loss, drifts[step - 1] if drifts else None)
        assert (decision is None) == bool(step % every)
        if decision is not None:
            found.append((decision.action, decision.place))
    return [action for action, _ in found], [place for _, place in found]


def test_a_falling_loss_lets_the_path_move_to_its_end() -> None:
    assert walk([1 / step for step in range(1, 11)]) == (["move"] * 5, [2, 4, 6, 6, 6])


def test_a_loss_that_has_risen_holds_and_what_goes_on_rising_turns_back() -> None:
    # A jump by J lifts the smoothed loss by J (1 - (1 - 1 / HORIZON)^n) in n steps.
    jump = 1.0
    lifted = [jump * (1 - (1 - 1 / HORIZON) ** n) for n in range(1, 11)]
    wanted = ["move"] + [
        "move" if rise <= 0.1 else "hold" if rise <= 0.3 else "back" for rise in lifted[1::2]
    ]
    actions, places = walk([1.0] * 2 + [1.0 + jump] * 10)
    assert actions == wanted and {"move", "hold", "back"} == set(actions)
    place, ways = 0, {"move": 2, "hold": 0, "back": -2}
    for action, found in zip(actions, places, strict=True):
        place = max(0, place + ways[action])
        assert found == place


def test_what_holds_moves_on_only_below_half_of_the_bound() -> None:
    drifts = [5e-4, 2e-3, 9e-4, 6e-4, 4e-4, 9e-4]
    actions, _ = walk([1.0] * 6, drifts, every=1)
    assert actions == ["move", "hold", "hold", "hold", "move", "move"]


def test_a_value_is_held_against_half_a_bound_only_if_it_was_that_which_held() -> None:
    # The loss lies 0.07 above its lowest, under its bound of 0.1, all the time.
    guard = Guard(LIMITS, 1, last=99, memory=Memory(smoothed=1.07, lowest=1.0))
    drifts = [1e-6, 2e-3, 1e-6, 1e-6]
    decisions = [guard.note(step, 1.07, drift) for step, drift in enumerate(drifts, 1)]
    assert [found and found.action for found in decisions] == ["move", "hold", "move", "move"]
    assert decisions[1] is not None and decisions[1].reason == "drift 0.002, bound 0.001"


def test_the_worst_drift_since_the_last_decision_counts_and_nan_turns_back() -> None:
    assert walk([1.0] * 4, [5e-3, 1e-4, 1e-4, 1e-4])[0] == ["hold", "move"]
    assert walk([1.0] * 4, [1e-4, float("nan"), 1e-4, 1e-4])[0] == ["back", "move"]


# 24 functions drift by 1e-6 at beta 0.9 and by more than the bound on the way to 0.5.
GUARDED = (
    "parallel.stages=2", "model.options={depth: 12}", "model.drop_path=0.1",
    "reversible.arithmetic=float", "train.steps=12",
    "coefficients={kind: guarded, beta: [0.9, 0.5], every: 1, drift: [1.0e-4, 1.0e-2]}",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def guarded(folder: Path, shards: Path, two_ranks: Pool) -> Path:  # noqa: F811
    train(two_ranks, folder, shards, "guarded", *GUARDED)
    return folder / "guarded"


def betas(run: Path) -> list[float]:
    return [line["beta"] for line in metrics(run) if "beta" in line]


def test_a_run_stays_where_its_drift_allows_and_says_why(
    guarded: Path, folder: Path, shards: Path, two_ranks: Pool  # noqa: F811
) -> None:  # fmt: skip
    free = "coefficients={kind: conserve, beta: [0.9, 0.5], every: 1}"
    train(two_ranks, folder, shards, "free", *GUARDED[:-1], free)
    held, moved = betas(guarded), betas(folder / "free")
    stop = next(step for step in range(12) if held[step] != moved[step])
    assert 1 < stop < 10 and held[:stop] == moved[:stop]
    # It stays at the first beta that drifts by more than the bound, where the other goes on.
    assert held[stop:] == [held[stop - 1]] * (12 - stop)
    drifts = [line["drift"] for line in metrics(folder / "free") if "drift" in line]
    assert drifts[stop - 2] < 1e-4 < drifts[stop - 1] < drifts[-1]
    decisions = [line for line in metrics(guarded) if "guard" in line]
    assert [line["guard"] for line in decisions] == ["move"] * (stop - 1) + ["hold"] * (13 - stop)
    assert decisions[-1]["guard_reason"].startswith("drift ")


def test_a_guarded_run_that_breaks_off_goes_on_to_the_same_bits(
    guarded: Path, folder: Path, shards: Path, two_ranks: Pool  # noqa: F811
) -> None:  # fmt: skip
    train(two_ranks, folder, shards, "broken", *GUARDED, step=8)
    train(two_ranks, folder, shards, "broken", *GUARDED)
    assert metrics(folder / "broken") == metrics(guarded)
    ours, theirs = masters(folder / "broken"), masters(guarded)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_checkpoints_from_before_there_were_guards_are_read(
    folder: Path, shards: Path, one_rank: Pool  # noqa: F811
) -> None:  # fmt: skip
    train(one_rank, folder, shards, "old", step=4)
    (manifest,) = (folder / "old" / "checkpoints").glob("step-*4/checkpoint.json")
    state = json.loads(manifest.read_text())
    del state["progress"]["guard"]
    manifest.write_text(json.dumps(state))
    assert train(one_rank, folder, shards, "old")["steps"] == 8
