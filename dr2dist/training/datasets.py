"""The data sets of a run, as its configuration and its task say."""

from __future__ import annotations

from pathlib import Path

from dr2dist.config import Config
from dr2dist.config.task import Data, stands_alone
from dr2dist.data.cache import Cache
from dr2dist.data.fields import Fields
from dr2dist.data.index import Index, read_index
from dr2dist.data.joined import Joined
from dr2dist.data.mixing import MixedOrder
from dr2dist.data.order import Order
from dr2dist.data.positions import AnyOrder
from dr2dist.data.prefetch import check_limit
from dr2dist.data.stream import ShardDataset
from dr2dist.tasks.task import Task


def datasets(
    config: Config, task: Task, train: Index, val: Index | None, most: int | None = None
) -> tuple[ShardDataset, ShardDataset | None]:
    """(training, held out), the second None where there is none. most: training shards that are
    open at a time. Raises UserError for transforms that cannot be."""
    data = config.data
    skip, fields = data.unreadable == "skip", Fields(task.fields, data.fields)
    transform, seed, cache = task.transform(data), config.train.seed, cache_of(data)
    training = ShardDataset(
        train, fields, transform, seed, "other" if skip else "fail", cache, most
    )
    if val is None:
        return training, None
    held_out = ShardDataset(
        val, fields, task.transform(), unreadable="drop" if skip else "fail", cache=cache
    )
    return training, held_out


def cache_of(data: Data) -> Cache | None:
    """Where shards are kept that are elsewhere, if the run says so."""
    said = data.cache
    if said is None:
        return None
    return Cache(Path(said.folder), int(said.limit), said.patience, said.of == "all")


def fetching(data: Data, index: Index) -> Cache | None:
    """Where shards of the index are kept that are fetched; None if they all are here."""
    cache = cache_of(data)
    if cache is None or not (cache.of_all or any(map(index.is_remote, index.shards))):
        return None
    return cache


def check_cache(data: Data, index: Index, order: AnyOrder, nodes: int) -> Cache | None:
    """As fetching. Raises UserError for a cache that cannot hold what a node has open at once."""
    cache = fetching(data, index)
    if cache is not None:
        check_limit(cache, index, order, nodes)
    return cache


def indexes(data: Data) -> tuple[Index, Index | None]:
    """(of training samples, of held-out ones). Raises UserError for one that cannot be read."""
    found = [read_index(source.shards) for source in data.train]
    passes = [source.passes for source in data.train]
    train = found[0] if stands_alone(data.train) else Joined.of(found, passes)
    return train, None if data.val is None else read_index(data.val)


def order_of(config: Config, index: Index) -> AnyOrder:
    """The order of a run's training samples."""
    data, parts = config.data, index.sources
    mixed = isinstance(index, Joined)
    orders = [
        Order(
            [shard.samples for shard in part.shards],
            part.digest(),
            data.streams,
            data.shuffle_window,
            config.train.seed + number,
            turned=mixed,
        )
        for number, part in enumerate(parts)
    ]
    return MixedOrder(orders, index.passes) if isinstance(index, Joined) else orders[0]
