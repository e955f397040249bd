"""Which positions of an order a replica reads: global batches, nodes, and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from dr2dist.data.order import Item, Numbers, Use
from dr2dist.errors import UserError


class AnyOrder(Protocol):
    """What is asked of an Order, and of several sources'."""

    num_samples: int
    lengths: tuple[int, ...]
    """Of each source's samples in an epoch."""
    streams: int
    counts: tuple[int, ...]

    def items(self, positions: Numbers) -> list[Item]:
        """The samples of positions, counted from the start of the run: int64 [P], any order."""
        ...

    def owners(self, positions: Numbers, nodes: int) -> Numbers:
        """Which node reads the stream of each position: int64 [P]."""
        ...

    def uses(self, epoch: int, node: int = 0, nodes: int = 1) -> list[Use]:
        """When a node reads its shards in an epoch, and a little more."""
        ...

    def window_most(self) -> int:
        """Samples within which the stream of the largest window is mixed."""
        ...

    def span(self) -> int:
        """Positions that a window of each stream takes."""
        ...

    def within(self, window: int) -> AnyOrder:
        """The same with another window."""
        ...

    def describe(self) -> str:
        """In a few words."""
        ...


def open_at_most(
    order: AnyOrder, sizes: Sequence[int] | None = None, node: int = 0, nodes: int = 1
) -> int:
    """The largest sum of sizes of shards that a node has open at a time; None: their number."""
    ends: list[tuple[int, int, int]] = []
    for use in order.uses(0, node, nodes):
        ends += [(use.first, 1, use.shard), (use.last + 1, -1, use.shard)]
    times_open, now, most = dict.fromkeys(range(len(order.counts)), 0), 0, 0
    for _, change, shard in sorted(ends):
        before = times_open[shard] > 0
        times_open[shard] += change
        size = 1 if sizes is None else sizes[shard]
        now += size * ((times_open[shard] > 0) - before)
        most = max(most, now)
    return most


def batches(
    order: AnyOrder,
    *,
    micro_batch: int,
    accumulate: int,
    replica: int,
    replicas: int,
    nodes: int = 1,
    start: int = 0,
) -> Iterator[list[Item]]:
    """One replica's micro-batches, without end, from position `start` on.

    The k-th global batch of micro_batch * accumulate * replicas samples is the next so many
    positions, whatever the ranks: it may cross into the next epoch, and nothing is left out. Nodes
    have replicas // nodes replicas each and take places p = node mod nodes, so that each reads its
    own streams; each micro-batch is a run of a node's positions, of all of its streams.
    """
    size, own = micro_batch * accumulate * replicas, replicas // nodes
    node, place = divmod(replica, own)
    while True:
        positions = of_node(order, start, size, node, nodes)
        for part in positions.reshape(accumulate, own, micro_batch)[:, place]:
            yield order.items(part)
        start += size


def fitting_nodes(nodes: int, order: AnyOrder, wanted: int) -> int:
    """Over how many nodes the streams are split: over all, or over none where a small data set has
    fewer streams than the `wanted` ones.

    Raises UserError where neither number divides the other.
    """
    if not order.streams % nodes or not nodes % order.streams:
        return nodes
    if order.streams < wanted:
        return 1
    less, more = wanted // nodes * nodes, -(-wanted // nodes) * nodes
    raise UserError(
        f"data.streams is {wanted}, which {nodes} nodes do not divide: allowed are such as "
        f"{less or nodes} and {more}"
    )


def of_node(order: AnyOrder, start: int, size: int, node: int, nodes: int) -> Numbers:
    """A node's positions of a global batch, in order: size // nodes of them.

    Where a batch crosses into the next epoch, or is of several sources, a node may own one too many
    or too few: the last of those who have too many go to those who have too few.
    """
    positions = np.arange(start, start + size)
    owner, share = order.owners(positions, nodes), size // nodes
    counts = np.bincount(owner, minlength=nodes)
    if (counts != share).any():
        spare = np.concatenate([np.flatnonzero(owner == n)[share:] for n in range(nodes)])
        wanting = np.repeat(np.arange(nodes), np.maximum(0, share - counts))
        owner[np.sort(spare)] = wanting
    return positions[owner == node]


def validation_batches(num_samples: int, *, batch: int, rank: int, ranks: int) -> list[list[int]]:
    """One rank's share of all samples: each is in exactly one batch of one rank.

    Every rank has the same number of batches, so that collectives meet; some may be empty.
    """
    own = list(range(rank, num_samples, ranks))
    rounds = -(-num_samples // (batch * ranks))
    return [own[k * batch : (k + 1) * batch] for k in range(rounds)]
