"""Shards are fetched before they are read, a cache holds what is open, lost ones are skipped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dr2dist.data.cache import Cache, Wanted, room_for
from dr2dist.data.fields import Fields
from dr2dist.data.index import Index, Shard, read_index
from dr2dist.data.order import Order
from dr2dist.data.positions import open_at_most
from dr2dist.data.prefetch import Prefetcher, check_limit, least_cache
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from tests.images import make_small_shards
from tests.servers import serve


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 shards of 16 samples."""
    return make_small_shards(tmp_path_factory.mktemp("many"), 1144, 8) / "train"


@pytest.mark.parametrize("share", [1.1, 0.6])
def test_shards_are_there_before_they_are_read(share: float, many: Path, tmp_path: Path) -> None:
    """In the first epoch each is fetched once, and later what was not kept."""
    server, ends = serve(many), np.cumsum([shard.samples for shard in read_index(many).shards])
    index = read_index(server.url)
    order = Order([shard.samples for shard in index.shards], index.digest(), 2, 8, seed=1)
    everything = sum(shard.bytes or 0 for shard in index.shards)
    cache = Cache(tmp_path / "cache", int(everything * share * 9 / 8))
    assert least_cache(index, order) <= cache.limit
    prefetcher, fetched = Prefetcher(cache, index, order, 0, 1), [0]
    for position in range(3 * order.num_samples):
        if position % 4 == 0:
            prefetcher.look(position)
        ((_, sample),) = order.items(np.array([position]))
        shard = index.shards[int(np.searchsorted(ends, sample, "right"))]
        assert cache.holds(index.wanted(shard)), position
        assert cache.used() <= cache.limit
        if (position + 1) % order.num_samples == 0:
            sent = sum(server.faults.sent[shard.name] for shard in index.shards)
            fetched.append(sent)
    server.stop()
    by_epoch = np.diff(fetched) / everything
    assert by_epoch[0] <= 1.05 and by_epoch[2] <= max(0, 1 - share) + 0.05, by_epoch


class Counted:
    """A cache that fetches nothing: it counts, and forgets what is used last."""

    def __init__(self, limit: int) -> None:
        self.limit, self.fetched = limit, 0
        self.held: dict[str, int] = {}
        self.soon: dict[str, int] = {}

    def plan(self, soon: dict[str, int], others: int) -> None:
        self.soon = soon

    def fetch(self, wanted: Wanted, next_use: int = 0) -> None:
        if wanted.name in self.held:
            return
        room = room_for(wanted.bytes or 0)
        for name in sorted(self.held, key=lambda each: -self.soon.get(each, 10**9)):
            if sum(self.held.values()) + room <= self.limit:
                break
            del self.held[name]
        self.held[wanted.name] = room
        self.fetched += wanted.bytes or 0


def test_bytes_are_fetched_evenly() -> None:
    """In any 100 batches at most 1.5 of the mean, over epochs' ends too."""
    shards = [Shard(n, f"{n:04}.tar", 100, 10**6, None, ()) for n in range(400)]
    index = Index("http://nowhere", "index", (), tuple(shards))
    order = Order([100] * 400, "ab", 4, seed=1)
    cache: Any = Counted(2 * least_cache(index, order))
    prefetcher, fetched = Prefetcher(cache, index, order, 0, 1), []
    for position in range(0, 3 * order.num_samples, 32):
        prefetcher.look(position)
        fetched.append(cache.fetched)
    each = np.array(fetched)
    later = each[len(each) // 3 :]
    in_100 = later[100:] - later[:-100]
    assert in_100.max() <= 1.5 * (later[-1] - later[0]) / (len(later) - 1) * 100


def test_a_cache_that_is_too_small_is_refused(many: Path) -> None:
    index = read_index(many)
    order = Order([shard.samples for shard in index.shards], index.digest(), 2, 16)
    least = least_cache(index, order)
    check_limit(Cache(Path("x"), least), index, order, 1)
    with pytest.raises(UserError, match=rf"limit is 9000 bytes, .* up to {least} .* so many$"):
        check_limit(Cache(Path("x"), 9000), index, order, 1)
    with pytest.raises(UserError, match=r"or a data\.shuffle_window of \d+ samples") as caught:
        check_limit(Cache(Path("x"), least - 1), index, order, 1)
    window = int(str(caught.value).split("window of ")[1].split()[0])
    assert window < 16
    check_limit(Cache(Path("x"), least - 1), index, order.within(window), 1)


def test_a_rank_keeps_no_more_shards_open_than_the_plan_says(many: Path) -> None:
    index = read_index(many)
    order = Order([shard.samples for shard in index.shards], index.digest(), 2, 8)
    most = open_at_most(order)
    found = ShardDataset(index, Fields({"label": "cls"}), lambda values: values, most=most)
    opened = []
    for item in order.items(np.arange(2 * order.num_samples)):
        found[item]
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        opened.append(sum(os.path.realpath(link).startswith(str(many)) for link in links))
    assert 2 <= max(opened) <= most < len(index.shards) / 2


def dataset(source: Path, unreadable: Any = "other") -> ShardDataset:
    fields = Fields({"label": "cls"})
    return ShardDataset(source, fields, lambda values: values, 0, unreadable)


def test_a_lost_shard_is_skipped(many: Path, tmp_path: Path) -> None:
    """Its samples count once each; in validation they are left out, however many."""
    copied = tmp_path / "shards"
    shutil.copytree(many, copied)
    index = read_index(copied)
    (copied / index.shards[0].name).unlink()
    lost = index.shards[0].samples
    for unreadable in ("other", "drop"):
        reads = [dataset(copied, unreadable)[0, number] for number in range(lost + 3)]
        assert [read.skipped for read in reads] == [1] * lost + [0] * 3
        assert [read.count for read in reads] == [unreadable == "other"] * lost + [True] * 3
    others = [dataset(copied)[0, number].key for number in range(lost)]
    assert len(set(others)) > lost // 2  # from all over
