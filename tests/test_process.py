"""An engine leaves nothing behind: torch's functions, settings of the process, its own memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pool import Pool


@pytest.fixture(scope="module")
def own_process() -> Iterator[Pool]:
    pool = Pool(1)
    yield pool
    pool.close()


LOUD: dict[str, Any] = {"log_level": "critical", "comms_logger": {"enabled": True}}


@pytest.mark.parametrize("extra", [{}, LOUD], ids=["quiet", "loud"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", [3, 0, 1, 2])
def test_nothing_of_an_engine_outlives_it(
    zero: int, bf16: bool, extra: dict[str, Any], own_process: Pool
) -> None:
    (found,) = own_process.run("tests.process_cases:left_by", zero=zero, bf16=bf16, extra=extra)
    assert found == {"during": [], "after": [], "settings": [], "left": []}


def test_nothing_of_a_network_that_was_sharded_as_it_was_built(own_process: Pool) -> None:
    (found,) = own_process.run(
        "tests.process_cases:left_by", zero=3, bf16=True, extra={}, deferred=True
    )
    assert found == {"during": [], "after": [], "settings": [], "left": []}


@pytest.mark.parametrize("memory", ["reverse", "store", "checkpoint"])
@pytest.mark.parametrize("zero", [2, 3])
def test_steps_leave_no_tensors_behind(zero: int, memory: str, own_process: Pool) -> None:
    (alive,) = own_process.run("tests.process_cases:alive_after_steps", zero=zero, memory=memory)
    # One that a thread of DeepSpeed's still has at the moment is none that each step leaves.
    assert max(alive) - min(alive) < len(alive) - 1, alive
