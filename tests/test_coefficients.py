"""Schedules against closed forms, to a step of the coefficients (half of it is rounded off)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from dr2dist.coefficients import Coefficients, Knot, Schedule
from dr2dist.config.coefficients import Conserve, Constant, Paper, Piecewise
from dr2dist.reversible import Setting


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_a_path_ends_with_the_step_of_its_share(share: float) -> None:
    """Though 0.07 x 100 is a little more than 7."""
    schedule = Conserve(beta=(0.1, 0.5), until=share, every=1).schedule(100)
    assert schedule.end == round(100 * share)
    assert schedule.at(schedule.end).beta == 0.5 and schedule.at(schedule.end - 1).beta < 0.5


def test_conserve_moves_in_small_steps_and_keeps_the_sum() -> None:
    schedule = Conserve(beta=(0.1, 0.5), until=0.5, every=10).schedule(200)
    points = [schedule.at(step) for step in range(201)]
    assert all(point.alpha + point.beta == 1 for point in points)
    assert all((point.beta * 65536).is_integer() for point in points)
    betas = [point.beta for point in points]
    assert betas == sorted(betas)
    assert betas[0] == pytest.approx(0.1, abs=2**-16) and betas[100:] == [0.5] * 101
    changes = [step for step in range(1, 201) if betas[step] != betas[step - 1]]
    assert changes == list(range(10, 101, 10))
    assert betas[55] == pytest.approx(0.1 + 0.4 * 50 / 100, abs=2**-16)


PATHS = [
    Conserve(beta=(0.03, 0.97), until=0.7, every=3, shape="cosine"),
    Conserve(beta=(0.9, 0.1), until=1.0, every=1),
    Paper(kind="paper", until=0.5, every=7),
    Paper(kind="paper", until=0.8, every=4, order="beta_first"),
    Paper(kind="paper", until=1.0, every=5, order="alpha_first", shape="cosine"),
    Piecewise(kind="piecewise", knots=((0.1, 1, 0.1), (0.5, 0.5, 0.5), (0.9, 0, 1)), every=4),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
@pytest.mark.parametrize("steps", [1, 17, 1000])
def test_every_path_moves_one_way_on_the_grid_only_when_it_may(path: Any, steps: int) -> None:
    schedule = path.schedule(steps)
    points = [schedule.at(step) for step in range(2 * steps + 1)]
    for step, (before, now) in enumerate(pairwise(points), 1):
        assert before == now or step % path.every == 0
    for values in zip(*points, strict=True):
        assert all((value * 65536).is_integer() for value in values)
        assert list(values) in (sorted(values), sorted(values, reverse=True))
    if path.kind == "conserve":
        assert all(alpha + beta == 1 for alpha, beta in points)


def test_paper_moves_both_at_once() -> None:
    schedule = Paper(kind="paper", alpha=(1.0, 0.3), beta=(0.1, 0.7), every=1).schedule(100)
    assert schedule.at(0) == Coefficients(1.0, 6554 / 65536)
    alpha, beta = schedule.at(50)
    assert (alpha, beta) == (pytest.approx(0.65, abs=2**-16), pytest.approx(0.4, abs=2**-16))
    assert schedule.at(100).alpha == pytest.approx(0.3, abs=2**-16)
    assert schedule.at(10**6) == schedule.at(100)


def test_orders_of_the_paper_move_one_after_the_other() -> None:
    said: dict[str, Any] = {"alpha": (1.0, 0.4), "beta": (0.1, 0.7), "until": 0.8, "every": 1}
    for order, halfway in (("beta_first", (1.0, 0.7)), ("alpha_first", (0.4, 0.1))):
        schedule = Paper(kind="paper", order=order, **said).schedule(100)  # type: ignore[arg-type]
        assert schedule.at(40) == pytest.approx(halfway, abs=2**-16)
        assert schedule.at(80) == pytest.approx((0.4, 0.7), abs=2**-16)
        # One of them stands still in each half.
        first, second = (0, 1) if order == "beta_first" else (1, 0)
        assert len({schedule.at(step)[first] for step in range(41)}) == 1
        assert len({schedule.at(step)[second] for step in range(40, 81)}) == 1
        assert schedule.pairs() == [schedule.at(step) for step in range(81)]


def test_interleaved_alpha_is_half_a_move_behind_beta() -> None:
    # What the code of openpoints gives for freq 1000 and a freeze_ratio of 0.6.
    said: dict[str, Any] = {"alpha": (1.0, 0.4), "beta": (0.1, 0.7), "until": 0.6, "every": 1000}
    schedule = Paper(kind="paper", order="interleaved", **said).schedule(49_750)
    wanted = {0: (1, 0.1), 999: (1, 0.1), 1000: (1, 0.1201), 1500: (0.9799, 0.1201)}
    wanted |= {1999: (0.9799, 0.1201), 2000: (0.9799, 0.1402), 30_500: (0.4, 0.7)}
    for step, pair in wanted.items():
        assert schedule.at(step) == pytest.approx(pair, abs=5e-5)
    assert schedule.end == 30_500 and schedule.at(schedule.end) == schedule.at(49_750)
    assert schedule.at(schedule.end - 1) != schedule.at(schedule.end)
    assert schedule.pairs() == list(dict.fromkeys(map(schedule.at, range(49_751))))
    with pytest.raises(ValueError, match="every is 1, allowed with order interleaved is 2"):
        Paper(kind="paper", order="interleaved", every=1)


def test_cosine_eases() -> None:
    schedule = Conserve(beta=(0.2, 0.6), until=1.0, every=1, shape="cosine").schedule(40)
    for step in range(41):
        wanted = 0.2 + 0.4 * (1 - math.cos(math.pi * step / 40)) / 2
        assert schedule.at(step).beta == pytest.approx(wanted, abs=2**-16)


def test_constant_and_piecewise() -> None:
    assert Constant(kind="constant", alpha=1, beta=0).schedule(9).at(5) == Coefficients(1, 0)
    knots = ((0.2, 0.9, 0.1), (0.4, 0.5, 0.5), (1.0, 0.0, 1.0))
    schedule = Piecewise(kind="piecewise", knots=knots, every=1).schedule(100)
    assert schedule.at(0) == schedule.at(19) == schedule.at(20)
    assert schedule.at(30).beta == pytest.approx(0.3, abs=2**-16)
    assert schedule.at(40) == Coefficients(0.5, 0.5)
    assert schedule.at(70).alpha == pytest.approx(0.25, abs=2**-16)
    with pytest.raises(ValueError, match="rising order"):
        Piecewise(kind="piecewise", knots=((0.4, 1, 0.1), (0.2, 1, 0.1)))


def test_a_path_that_the_range_cannot_hold_is_refused() -> None:
    setting = Setting()
    path = Schedule((Knot(0, 1.0, 0.1), Knot(1, 0.9, 0.1)), 100)
    path.check(setting, [24, 2])
    with pytest.raises(ValueError, match="over 96 functions"):
        path.check(setting, [24, 96])
    Conserve().schedule(100).check(setting, [1000])
    worst_in_the_middle = Schedule((Knot(0, 0.9, 0.1), Knot(0.5, 1, 1), Knot(1, 0, 1)), 100)
    with pytest.raises(ValueError, match="grow"):
        worst_in_the_middle.check(setting, [48])
    worst_in_the_middle.check(Setting(arithmetic="float"), [48])


def test_remainders_on_the_host_need_a_beta_that_discards_bits() -> None:
    host = Setting(remainders="host")
    with pytest.raises(ValueError, match="remainders is 'host', which has no effect"):
        Schedule((Knot(0, 1.0, 1.0), Knot(1, 0.9, 1.0)), 100).check(host, [4])
    Schedule((Knot(0, 1.0, 1.0), Knot(1, 0.9, 0.5)), 100).check(host, [4])
