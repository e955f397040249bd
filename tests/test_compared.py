"""Ranks that would not train the same are refused before the first step, by host."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import get_args

import pytest

from dr2dist.config.schema import Allowed
from dr2dist.data.index import read_index
from dr2dist.training.facts import facts_of_program
from tests.images import make_small_shards
from tests.pool import Pool

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: shards/train, num_workers: 0}
optim: {lr: 1e-3}
train: {steps: 2, micro_batch: 4}
parallel: {zero: 0}
output: run
"""


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([{"torch": "2"}, {"torch": "2"}], None),
        ([{"torch": "2"}, {"torch": "3"}], "on HOST (rank 1) torch is '3', not '2', as on HOST"),
        ([{}, {"more": "1"}], "on HOST (rank 1) more is '1', not unset"),
        ([{"less": "1"}, {}], "on HOST (rank 1) less is unset, not '1'"),
        (
            [{str(n): "a" for n in range(9)}, {str(n): "b" for n in range(9)}],
            "2 is 'b', not 'a' and 6 more",
        ),
    ],
)
def test_what_differs_is_told_on_every_rank(
    facts: list[dict[str, str]], message: str | None, two_ranks: Pool
) -> None:
    for said in two_ranks.run("tests.host_cases:compared", facts=facts):
        if message is None:
            assert said is None
        else:
            assert message.replace("HOST", socket.gethostname()) in said


def test_ranks_of_one_program_agree(two_ranks: Pool) -> None:
    one, other = two_ranks.run("tests.host_cases:program")
    assert one == other and {"torch", "dr2dist's source", "device"} <= one.keys()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A configuration, and two folders with the same shards."""
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("a", "b"):
        (folder / name).mkdir()
        make_small_shards(folder / name)
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    return str(path), [str(folder / name) for name in ("a", "b")]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["optim.lr=2e-3"], "optim.lr is '0.002', not '0.001'"),
        (["train.seed=7"], "train.seed is '7', not '0'"),
        (["data.train=shards/val"], "data.train is 'shards/val', not 'shards/train'"),
    ],
)
def test_another_configuration_is_refused(
    other: list[str], message: str, nodes: tuple[str, list[str]], two_ranks: Pool
) -> None:
    path, folders = nodes
    for said in two_ranks.run(
        "tests.host_cases:run_apart", path=path, folders=folders, overrides=[[], other]
    ):
        assert said is not None and message in said and "\n" not in said
    assert not (Path(folders[0]) / "run").exists()


def test_other_data_of_the_same_name_are_refused(
    nodes: tuple[str, list[str]], two_ranks: Pool
) -> None:
    path, folders = nodes
    index = Path(folders[1], "shards", "train", "index.json")
    kept = index.read_text()
    digest = read_index(str(index.parent)).shards[0].sha256
    assert digest is not None
    index.write_text(kept.replace(digest, "0" * len(digest)))
    calls = {"path": path, "folders": folders, "overrides": [[], []]}
    for said in two_ranks.run("tests.host_cases:run_apart", **calls):
        assert said is not None and "data.train's index is" in said
    index.write_text(kept)


def test_an_output_that_is_not_shared_is_refused(
    nodes: tuple[str, list[str]], two_ranks: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folders = nodes
    calls = {"path": path, "folders": folders, "overrides": [[], []]}
    for said in two_ranks.run("tests.host_cases:run_apart", **calls):
        assert said is not None
        assert "output (run, which all nodes must share) is 'No such file or directory'" in said
    # In one folder the same two ranks run.
    calls["folders"] = [folders[0], folders[0]]
    calls["overrides"] = [["output=shared"], ["output=shared"]]
    assert two_ranks.run("tests.host_cases:run_apart", **calls) == [None, None]


def test_what_may_differ_is_not_compared() -> None:
    kinds = get_args(Allowed)
    assert facts_of_program(kinds) == {}
    for kind in kinds:
        left = facts_of_program([other for other in kinds if other != kind])
        assert left and left.items() < facts_of_program(()).items()
