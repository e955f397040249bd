"""Whatever passes the plan starts; what does not is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import call
from tests.generated import generate, with_fault
from tests.images import make_small_shards
from tests.pool import Pool

MANY = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("data"), 24, 32)


def _outcome(pool: Pool, folder: Path, values: object) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    found = pool.run("tests.generated:outcome", path=str(path), output=str(folder / "run"))
    assert found[0] == found[1] and "\n" not in found[0], (values, found)
    return str(found[0])


@pytest.mark.parametrize(
    "seeds", [range(25), pytest.param(range(25, 200), marks=MANY)], ids=["few", "many"]
)
def test_what_passes_the_plan_runs(
    seeds: range, shards: Path, tmp_path: Path, two_ranks: Pool
) -> None:
    found = [_outcome(two_ranks, tmp_path, generate(seed, str(shards))) for seed in seeds]
    assert found.count("ran") >= len(found) // 3, found


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 100), marks=MANY)], ids=["few", "many"]
)
def test_a_fault_is_refused_by_the_plan(
    seeds: range, shards: Path, tmp_path: Path, two_ranks: Pool
) -> None:
    for seed in seeds:
        values, key = with_fault(seed, str(shards))
        found = _outcome(two_ranks, tmp_path, values)
        assert found != "ran", (key, values)


@pytest.mark.parametrize("seed", [0, 9, *(pytest.param(n, marks=MANY) for n in range(10, 38))])
def test_the_command_refuses_a_fault_with_status_2(
    seed: int, shards: Path, tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / "config.yaml"
    values = {"output": str(tmp_path / "run"), **with_fault(seed, str(shards))[0]}
    path.write_text(yaml.safe_dump(values))
    status, _, told = call(capfd, "train", str(path), "--dry-run")
    assert status == 2 and "Traceback" not in told, told
    assert told.splitlines()[-1].startswith("dr2dist: ") and not (tmp_path / "run").exists()
