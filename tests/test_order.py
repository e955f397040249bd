"""The order of samples: each once an epoch, the same for all layouts, mixed, and cheap."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest

from dr2dist.data.dealt import dealt_batches, epoch_order
from dr2dist.data.order import Item, Order
from dr2dist.data.positions import batches, fitting_nodes, open_at_most
from dr2dist.errors import UserError

UNEVEN = tuple(int(n) for n in np.random.default_rng(0).integers(1, 300, 400))


def order(counts: Any = UNEVEN, streams: int = 16, window: int | None = None) -> Order:
    return Order(counts, "c0ffee", streams, window, seed=5)


def share(found: Order, layout: tuple[int, int, int, int], replica: int, start: int) -> Any:
    """Steps of one replica, each a list of its micro-batches' items."""
    micro_batch, accumulate, replicas, nodes = layout
    stream = batches(
        found,
        micro_batch=micro_batch,
        accumulate=accumulate,
        replica=replica,
        replicas=replicas,
        nodes=nodes,
        start=start,
    )
    while True:
        yield [item for part in islice(stream, accumulate) for item in part]


def global_batches(
    layout: tuple[int, int, int, int], count: int, start: int = 0, counts: Any = UNEVEN
) -> list[list[Item]]:
    """What all replicas take together, each from an order of its own, as processes would."""
    shares = [share(order(counts), layout, replica, start) for replica in range(layout[2])]
    return [sorted(item for each in shares for item in next(each)) for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "streams", "window"),
    [
        (UNEVEN, 64, None),
        (UNEVEN, 16, 77),
        (UNEVEN[:40], 16, 1),
        ((100,) * 640, 64, None),
        ((9,), 8, 4),
        ((3, 0, 5, 0), 64, None),
        ((1,), 1, 1),
    ],
)
def test_each_sample_is_there_once_an_epoch(
    counts: tuple[int, ...], streams: int, window: int | None
) -> None:
    found = order(counts, streams, window)
    total = sum(counts)
    epochs = [found.items(np.arange(k * total, (k + 1) * total)) for k in range(2)]
    for number, items in enumerate(epochs):
        assert sorted(items) == [(number, index) for index in range(total)]
    assert total < 10 or window == 1 or [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    places = np.random.default_rng(1).integers(0, 2 * total, 40)
    alone = [order(counts, streams, window).items(places[k : k + 1])[0] for k in range(40)]
    assert alone == [(*epochs[0], *epochs[1])[place] for place in places]


@pytest.mark.parametrize("start", [0, 96 * 7, sum(UNEVEN) - 96 * 2, sum(UNEVEN) - 1, sum(UNEVEN)])
def test_global_batches_do_not_depend_on_the_layout(start: int) -> None:
    """Across the end of an epoch too, which no batch ends with."""
    assert sum(UNEVEN) % 96
    wanted = global_batches((96, 1, 1, 1), 5, start)
    for layout in ((48, 1, 2, 2), (12, 1, 8, 8), (3, 4, 8, 1), (2, 3, 16, 4), (3, 1, 32, 32)):
        assert global_batches(layout, 5, start) == wanted, layout


def test_a_run_goes_on_with_other_batches_where_it_was() -> None:
    before = [item for batch in global_batches((24, 1, 4, 4), 300) for item in batch]
    after = [item for batch in global_batches((10, 1, 2, 1), 1900, 96 * 300) for item in batch]
    total, both = sum(UNEVEN), sorted([*before, *after])
    assert both[:total] == [(0, index) for index in range(total)]
    assert len(set(both)) == len(both) > total


def test_a_thousand_ranks_of_many_nodes() -> None:
    counts = [int(n) for n in np.random.default_rng(2).integers(1, 5001, 1000)]
    one = [Order(counts, "ab", 250) for _ in range(3)]
    for start in (0, sum(counts) - 3000):
        layouts = ((2000, 1, 1, 1), (250, 1, 8, 1), (2, 1, 1000, 125))
        found = []
        for known, layout in zip(one, layouts, strict=True):
            shares = [share(known, layout, replica, start) for replica in range(layout[2])]
            found.append([sorted(i for each in shares for i in next(each)) for _ in range(2)])
        assert found[0] == found[1] == found[2]


def classes_of(items: list[Item], shards: int, each: int) -> int:
    """Of 20 classes that shards are sorted by."""
    return len({index // each * 20 // shards for _, index in items})


@pytest.mark.parametrize("shards", [640, 6400])
@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (8, 1), (64, 8)])
def test_sorted_shards_are_mixed(shards: int, ranks: int, nodes: int) -> None:
    """Against 32 draws of 20 classes; in the middle of an epoch, and in its first and last 5 %."""
    each, wanted = 50, 20 * (1 - (19 / 20) ** 32)
    found = Order([each] * shards, "ab")
    total = shards * each
    for start, share_of_shuffled in ((0, 0.8), (total // 2, 0.9), (int(total * 0.95), 0.8)):
        layout = (32, 1, ranks, nodes)
        steps = max(1, min(40, int(total * 0.05) // (32 * ranks)))
        taken = [
            items
            for replica in range(ranks)
            for items in islice(share(found, layout, replica, start), steps)
        ]
        mean = np.mean([classes_of(items, shards, each) for items in taken])
        assert mean >= share_of_shuffled * wanted, (start, mean)


def test_few_shards_are_open_at_a_time() -> None:
    """A window's, and one more that comes and one that goes."""
    found, each = Order([100] * 640, "ab", 8), 100
    items = [index // each for _, index in found.items(np.arange(64000))]
    last = {shard: place for place, shard in enumerate(items)}
    first = {shard: place for place, shard in reversed(list(enumerate(items)))}
    opened = np.zeros(64001, int)
    for shard in range(640):
        opened[first[shard]] += 1
        opened[last[shard] + 1] -= 1
    assert opened.cumsum().max() <= 8 * 11
    assert opened.cumsum().max() <= open_at_most(found) <= 8 * 14


LARGE = """
import numpy, resource, time
from dr2dist.data.order import Order
from dr2dist.data.positions import batches
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = [int(n) for n in numpy.random.default_rng(0).integers(1, 10000, 10000)]
start = time.process_time()
order = Order(counts, "ab")
next(batches(order, micro_batch=32, accumulate=1, replica=3, replicas=1000))
print(sum(counts), time.process_time() - start)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_fifty_million_samples_take_little_memory() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=60
    )
    samples, _, growth = result.stdout.split()
    assert int(samples) > 49e6 and int(growth) < 300 * 1024, result.stdout + result.stderr


def test_nodes_divide_streams_or_are_refused() -> None:
    many = Order([1000] * 100, "ab", 64)
    assert [fitting_nodes(nodes, many, 64) for nodes in (1, 8, 64, 128)] == [1, 8, 64, 128]
    with pytest.raises(UserError, match=r"data\.streams is 64, which 3 nodes .* 63 and 66"):
        fitting_nodes(3, many, 64)
    few = Order([40], "ab", 64)
    assert few.streams == 2 and fitting_nodes(3, few, 64) == 1


@pytest.mark.parametrize(("samples", "streams"), [(100, 8), (103, 7), (5, 64), (1, 1)])
def test_a_dealt_epoch_is_a_permutation_of_its_own(samples: int, streams: int) -> None:
    orders = [epoch_order(samples, streams, 3, epoch) for epoch in range(3)]
    for each in orders:
        assert sorted(each.tolist()) == list(range(samples))
    assert samples < 10 or not np.array_equal(orders[0], orders[1])


def test_dealt_batches_do_not_depend_on_the_layout() -> None:
    def together(ranks: int, micro_batch: int, accumulate: int, start: int = 0) -> list[Any]:
        ways: Any = {"micro_batch": micro_batch, "accumulate": accumulate, "ranks": ranks}
        each = [dealt_batches(101, 8, 5, rank=rank, start=start, **ways) for rank in range(ranks)]

        def step() -> list[Item]:
            return sorted(item for one in each for p in islice(one, accumulate) for item in p)

        return [step() for _ in range(24)]

    wanted = together(1, 8, 1)
    for layout in ((2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)):
        assert together(*layout) == wanted
    assert together(2, 4, 1, start=20)[:4] == wanted[20:]
    items = [item for batch in wanted[:12] for item in batch]
    assert len(set(items)) == 96 and {item[0] for item in items} == {0}
