"""What a rank reads of a run's data sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dr2dist.config import Config
from dr2dist.data.dealt import dealt_batches
from dr2dist.data.order import Item
from dr2dist.data.positions import batches, fitting_nodes, open_at_most, validation_batches
from dr2dist.data.prefetch import Prefetcher
from dr2dist.data.stream import loader
from dr2dist.parallel.agreement import agree
from dr2dist.parallel.engine import ReversibleEngine
from dr2dist.parallel.processes import nodes_of
from dr2dist.training.datasets import check_cache, datasets, fetching
from dr2dist.training.plan import Plan


def streams(config: Config, plan: Plan, engine: ReversibleEngine, start: int) -> Any:
    """(training, validation): endless micro-batches of this replica, and its share of the held-out
    samples, None without any. start: samples that the run has consumed so far."""
    data, train = config.data, config.train
    most = None if plan.order is None else open_at_most(plan.order)
    dataset, held_out = datasets(config, plan.task, plan.train, plan.val, most)
    needed = engine.first or engine.last
    collate = plan.task.collate
    items = _training_items(config, plan, engine, start)
    stream = iter(loader(dataset, items, data.num_workers, collate) if needed else ())
    if held_out is None:
        return stream, None
    own = validation_batches(
        len(held_out), batch=train.micro_batch, rank=engine.replica, ranks=engine.replicas
    )
    found = [[(0, index) for index in batch] for batch in own]
    return stream, loader(held_out, found, data.num_workers, collate) if needed else found


def _training_items(
    config: Config, plan: Plan, engine: ReversibleEngine, start: int
) -> Iterator[list[Item]]:
    train, index, order = config.train, plan.train, plan.order
    ways = {"micro_batch": train.micro_batch, "accumulate": train.accumulate}
    if order is None:
        return dealt_batches(
            index.num_samples,
            index.streams,
            train.seed,
            rank=engine.replica,
            ranks=engine.replicas,
            start=start // plan.global_batch,
            **ways,
        )
    # A node fetches its own shards only. Where nothing is fetched, ranks read the same on one node
    # as on several.
    nodes = 1 if fetching(config.data, index) is None else nodes_of(engine.replicas)
    with agree():
        nodes = fitting_nodes(nodes, order, config.data.streams)
    place = {"replica": engine.replica, "replicas": engine.replicas, "nodes": nodes}
    found = batches(order, start=start, **place, **ways)
    with agree():
        cache = check_cache(config.data, index, order, nodes)
    own = engine.replicas // nodes
    # One process of a node fetches ahead.
    if cache is None or engine.replica % own or not engine.first:
        return found
    prefetcher = Prefetcher(cache, index, order, engine.replica // own, nodes)
    return prefetcher.follow(found, start, train.micro_batch * engine.replicas)
