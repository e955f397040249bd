"""Several sources in one order: exact shares, each sample once a pass, the same for all layouts."""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.config import load_config
from dr2dist.data.mixing import Deal, MixedOrder
from dr2dist.data.order import Item, Order
from dr2dist.data.positions import batches, of_node, open_at_most
from dr2dist.errors import UserError
from dr2dist.training.datasets import datasets
from dr2dist.training.described_plan import describe
from dr2dist.training.folder import find_start
from dr2dist.training.plan import make_plan
from tests.images import make_small_shards
from tests.pool import Pool

LARGE = tuple(int(n) for n in np.random.default_rng(0).integers(1, 300, 60))
SMALL = tuple(int(n) for n in np.random.default_rng(1).integers(1, 60, 30))


def mixed(sources: Any = (LARGE, SMALL), passes: Any = (1, 2.5), streams: int = 16) -> MixedOrder:
    orders = [
        Order(counts, f"c0ffee{number}", streams, 40, seed=number, turned=True)
        for number, counts in enumerate(sources)
    ]
    return MixedOrder(orders, passes)


def sources_of(found: MixedOrder, items: list[Item]) -> list[int]:
    ends = np.cumsum([part.num_samples for part in found.parts])
    return [int(np.searchsorted(ends, index, "right")) for _, index in items]


@pytest.mark.parametrize("seed", range(8))
def test_every_prefix_has_each_source_s_share_within_one_sample(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = (10 ** generator.uniform(0, 4, generator.integers(2, 9))).astype(int) + 1
    sizes = sizes if seed else np.array([9000, 1000, 1000, 1000, 1000, 1])
    sources, numbers = Deal([int(n) for n in sizes]).at(np.arange(sizes.sum()))
    places = np.arange(1, sizes.sum() + 1)
    for source, size in enumerate(sizes):
        own = sources == source
        assert np.array_equal(numbers[own], np.arange(size))
        # In whole numbers, since a share is a fraction: |count M - p m| < M.
        off = own.cumsum() * int(sizes.sum()) - places * int(size)
        assert abs(off).max() < sizes.sum()


@pytest.mark.parametrize("passes", [(1, 1), (1, 2.5), (0.3, 1), (2, 0.01)])
def test_each_sample_is_there_once_a_pass(passes: tuple[float, float]) -> None:
    found = mixed(passes=passes)
    assert [*found.lengths] == [
        max(1, round(part.num_samples * count))
        for part, count in zip(found.parts, passes, strict=True)
    ]
    items = found.items(np.arange(5 * found.num_samples))
    assert len(set(items)) == len(items)
    for source, part in enumerate(found.parts):
        first = sum(each.num_samples for each in found.parts[:source])
        own = [
            item for item, of in zip(items, sources_of(found, items), strict=True) if of == source
        ]
        assert len(own) == 5 * found.lengths[source]
        epochs = Counter(epoch for epoch, _ in own)
        whole = len(own) // part.num_samples
        assert [epochs[k] for k in range(whole)] == [part.num_samples] * whole
        assert [epoch for epoch, _ in own] == sorted(epoch for epoch, _ in own)
        assert all(first <= index < first + part.num_samples for _, index in own)
    places = np.random.default_rng(1).integers(0, 5 * found.num_samples, 40)
    alone = [mixed(passes=passes).items(places[k : k + 1])[0] for k in range(40)]
    assert alone == [items[place] for place in places]


@pytest.mark.parametrize("sources", [(LARGE, SMALL), (LARGE, SMALL, (100,) * 20)])
def test_global_batches_do_not_depend_on_the_layout(sources: Any) -> None:
    order = mixed(sources, [1, 2.5, 0.7][: len(sources)])

    def together(layout: tuple[int, int, int, int], start: int) -> list[list[Item]]:
        micro_batch, accumulate, replicas, nodes = layout
        ways: Any = {"micro_batch": micro_batch, "accumulate": accumulate, "nodes": nodes}
        each = [
            batches(order, replica=replica, replicas=replicas, start=start, **ways)
            for replica in range(replicas)
        ]
        taken = [[i for one in each for p in islice(one, accumulate) for i in p] for _ in range(5)]
        return [sorted(items) for items in taken]

    for start in (0, 96 * 7, order.num_samples - 96 * 2, order.num_samples * 3 - 1):
        wanted = together((96, 1, 1, 1), start)
        for layout in ((48, 1, 2, 2), (12, 1, 8, 8), (3, 4, 8, 1), (3, 2, 16, 4), (3, 1, 32, 32)):
            assert together(layout, start) == wanted, layout


@pytest.mark.parametrize("nodes", [2, 4, 16])
def test_nodes_read_their_own_streams_of_two_sources(nodes: int) -> None:
    """No sample goes to another node but around the end of a pass, and what is read is foreseen."""
    order = mixed()
    batch, steps = 96, 3 * order.num_samples // 96
    moved = 0
    for node in range(nodes):
        uses = [use for epoch in range(4) for use in order.uses(epoch, node, nodes)]
        ends = np.cumsum(order.counts)
        for step in range(steps):
            positions = of_node(order, step * batch, batch, node, nodes)
            own = order.owners(positions, nodes) == node
            moved += int((~own).sum())
            shards = np.searchsorted(ends, [i for _, i in order.items(positions[own])], "right")
            for position, shard in zip(positions[own].tolist(), shards.tolist(), strict=True):
                assert any(u.shard == shard and u.first <= position <= u.last for u in uses)
    passes = 3 * (1 + 2.5)
    assert moved <= 2 * passes * 16


def test_shards_that_are_open_are_counted_over_sources() -> None:
    order = mixed()
    alone = [open_at_most(part) for part in order.parts]
    assert max(alone) <= open_at_most(order) <= sum(alone) + 2


CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 2}}
task: {name: classification, num_classes: 2, balance_classes: true}
data: {train: [{shards: ONE/train, passes: 0.5}, TWO/train], val: ONE/val}
optim: {name: sgd, lr: 0.01}
train: {epochs: 2, micro_batch: 4, log_every: 1}
checkpoint: {steps: 3}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return (
        make_small_shards(tmp_path_factory.mktemp("one"), 60, 32),
        make_small_shards(tmp_path_factory.mktemp("two"), 30, 32),
    )


def written(folder: Path, shards: tuple[Path, Path], train: str | None = None) -> Path:
    path = folder / "run.yaml"
    text = CONFIG
    if train is not None:
        text = text.replace("[{shards: ONE/train, passes: 0.5}, TWO/train]", train)
    text = text.replace("ONE", str(shards[0])).replace("TWO", str(shards[1]))
    path.write_text(text.replace("OUTPUT", str(folder / "run")))
    return path


def test_a_run_of_two_sources_breaks_off_and_goes_on_with_the_same_bits(
    tmp_path: Path, shards: tuple[Path, Path], two_ranks: Pool
) -> None:
    path = written(tmp_path, shards)
    plan = make_plan(load_config(path), 2)
    said = describe(plan)
    # 42 and 21 samples for training: 21 and 21 in an epoch.
    assert (plan.steps, plan.steps_per_epoch) == (11, 6) and "63 for training" in said, said
    assert "mixes         a micro-batch is of up to 4 shards" in said
    assert said.count("50.0% of an epoch") == 2 and "0.5 pass(es)" in said and "1 pass(es)" in said
    whole, cut = (f"output={tmp_path / name}" for name in ("whole", "cut"))
    two_ranks.run("tests.cases:run_config", path=str(path), overrides=[whole])
    two_ranks.run("tests.cases:run_until", path=str(path), overrides=[cut], step=4)
    two_ranks.run("tests.cases:run_config", path=str(path), overrides=[cut])
    ends = [Checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("whole", "cut")]
    for name in ends[0].names("master"):
        assert torch.equal(*(end.tensor("master", name) for end in ends)), name
    with pytest.raises(UserError, match=r"data\.train: .*goes on"):
        again = written(tmp_path, shards, "[{shards: ONE/train, passes: 0.25}, TWO/train]")
        find_start(load_config(again, [cut]), plan.global_batch, plan.steps, plan.train.digest())


def test_sources_may_be_named_from_the_present_folder(
    tmp_path: Path, shards: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards[0])
    other = os.path.relpath(shards[1] / "train")
    found = load_config(written(tmp_path, shards, f"[train, {{shards: {other}, passes: 2}}]"))
    plan = make_plan(found, 1)
    plan.try_out(found, fetch=False)
    order: Any = plan.order
    assert order.lengths == (42, 42)
    dataset, _ = datasets(found, plan.task, plan.train, plan.val)
    keys = {dataset[item].key for item in order.items(np.arange(84))}
    assert len(keys) == 63 and any(key.startswith(f"{other}/shard-0") for key in keys)


REFUSED = [
    ("[]", "data.train: found []"),
    ("[{passes: 2}]", "data.train.0.shards: is missing"),
    ("[{shards: ONE/train, passes: 0}]", "data.train.0.passes: found 0"),
    ("[{shards: ONE/train, pases: 2}]", "did you mean 'passes'"),
    ("3", "data.train: found 3"),
    ("[3]", "data.train.0: found 3"),
    ("[ONE/train, nowhere]", "nowhere: no index.json"),
    ("[ONE/train, OTHER/train]", "classes"),
    ("[ONE/train, TWO/train], order: dealt", "data: order is dealt"),
]


@pytest.mark.parametrize(("train", "line"), REFUSED)
def test_sources_that_cannot_be_are_named(
    tmp_path: Path, shards: tuple[Path, Path], train: str, line: str
) -> None:
    if "OTHER" in train:
        other = make_small_shards(tmp_path, 30, 32, ("cat", "dog"))
        train = train.replace("OTHER", str(other))
    with pytest.raises(UserError, match=r".+") as caught:
        make_plan(load_config(written(tmp_path, shards, train)), 1)
    assert line in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
