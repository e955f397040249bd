"""ZeRO-3: how often parameters are gathered, and when, counted at the collectives."""

from __future__ import annotations

from tests.pool import Pool

FUNCTIONS, SLICES = 6, 4


def test_slices_gather_once_where_accumulation_gathers_for_each(two_ranks: Pool) -> None:
    (sliced, _), _ = two_ranks.run("tests.cases:gathers", chunk_size=1)
    (whole, _), _ = two_ranks.run("tests.cases:gathers")
    (accumulated, _), _ = two_ranks.run(
        "tests.cases:gathers", memory="checkpoint", accumulate=SLICES
    )
    assert sliced == whole
    assert accumulated / sliced >= SLICES


def test_the_next_function_is_gathered_while_one_runs_forth_and_back(two_ranks: Pool) -> None:
    for _, log in two_ranks.run("tests.cases:gathers", chunk_size=1):
        waiting, runs = 0, []
        for event in log:
            waiting += {"start": 1, "wait": -1, "run": 0}[event]
            if event == "run":
                runs.append(waiting)
        # For each function: how many gathers were under way in each of its slices.
        functions = [tuple(runs[i : i + SLICES]) for i in range(0, len(runs), SLICES)]
        last = (0,) * SLICES
        wanted = [(1,) * SLICES] * (FUNCTIONS - 1) + [last]
        assert functions == wanted + wanted
